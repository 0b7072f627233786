"""The SPMD solver: `solve(problem) -> solution`, without torch inside."""

from autopar.solver.problem import PairCost, Problem, Row, Solution
from autopar.solver.solve import LAYERS, solve

__all__ = ["LAYERS", "PairCost", "Problem", "Row", "Solution", "solve"]
