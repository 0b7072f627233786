"""The Pareto front of time and memory: the fastest plan for each of several budgets.

Every plan is a candidate for every budget that it fits, so that more memory never costs more time,
whatever the gap of a single solve; and no plan within a budget is faster than the bound of a larger
one.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from autopar.errors import InfeasibleError
from autopar.plan_records import ParetoPoint
from autopar.planner.constraints import Allowed
from autopar.planner.describe import describe
from autopar.planner.estimate import estimate_memory, estimate_time
from autopar.planner.liveness import Liveness
from autopar.planner.search import search
from autopar.planner.space import SearchSpace
from autopar.progress import Deadline
from autopar.units import bytes_text

POINTS = 12

# The factor by which a budget grows until a plan is found at the lower end.
_ROOM = 1.001
# The weight of a difference in memory without one in time, of a step.
_EVEN = 1e-4


@dataclass(frozen=True)
class ParetoFront:
    """Fastest plans by budget.

    Args:
        points: from no limit to the smallest budget, with the costs of the plans.
        choices: of the plan of each point.
    """

    points: tuple[ParetoPoint, ...]
    choices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _CostedPlan:
    choices: tuple[int, ...]
    step_us: float
    memory_bytes: float


def pareto_front(
    space: SearchSpace,
    *,
    points: int = POINTS,
    time_limit: float = 60.0,
    progress: Callable[[str], None] | None = None,
    mask: Allowed | None = None,
) -> ParetoFront:
    """Tighten the budget from unlimited to the smallest that has a plan.

    Each budget is below the memory of the plan before, by equal ratios of the remaining range, so
    that a plan that stays the fastest for a while takes one solve, not many. Solves that this saves
    go where time and memory change most.

    Args:
        points: budgets, both ends included; fewer where the two ends meet.
        time_limit: seconds for all budgets together; each gets an equal share of what is left.
    """
    if points < 2:
        raise ValueError(f"a Pareto front has two points or more, not {points}")
    say = progress or (lambda line: None)
    deadline = Deadline(time_limit)
    plans: list[_CostedPlan] = []
    bounds: dict[float, float] = {}

    def solve_within(budget: float) -> float:
        """The memory of the plan for a budget."""
        text = "without limit" if math.isinf(budget) else f"within {bytes_text(budget)}"
        say(f"{text} ({len(bounds) + 1} of {points}) ...")
        seconds = deadline.share(points - len(bounds))
        result = search(space, budget_bytes=budget, time_limit=seconds, mask=mask)
        liveness = Liveness(space, math.inf)
        memory = estimate_memory(space, result.choices, liveness).total_bytes
        step_us = estimate_time(space, result.choices, liveness).step_us
        plans.append(_CostedPlan(result.choices, step_us, memory))
        bounds[budget] = result.bound_us
        return memory

    needed = solve_within(math.inf)
    say("the smallest budget ...")
    smallest = _solve_smallest(space, deadline.share(points), mask, solve_within)
    while len(bounds) < points:
        remaining = points - len(bounds) + 1
        if needed > smallest * _ROOM:
            budget = needed * (smallest / needed) ** (1 / remaining)
        else:
            budget = _widest_gap(sorted(bounds, reverse=True), plans)
        if budget in bounds or budget <= smallest:
            break
        needed = min(needed, solve_within(budget))
    return _front(space, plans, bounds)


def _widest_gap(budgets: list[float], plans: list[_CostedPlan]) -> float:
    """A budget between the two neighbours that differ most in time and memory. Between a budget and
    the memory of its plan nothing new is found, so that range comes last."""
    best = [_best(plans, budget) for budget in budgets]
    budgets = [max(p.memory_bytes for p in plans), *budgets[1:]]
    steps = [less.step_us - more.step_us for more, less in itertools.pairwise(best)]

    def widest(upper: list[float]) -> float | None:
        spans = zip(upper, budgets[1:], steps, strict=False)
        gaps = [
            math.log(max(1.0, above / below)) * (step + _EVEN * best[0].step_us)
            for above, below, step in spans
        ]
        k = int(np.argmax(gaps))
        return math.sqrt(upper[k] * budgets[k + 1]) if gaps[k] > 0 else None

    return widest([p.memory_bytes for p in best]) or widest(budgets) or budgets[-1]


def _solve_smallest(
    space: SearchSpace,
    time_limit: float,
    mask: Allowed | None,
    solve_within: Callable[[float], float],
) -> float:
    """The smallest budget with a plan: a search within one byte names it."""
    smallest = 1.0
    try:
        search(space, budget_bytes=1.0, time_limit=time_limit, mask=mask)
    except InfeasibleError as error:
        smallest = error.smallest_bytes
    while True:
        try:
            solve_within(smallest)
        except InfeasibleError as error:
            smallest = max(error.smallest_bytes, smallest * _ROOM)
        else:
            return smallest


def _best(plans: list[_CostedPlan], budget: float) -> _CostedPlan:
    """The fastest of the plans that fit."""
    fitting = [p for p in plans if p.memory_bytes <= budget * (1 + 1e-9)]
    return min(fitting, key=lambda p: (p.step_us, p.memory_bytes))


def _front(space: SearchSpace, plans: list[_CostedPlan], bounds: dict[float, float]) -> ParetoFront:
    points, choices = [], []
    bound = 0.0
    for budget in sorted(bounds, reverse=True):
        bound = max(bound, bounds[budget])
        best = _best(plans, budget)
        words, reached = _main_layout(space, best.choices), min(bound, best.step_us)
        points.append(ParetoPoint(budget, best.step_us, best.memory_bytes, reached, words))
        choices.append(best.choices)
    return ParetoFront(tuple(points), tuple(choices))


def _main_layout(space: SearchSpace, choices: tuple[int, ...]) -> str:
    """What the plan does where it holds most parameters."""
    counted: Counter[str] = Counter()
    for module in describe(space, choices):
        counted[module.words] += module.parameters
    if not counted.total():
        return ""
    [(words, most)] = counted.most_common(1)
    return f"{words} ({most / counted.total():.0%} of the parameters)"
