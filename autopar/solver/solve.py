"""`solve(problem) -> solution`: reductions, then elimination, then an ILP on what is left.

Without the memory bound, elimination is exact. With it, time + price * memory is minimized by the
same elimination for rising prices (Lagrangian relaxation): every price gives a lower bound, every
assignment that fits an upper one, and every choice whose min-marginal exceeds the best upper bound
can go. The ILP closes the rest and certifies the gap.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from autopar.errors import InfeasibleError
from autopar.solver.elimination import Elimination, TooWide
from autopar.solver.ilp import available_backend, solve_ilp
from autopar.solver.problem import Edge, Problem, Solution
from autopar.solver.reductions import Inverse, drop_dominated, keep_choices
from autopar.units import format_bytes

PRICE_STEPS = 24
TARGET_GAP = 1e-4


def solve(
    problem: Problem,
    *,
    time_limit: float = 60.0,
    progress: Callable[[str], None] | None = None,
) -> Solution:
    """The fastest assignment within the budget, with a certified gap.

    Args:
        time_limit: seconds; afterwards the best found is returned with its gap.
        progress: called with a line for each phase.

    Raises:
        InfeasibleError: no assignment fits; it names the smallest feasible budget.
    """
    say = progress or (lambda line: None)
    start = time.monotonic()
    small, inverse = drop_dominated(problem)
    say(
        f"{len(problem.time_us)} nodes, {sum(map(len, problem.time_us))} choices; "
        f"{sum(map(len, small.time_us))} after dominance"
    )

    def finish(choices: tuple[int, ...], bound: float, method: str) -> Solution:
        original = inverse(choices)
        time_us, memory = problem.evaluate(original)
        return Solution(original, time_us, memory, min(bound, time_us), method)

    def remaining() -> float:
        return max(1.0, time_limit - (time.monotonic() - start))

    try:
        fastest_us, choices = _minimize(small, 0.0)
    except TooWide:
        say("too wide for elimination: integer program")
        return _by_ilp(small, finish, remaining())
    if not math.isfinite(fastest_us):
        raise InfeasibleError(
            "no assignment satisfies the constraints on layouts, whatever the memory",
            budget_bytes=problem.budget_bytes,
            smallest_bytes=math.inf,
        )
    if small.evaluate(choices)[1] <= problem.budget_bytes:
        return finish(choices, fastest_us, "elimination")
    try:
        best, bound, price = _price_search(small, fastest_us, choices)
    except TooWide:
        say("too wide for elimination with priced memory: integer program")
        return _by_ilp(small, finish, remaining())
    say(f"memory binds: {best[0]:.0f} us found, bound {bound:.0f} us")
    if best[0] - bound <= TARGET_GAP * best[0]:
        return finish(best[1], bound, "elimination with priced memory")
    core, expand = _drop_hopeless(small, price, best[0])
    say(f"integer program over {sum(map(len, core.time_us))} choices")
    found, ilp_bound = solve_ilp(core, time_limit=remaining(), gap=TARGET_GAP / 2)
    if found is not None:
        candidate = expand(found)
        time_us, memory = small.evaluate(candidate)
        if memory <= small.budget_bytes * (1 + 1e-9) and time_us < best[0]:
            best = (time_us, candidate)
    return finish(best[1], max(bound, min(ilp_bound, best[0])), f"ilp ({available_backend()})")


def _minimize(problem: Problem, price: float) -> tuple[float, tuple[int, ...]]:
    """Least time + price * memory, and choices that reach it. With one cost instead of two, far
    more choices are dominated.

    Raises:
        TooWide: elimination would need too large a table.
    """
    unary, pairs = problem.weighted(price)
    single = Problem(
        tuple(unary),
        tuple(np.zeros(len(u)) for u in unary),
        tuple(Edge(a, b, cost) for a, b, cost in pairs),
    )
    core, inverse = drop_dominated(single)
    found = Elimination(*core.weighted(0.0))
    return found.minimum, inverse(found.argmin())


def _drop_hopeless(problem: Problem, price: float, best_us: float) -> tuple[Problem, Inverse]:
    """Drop choices whose every completion is provably slower than the best known assignment."""
    try:
        marginals = Elimination(*problem.weighted(price)).min_marginals()
    except TooWide:
        marginals = [np.zeros(len(t)) for t in problem.time_us]
    slack = best_us + price * problem.budget_bytes + 1e-9
    return keep_choices(problem, [np.flatnonzero(m <= slack) for m in marginals])


def _by_ilp(
    small: Problem, finish: Callable[[tuple[int, ...], float, str], Solution], limit: float
) -> Solution:
    try:
        choices, bound = solve_ilp(small, time_limit=limit, gap=TARGET_GAP)
    except ValueError:
        unbounded = replace(_memory_only(small), budget_bytes=math.inf)
        leanest, _ = solve_ilp(unbounded, time_limit=limit, gap=TARGET_GAP)
        smallest = small.evaluate(leanest)[1] if leanest is not None else math.nan
        raise InfeasibleError(
            f"no plan fits {format_bytes(small.budget_bytes)} per device: the smallest budget with "
            f"a plan is {format_bytes(smallest)} ({smallest:.0f} bytes)",
            budget_bytes=small.budget_bytes,
            smallest_bytes=smallest,
        ) from None
    if choices is None:
        raise InfeasibleError(
            f"no plan was found within the time limit of {limit:.0f} s; raise the limit",
            budget_bytes=small.budget_bytes,
            smallest_bytes=math.nan,
        )
    return finish(choices, bound, f"ilp ({available_backend()})")


def _memory_only(problem: Problem) -> Problem:
    """The same problem with bytes in the place of time; what was forbidden stays so."""

    def bytes_of(time: np.ndarray, memory: np.ndarray | None) -> np.ndarray:
        return np.where(np.isfinite(time), 0.0 if memory is None else memory, np.inf)

    return Problem(
        tuple(map(bytes_of, problem.time_us, problem.memory_bytes)),
        problem.memory_bytes,
        tuple(Edge(e.source, e.target, bytes_of(e.time_us, e.memory_bytes)) for e in problem.edges),
        problem.budget_bytes,
        problem.names,
    )


def _price_search(
    problem: Problem, minimum: float, fastest: tuple[int, ...]
) -> tuple[tuple[float, tuple[int, ...]], float, float]:
    """Best feasible (time, choices), best lower bound, and the price that gave it."""
    budget = problem.budget_bytes
    _, choices = _minimize(_memory_only(problem), 0.0)
    time_us, memory = problem.evaluate(choices)
    if memory > budget:
        raise InfeasibleError(
            f"no plan fits {format_bytes(budget)} per device: the smallest budget with a plan is "
            f"{format_bytes(memory)} ({memory:.0f} bytes). Raise the budget, use more devices, or "
            "make the model or batch smaller.",
            budget_bytes=budget,
            smallest_bytes=memory,
        )
    best = (time_us, choices)
    fast_time, fast_memory = problem.evaluate(fastest)
    bound, bound_price = minimum, 0.0
    # lines of the dual: cutting-plane search for the maximum of a concave function of one price
    low, high = (fast_time, fast_memory), (time_us, memory)
    for _ in range(PRICE_STEPS):
        if low[1] - high[1] <= 0:
            break
        price = (high[0] - low[0]) / (low[1] - high[1])
        priced, choices = _minimize(problem, price)
        dual = priced - price * budget
        if dual > bound:
            bound, bound_price = dual, price
        time_us, memory = problem.evaluate(choices)
        on_line = priced >= low[0] + price * low[1] - 1e-9 * max(1.0, abs(low[0]))
        if memory <= budget:
            if time_us < best[0]:
                best = (time_us, choices)
            high = (time_us, memory)
        else:
            low = (time_us, memory)
        if on_line:
            break
    return best, bound, bound_price
