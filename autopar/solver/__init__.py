"""The SPMD solver: `solve(problem) -> solution`, without torch inside."""

from autopar.solver.problem import Edge, Problem, Row, Solution
from autopar.solver.solve import solve

__all__ = ["Edge", "Problem", "Row", "Solution", "solve"]
