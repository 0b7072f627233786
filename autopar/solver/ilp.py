"""The SPMD problem as an integer linear program.

x[v, i] in {0, 1}    node v takes choice i                  (one_choice)
y[e, i, j] >= 0      edge e sees the pair (i, j)            (marginals: sums to x at both ends)
sum a x + sum a y <= limit + slack                          (within)
"""

from __future__ import annotations

import math

import numpy as np

from autopar.solver.linear_program import LinearProgram
from autopar.solver.problem import Choices, Problem, Row


class NothingFaster(ValueError):
    """A program is infeasible: proof that nothing within its rows is faster than its cutoff."""


def size_of(problem: Problem) -> int:
    """The number of variables of the program."""
    pairs = sum(int(np.isfinite(e.time_us).sum()) for e in problem.edges)
    return pairs + sum(int(np.isfinite(t).sum()) for t in problem.time_us)


def solve_ilp(
    problem: Problem,
    *,
    time_limit: float,
    gap: float = 1e-6,
    cutoff: float = math.inf,
    backend: str | None = None,
) -> tuple[Choices | None, float]:
    """Choices (None if none was found in time) and a lower bound on the time in microseconds.

    Args:
        cutoff: microseconds; assignments that are not faster need not be found.
        backend: of `linear_program.available_backend`.

    Raises:
        NothingFaster: nothing within the rows is faster than the cutoff.
    """
    ilp = _Program(problem)
    solution = ilp.program.minimize(time_limit=time_limit, gap=gap, cutoff=cutoff, backend=backend)
    if solution.status == "infeasible":
        raise NothingFaster("the SPMD problem is infeasible within its rows")
    values = solution.values
    choices = tuple(max(x, key=lambda i: values[x[i]]) for x in ilp.x)
    if any(values[x[c]] < 0.5 for x, c in zip(ilp.x, choices, strict=True)):
        return None, -math.inf
    if solution.status != "optimal":
        return choices, -math.inf
    objective = sum(c * float(value) for c, value in zip(ilp.program.costs, values, strict=True))
    return choices, objective - gap * abs(objective)


class _Program:
    """The program, and its variables: per node by choice, per edge by pair, per slack by name."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.program = problem, LinearProgram()
        self.x = [self.one_choice(v) for v in range(len(problem.time_us))]
        self.y = [self.marginals(e) for e in range(len(problem.edges))]
        slacks = dict.fromkeys(row.slack for row in problem.rows if row.slack)
        self.slack = {name: self.program.variable(1.0) for name in slacks}
        for row in problem.rows:
            self.within(row)

    def one_choice(self, v: int) -> dict[int, int]:
        time = self.problem.time_us[v]
        x = {
            int(i): self.program.variable(float(time[i]), upper=1.0, integer=True)
            for i in np.flatnonzero(np.isfinite(time))
        }
        self.program.row([(variable, 1.0) for variable in x.values()], lower=1.0, upper=1.0)
        return x

    def marginals(self, e: int) -> dict[tuple[int, int], int]:
        edge = self.problem.edges[e]
        rows, columns = self.x[edge.source], self.x[edge.target]
        y = {
            (i, j): self.program.variable(float(edge.time_us[i, j]), upper=1.0)
            for i in rows
            for j in columns
            if np.isfinite(edge.time_us[i, j])
        }
        for i, variable in rows.items():
            terms = [(y[i, j], 1.0) for j in columns if (i, j) in y]
            self.program.row([*terms, (variable, -1.0)], lower=0.0, upper=0.0)
        for j, variable in columns.items():
            terms = [(y[i, j], 1.0) for i in rows if (i, j) in y]
            self.program.row([*terms, (variable, -1.0)], lower=0.0, upper=0.0)
        return y

    def within(self, row: Row) -> None:
        # bytes run to 1e11: in units of the limit, or of the largest term
        largest = max((float(np.abs(t).max()) for t in row.nodes.values()), default=1.0)
        unit = 1.0 if row.slack else max(1.0, abs(row.limit), largest)
        terms = [
            (x, float(row.nodes[v][i]) / unit) for v in row.nodes for i, x in self.x[v].items()
        ]
        terms += [
            (y, float(row.edges[e][pair]) / unit)
            for e in row.edges
            for pair, y in self.y[e].items()
        ]
        if row.slack:
            terms.append((self.slack[row.slack], -1.0))
        self.program.row(terms, upper=row.limit / unit)
