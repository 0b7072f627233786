"""The published pipeline schedules as rows of a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from autopar.errors import PlanError
from autopar.schedule.pipeline import orders
from autopar.schedule.pipeline.actions import PipelineSchedule


class Placement(StrEnum):
    """Which rank runs a stage. `p` ranks."""

    LOOP = "loop"  # stage s on rank s % p
    V = "v"  # two stages per rank: stage s on rank s, or on 2p - 1 - s in the second half


def rank_of_stage(placement: Placement, ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """By stage, the rank that runs it."""
    if placement is Placement.V:
        return (*range(ranks), *range(ranks - 1, -1, -1))
    return tuple(range(ranks)) * stages_per_rank


@dataclass(frozen=True)
class ScheduleRow:
    """A schedule that `make_schedule` knows.

    Args:
        stages_per_rank: how many; the least where `more` is true.
        more: whether there may be more stages per rank.
        splits_backward: whether there are I and W.
        limits: whether `in_flight` may limit it.
        trains: whether there are backwards.
    """

    name: str
    stages_per_rank: int
    more: bool
    placement: Placement
    splits_backward: bool
    limits: bool
    order: Callable[[orders.Sizes], orders.RankOrder]
    trains: bool = True


def _rows(*rows: ScheduleRow) -> dict[str, ScheduleRow]:
    return {row.name: row for row in rows}


LOOP, V = Placement.LOOP, Placement.V

# name, stages per rank, or more, placement, splits the backward, takes in_flight, generator
SCHEDULES = _rows(
    ScheduleRow("gpipe", 1, False, LOOP, False, True, orders.gpipe),
    ScheduleRow("1f1b", 1, False, LOOP, False, True, orders.one_f_one_b),
    ScheduleRow("interleaved", 2, True, LOOP, False, False, orders.interleaved),
    ScheduleRow("zb-h1", 1, False, LOOP, True, True, orders.zb_h1),
    ScheduleRow("zbv", 2, False, V, True, False, orders.zbv),
    ScheduleRow("dualpipev", 2, False, V, True, False, orders.dualpipev),
    ScheduleRow("forward-only", 1, True, LOOP, False, False, orders.forward_only, trains=False),
    ScheduleRow("forward-only-v", 2, False, V, False, False, orders.forward_only_v, trains=False),
)


@lru_cache(maxsize=256)
def make_schedule(
    name: str,
    ranks: int,
    microbatches: int,
    stages_per_rank: int | None = None,
    *,
    in_flight: int | None = None,
) -> PipelineSchedule:
    """A published schedule for any number of ranks and microbatches.

    Args:
        name: a row of `SCHEDULES`.
        stages_per_rank: the row's, unless it is given.
        in_flight: at most so many microbatches on a rank between their forward and their last
            backward, if that is fewer than the schedule has.
    """
    row = SCHEDULES.get(name)
    if row is None:
        raise PlanError(f"no pipeline schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    stages_per_rank = row.stages_per_rank if stages_per_rank is None else stages_per_rank
    if min(ranks, microbatches, 1 if in_flight is None else in_flight) < 1:
        limited = "" if in_flight is None else f" and {in_flight} in flight"
        raise PlanError(
            f"pipeline schedule {name} of {ranks} ranks and {microbatches} microbatches{limited}:"
            " each has to be 1 or more"
        )
    least = row.stages_per_rank
    if stages_per_rank < least or (stages_per_rank > least and not row.more):
        raise PlanError(
            f"pipeline schedule {name} with {stages_per_rank} stages per rank: it has {least}"
            f"{' or more' if row.more else ''}; change stages_per_rank or the schedule"
        )
    if in_flight is not None and not row.limits:
        able = ", ".join(r.name for r in SCHEDULES.values() if r.limits)
        raise PlanError(
            f"pipeline schedule {name} with {in_flight} microbatches in flight: only {able} can be"
            " limited; leave in_flight out or choose one of these"
        )
    limit = in_flight or max(ranks, microbatches)  # the most that any of them has
    mapping = rank_of_stage(row.placement, ranks, stages_per_rank)
    actions_of = orders.rank_actions if row.trains else orders.forward_actions
    ranks_in_order = []
    for rank in range(ranks):
        sizes = orders.Sizes(rank, ranks, stages_per_rank, microbatches, limit)
        stages = tuple(stage for stage, owner in enumerate(mapping) if owner == rank)
        ranks_in_order.append(tuple(actions_of(row.order(sizes), stages, microbatches)))
    return PipelineSchedule(name, len(mapping), microbatches, tuple(ranks_in_order))
