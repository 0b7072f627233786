"""The SPMD problem as an integer linear program (PuLP; HiGHS, or CBC where HiGHS is missing).

x[v, i] in {0, 1}    node v takes choice i                  (one_choice)
y[e, i, j] >= 0      edge e sees the pair (i, j)            (marginals: sums to x on both ends)
sum m x + sum m y <= budget                                 (memory)
"""

from __future__ import annotations

import math
import warnings
from importlib.util import find_spec

import numpy as np
import pulp

from autopar.solver.problem import Problem


def available_backend() -> str:
    """`"HiGHS"` where highspy is installed, else `"CBC"`."""
    return "HiGHS" if find_spec("highspy") is not None else "CBC"


def _solver(backend: str, time_limit: float, gap: float) -> pulp.LpSolver:
    make = pulp.HiGHS if backend == "HiGHS" else pulp.PULP_CBC_CMD
    return make(msg=False, timeLimit=time_limit, gapRel=gap)


def solve_ilp(
    problem: Problem, *, time_limit: float, gap: float = 1e-6, backend: str | None = None
) -> tuple[tuple[int, ...] | None, float]:
    """Choices (None if none was found in time) and a lower bound on the time in microseconds.

    Raises:
        ValueError: the problem is infeasible.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PuLP 3 announces PuLP 4
        return _solve(problem, time_limit, gap, backend or available_backend())


def _solve(
    problem: Problem, time_limit: float, gap: float, backend: str
) -> tuple[tuple[int, ...] | None, float]:
    program = pulp.LpProblem("spmd", pulp.LpMinimize)
    x: list[dict[int, pulp.LpVariable]] = []
    cost: list[tuple[pulp.LpVariable, float]] = []
    memory: list[tuple[pulp.LpVariable, float]] = []
    unit = max(1.0, problem.budget_bytes if math.isfinite(problem.budget_bytes) else 1.0)

    def charge(variable: pulp.LpVariable, time_us: float, memory_bytes: float) -> None:
        if time_us:
            cost.append((variable, time_us))
        if memory_bytes:
            memory.append((variable, memory_bytes / unit))

    def one_choice(v: int) -> dict[int, pulp.LpVariable]:
        allowed = np.flatnonzero(np.isfinite(problem.time_us[v]))
        variables = {int(i): pulp.LpVariable(f"x_{v}_{i}", cat="Binary") for i in allowed}
        program.addConstraint(pulp.lpSum(variables.values()) == 1)
        for i, variable in variables.items():
            charge(variable, float(problem.time_us[v][i]), float(problem.memory_bytes[v][i]))
        return variables

    def marginals(e: int) -> None:
        edge = problem.edges[e]
        rows, columns = x[edge.source], x[edge.target]
        y = {
            (i, j): pulp.LpVariable(f"y_{e}_{i}_{j}", 0, 1)
            for i in rows
            for j in columns
            if np.isfinite(edge.time_us[i, j])
        }
        for i, variable in rows.items():
            terms = [y[i, j] for j in columns if (i, j) in y]
            program.addConstraint(pulp.lpSum(terms) == variable)
        for j, variable in columns.items():
            terms = [y[i, j] for i in rows if (i, j) in y]
            program.addConstraint(pulp.lpSum(terms) == variable)
        for (i, j), variable in y.items():
            bytes_ = 0.0 if edge.memory_bytes is None else float(edge.memory_bytes[i, j])
            charge(variable, float(edge.time_us[i, j]), bytes_)

    x = [one_choice(v) for v in range(len(problem.time_us))]
    for e in range(len(problem.edges)):
        marginals(e)
    if math.isfinite(problem.budget_bytes):
        program.addConstraint(
            pulp.LpAffineExpression(memory) <= problem.budget_bytes / unit, "memory"
        )
    program.setObjective(pulp.LpAffineExpression(cost))
    status = program.solve(_solver(backend, time_limit, gap))
    if status == pulp.LpStatusInfeasible:
        raise ValueError("the SPMD problem is infeasible within the memory budget")
    if any(v.value() is None for variables in x for v in variables.values()):
        return None, -math.inf
    choices = tuple(max(c, key=lambda i: c[i].value()) for c in x)
    objective = pulp.value(program.objective)
    proven = status == pulp.LpStatusOptimal and program.sol_status == pulp.LpSolutionOptimal
    return choices, objective * (1 - gap) if proven else -math.inf
