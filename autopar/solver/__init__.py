"""The SPMD solver: `solve(problem) -> solution`, without torch inside."""

from autopar.solver.problem import PairCost, Problem, Row, Solution
from autopar.solver.solve import solve

__all__ = ["PairCost", "Problem", "Row", "Solution", "solve"]
