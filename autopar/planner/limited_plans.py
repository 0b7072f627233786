"""Plans of a model within limits of memory, of which a joint plan schedules some."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from autopar.errors import InfeasibleError
from autopar.planner.estimate import estimate_memory
from autopar.planner.planner import PlanningProblem
from autopar.planner.search import SearchResult, search
from autopar.units import bytes_text

_LOWER = 0.95  # times a limit whose plan has no schedule
_BETWEEN = 2  # limits between none and the budget


def limited_plans(
    problem: PlanningProblem, needed: float, errors: list[InfeasibleError]
) -> Iterator[tuple[float, SearchResult]]:
    """Plans for the budget (or the smallest limit that has one), and for limits between that and
    the memory of the plan without a limit.

    Args:
        errors: gets those of limits without a plan.
    """

    def within(limit: float) -> SearchResult | float:
        result = _solved(problem, limit)
        if isinstance(result, InfeasibleError):
            errors.append(result)
            return result.smallest_bytes
        return result

    low = problem.budget_bytes
    result = within(low)
    if isinstance(result, float) and math.isfinite(result):
        low = result
        result = within(low)
    if isinstance(result, SearchResult):
        yield low, result
        low = estimate_memory(problem.space, result.choices).total_bytes
    for k in range(1, _BETWEEN + 1):
        limit = needed * (low / needed) ** (k / (_BETWEEN + 1))
        between = within(limit)
        if isinstance(between, SearchResult):
            yield limit, between


def _solved(problem: PlanningProblem, limit: float) -> SearchResult | InfeasibleError:
    """The fastest plan within a limit, or why there is none."""
    with problem.progress.stage("solve") as stage:
        try:
            result = search(
                problem.space, budget_bytes=limit, time_limit=problem.deadline.left,
                progress=problem.progress.detail, mask=problem.mask,
            )  # fmt: skip
        except InfeasibleError as error:
            stage.done = f"no plan within {bytes_text(limit)} without a schedule"
            return error
        described = result.describe() + problem.cut_short(result)
        stage.done = f"solved within {bytes_text(limit)}: {described}"
        return result


def lower_plans(
    problem: PlanningProblem, refusal: Callable[[], InfeasibleError | None]
) -> Iterator[tuple[float, SearchResult]]:
    """Plans for limits below the budget, down to the smallest that has one, until one of them is
    scheduled: a step needs more than the estimate of its plan in gathers and buffers.

    Args:
        refusal: of the last plan, which has no schedule; None if it has one.
    """
    limit = problem.budget_bytes
    while (refused := refusal()) is not None and not problem.deadline.over:
        excess = refused.smallest_bytes - problem.budget_bytes
        limit = min(_LOWER * limit, limit - excess) if excess < limit else 0.0
        result = _solved(problem, max(1.0, limit))
        is_last = isinstance(result, InfeasibleError)
        if isinstance(result, InfeasibleError):
            if not limit < result.smallest_bytes < problem.budget_bytes:
                return
            limit = result.smallest_bytes
            result = _solved(problem, limit)
        if isinstance(result, SearchResult):
            yield limit, result
        if is_last:
            return
