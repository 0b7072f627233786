"""The SPMD solver: `solve(problem) -> solution`, without torch inside."""

from autopar.solver.problem import Edge, Problem, Solution
from autopar.solver.solve import solve

__all__ = ["Edge", "Problem", "Solution", "solve"]
