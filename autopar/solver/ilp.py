"""The SPMD problem as an integer linear program (PuLP; HiGHS, or CBC where HiGHS is missing).

x[v, i] in {0, 1}    node v takes choice i                  (one_choice)
y[e, i, j] >= 0      edge e sees the pair (i, j)            (marginals: sums to x on both ends)
sum a x + sum a y <= limit + slack                          (within)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import pulp

from autopar.solver.problem import Choices, Problem, Row


class NothingFaster(ValueError):
    """A program is infeasible: proof that nothing within its rows is faster than its cutoff."""


def available_backend() -> str:
    """`"HiGHS"` where highspy is installed, else `"CBC"`."""
    return "HiGHS" if find_spec("highspy") is not None else "CBC"


def solver_of(
    *, time_limit: float, gap: float, backend: str | None = None, cutoff: float = math.inf
) -> pulp.LpSolver:
    """PuLP's solver object, silent."""
    if (backend or available_backend()) != "HiGHS":
        return pulp.PULP_CBC_CMD(msg=False, timeLimit=time_limit, gapRel=gap)
    # a restart costs more than it wins in programs of seconds
    return pulp.HiGHS(
        msg=False, timeLimit=time_limit, gapRel=gap, objective_bound=cutoff,
        mip_allow_restart=False,
    )  # fmt: skip


def size_of(problem: Problem) -> int:
    """How many variables the program would have."""
    pairs = sum(int(np.isfinite(e.time_us).sum()) for e in problem.edges)
    return pairs + sum(int(np.isfinite(t).sum()) for t in problem.time_us)


def solve_ilp(
    problem: Problem,
    rows: Sequence[Row] = (),
    *,
    time_limit: float,
    gap: float = 1e-6,
    cutoff: float = math.inf,
    backend: str | None = None,
) -> tuple[Choices | None, float]:
    """Choices (None if none was found in time) and a lower bound on the time in microseconds.

    Args:
        rows: beside the problem's own.
        cutoff: microseconds; what is not faster need not be found.

    Raises:
        NothingFaster: nothing within the rows is faster than the cutoff.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PuLP 3 announces PuLP 4
        program = _Program(problem, (*problem.rows, *rows))
        solver = solver_of(time_limit=time_limit, gap=gap, backend=backend, cutoff=cutoff)
        return program.solve(solver, gap)


class _Program:
    def __init__(self, problem: Problem, rows: Sequence[Row]) -> None:
        self._problem = problem
        self._program = pulp.LpProblem("spmd", pulp.LpMinimize)
        self._cost: list[tuple[pulp.LpVariable, float]] = []
        self._x = [self.one_choice(v) for v in range(len(problem.time_us))]
        self._y = [self.marginals(e) for e in range(len(problem.edges))]
        slacks = {row.slack for row in rows if row.slack}
        self._slack = {name: pulp.LpVariable(f"slack_{i}", 0) for i, name in enumerate(slacks)}
        self._cost += [(variable, 1.0) for variable in self._slack.values()]
        for row in rows:
            self.within(row)
        self._program.setObjective(pulp.LpAffineExpression(self._cost))

    def one_choice(self, v: int) -> dict[int, pulp.LpVariable]:
        time = self._problem.time_us[v]
        variables = {
            int(i): pulp.LpVariable(f"x_{v}_{i}", cat="Binary")
            for i in np.flatnonzero(np.isfinite(time))
        }
        self._program.addConstraint(pulp.lpSum(variables.values()) == 1)
        self._cost += [(x, float(time[i])) for i, x in variables.items() if time[i]]
        return variables

    def marginals(self, e: int) -> dict[tuple[int, int], pulp.LpVariable]:
        edge = self._problem.edges[e]
        rows, columns = self._x[edge.source], self._x[edge.target]
        y = {
            (i, j): pulp.LpVariable(f"y_{e}_{i}_{j}", 0, 1)
            for i in rows
            for j in columns
            if np.isfinite(edge.time_us[i, j])
        }
        for i, variable in rows.items():
            terms = [y[i, j] for j in columns if (i, j) in y]
            self._program.addConstraint(pulp.lpSum(terms) == variable)
        for j, variable in columns.items():
            terms = [y[i, j] for i in rows if (i, j) in y]
            self._program.addConstraint(pulp.lpSum(terms) == variable)
        self._cost += [(v, float(edge.time_us[p])) for p, v in y.items() if edge.time_us[p]]
        return y

    def within(self, row: Row) -> None:
        # bytes run to 1e11: in units of the limit, or of the largest term
        largest = max((float(np.abs(t).max()) for t in row.nodes.values()), default=1.0)
        unit = 1.0 if row.slack else max(1.0, abs(row.limit), largest)
        terms = [
            (x, float(row.nodes[v][i]) / unit)
            for v in row.nodes
            for i, x in self._x[v].items()
            if row.nodes[v][i]
        ]
        terms += [
            (y, float(row.edges[e][pair]) / unit)
            for e in row.edges
            for pair, y in self._y[e].items()
            if row.edges[e][pair]
        ]
        if row.slack:
            terms.append((self._slack[row.slack], -1.0))
        self._program.addConstraint(pulp.LpAffineExpression(terms) <= row.limit / unit)

    def solve(self, solver: pulp.LpSolver, gap: float) -> tuple[Choices | None, float]:
        status = self._program.solve(solver)
        if status == pulp.LpStatusInfeasible:
            raise NothingFaster("the SPMD problem is infeasible within its rows")
        values = [[v.value() or 0.0 for v in variables.values()] for variables in self._x]
        if any(max(v) < 0.5 for v in values):  # none was found
            return None, -math.inf
        choices = tuple(max(c, key=lambda i: c[i].value()) for c in self._x)
        objective = pulp.value(self._program.objective)
        optimal = self._program.sol_status == pulp.LpSolutionOptimal
        proven = status == pulp.LpStatusOptimal and optimal
        return choices, objective - gap * abs(objective) if proven else -math.inf
