"""The time-memory front: the fastest plan for each of several budgets, from none to the smallest.

Every plan found is a candidate for every budget that it fits, so that more memory never costs more
time, whatever the gap of a single solve; and no plan within a budget is faster than the bound of a
larger one.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from autopar.errors import InfeasibleError
from autopar.plan import ParetoPoint
from autopar.planner.constraints import Allowed
from autopar.planner.describe import describe
from autopar.planner.estimate import estimate_memory, estimate_time
from autopar.planner.liveness import Liveness
from autopar.planner.search import search
from autopar.planner.space import SearchSpace
from autopar.units import bytes_text

POINTS = 12

# More than any device has.
_UNLIMITED = 2.0**60
# What is added where the smallest budget is not met, to be met.
_ROOM = 1.001
# What a budget that changes nothing is worth, of a step.
_EVEN = 1e-4


@dataclass(frozen=True)
class Front:
    """Fastest plans by budget.

    Args:
        points: from no limit to the smallest budget, with what the plans cost.
        choices: of the plan of each point.
    """

    points: tuple[ParetoPoint, ...]
    choices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Met:
    """A plan that was found."""

    choices: tuple[int, ...]
    step_us: float
    memory_bytes: float


def with_budget(space: SearchSpace, budget_bytes: float) -> SearchSpace:
    """The same space under another budget; candidates and costs are shared."""
    other = copy.copy(space)
    other.cluster = replace(space.cluster, memory_bytes=budget_bytes)
    return other


def front(
    space: SearchSpace,
    *,
    points: int = POINTS,
    time_limit: float = 60.0,
    progress: Callable[[str], None] | None = None,
    only: Allowed | None = None,
) -> Front:
    """Tighten the budget from unlimited to the smallest that has a plan.

    Each budget is below what the plan of the one before needs, by equal ratios of what is left, so
    that a plan which stays the fastest for a while takes one step, not many. Steps that this saves
    go where time and memory change most.

    Args:
        points: budgets, both ends included; fewer where the two ends meet.
        time_limit: seconds for the solver, per budget.
        progress: called with a line per budget.
        only: candidates per decision, where not all of them are allowed.
    """
    if points < 2:
        raise ValueError(f"a front has two points or more, not {points}")
    say = progress or (lambda line: None)
    met: list[_Met] = []
    bounds: dict[float, float] = {}

    def look(budget: float) -> float:
        text = "without limit" if budget == _UNLIMITED else f"within {bytes_text(budget)}"
        say(f"{text} ({len(bounds) + 1} of {points}) ...")
        found = search(with_budget(space, budget), time_limit=time_limit, only=only)
        met.append(_costed(space, found.choices))
        bounds[budget] = found.bound_us
        return met[-1].memory_bytes

    needed = look(_UNLIMITED)
    smallest = _look_from(_smallest(space, time_limit, only, say), look)
    while len(bounds) < points:
        left = points - len(bounds) + 1
        if needed > smallest * _ROOM:
            budget = needed * (smallest / needed) ** (1 / left)
        else:
            budget = _widest(sorted(bounds, reverse=True), met)
        if budget in bounds or budget <= smallest:
            break
        needed = min(needed, look(budget))
    return _chosen(space, sorted(bounds, reverse=True), met, bounds)


def _widest(budgets: list[float], met: list[_Met]) -> float:
    """A budget between the two neighbours that differ most in time and memory. From a budget down
    to what its plan needs there is nothing to find, so it is the last place to look."""
    best = [_best(met, budget) for budget in budgets]
    budgets = [max(m.memory_bytes for m in met), *budgets[1:]]
    steps = [less.step_us - more.step_us for more, less in itertools.pairwise(best)]

    def widest(upper: list[float]) -> float | None:
        spans = zip(upper, budgets[1:], steps, strict=False)
        gaps = [
            math.log(max(1.0, above / below)) * (step + _EVEN * best[0].step_us)
            for above, below, step in spans
        ]
        k = int(np.argmax(gaps))
        return math.sqrt(upper[k] * budgets[k + 1]) if gaps[k] > 0 else None

    return widest([m.memory_bytes for m in best]) or widest(budgets) or budgets[-1]


def _smallest(
    space: SearchSpace, time_limit: float, only: Allowed | None, say: Callable[[str], None]
) -> float:
    """The smallest budget with a plan: what is needed when there is a single byte."""
    say("the smallest budget ...")
    try:
        search(with_budget(space, 1.0), time_limit=time_limit, only=only)
    except InfeasibleError as error:
        return error.smallest_bytes
    return 1.0


def _look_from(smallest: float, look: Callable[[float], float]) -> float:
    """The first budget from the smallest on at which a plan is found again."""
    while True:
        try:
            look(smallest)
        except InfeasibleError as error:
            smallest = max(error.smallest_bytes, smallest * _ROOM)
        else:
            return smallest


def _costed(space: SearchSpace, choices: tuple[int, ...]) -> _Met:
    liveness = Liveness(space, math.inf)
    memory = estimate_memory(space, choices, liveness).total_bytes
    return _Met(choices, estimate_time(space, choices, liveness).step_us, memory)


def _best(met: list[_Met], budget: float) -> _Met:
    """The fastest of the plans that fit."""
    fitting = [m for m in met if m.memory_bytes <= budget * (1 + 1e-9)]
    return min(fitting, key=lambda m: (m.step_us, m.memory_bytes))


def _chosen(
    space: SearchSpace, budgets: list[float], met: list[_Met], bounds: dict[float, float]
) -> Front:
    points, choices = [], []
    bound = 0.0
    for budget in budgets:
        bound = max(bound, bounds[budget])
        best = _best(met, budget)
        limit = math.inf if budget == _UNLIMITED else budget
        points.append(
            ParetoPoint(
                limit, best.step_us, best.memory_bytes, min(bound, best.step_us),
                _words(space, best.choices),
            )
        )  # fmt: skip
        choices.append(best.choices)
    return Front(tuple(points), tuple(choices))


def _words(space: SearchSpace, choices: tuple[int, ...]) -> str:
    """What the plan does where it holds most parameters."""
    modules = [m for m in describe(space, choices) if m.parameters]
    if not modules:
        return ""
    counted: dict[str, int] = {}
    for m in modules:
        counted[m.words] = counted.get(m.words, 0) + m.parameters
    share = np.array(list(counted.values())) / sum(counted.values())
    most = int(np.argmax(share))
    return f"{list(counted)[most]} ({share[most]:.0%} of the parameters)"
