"""In which order the actions of all ranks can run, and what each waits for.

An action waits for the action before it on its rank, and

    F of stage s    for F of s - 1
    B or I of s     for B or I of s + 1, and for F of s
    W of s          for I of s

of the same microbatch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from autopar.errors import PlanError
from autopar.schedule.pipeline.actions import Action, Kind, PipelineSchedule

KINDS = (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT, Kind.WEIGHT)


@dataclass(frozen=True, eq=False)
class Execution:
    """The actions of all ranks in an order in which all can run; parallel lists, by position.

    Args:
        actions: each after what it waits for, those of a rank in its order.
        ranks: that runs the action.
        durations: number of its duration: 4 × stage + place of its kind in `KINDS`.
        waits_for: position of the action on another rank whose result it waits for; -1 if none.
        links: number of the pair of ranks over which its result is sent; -1 if it is not.
        first, last: by stage, the position of its first and last action.
        link_count: how many pairs of ranks there are.
    """

    actions: tuple[Action, ...]
    ranks: tuple[int, ...]
    durations: tuple[int, ...]
    waits_for: tuple[int, ...]
    links: tuple[int, ...]
    first: tuple[int, ...]
    last: tuple[int, ...]
    link_count: int


@lru_cache(maxsize=256)
def execution(schedule: PipelineSchedule) -> Execution:
    """An order in which everything runs. Raises PlanError if an action can never run."""
    rank_of, stages, microbatches = schedule.rank_of_stage, schedule.stages, schedule.microbatches
    # There are up to hundreds of thousands of results, hence numbers: activations by stage and
    # microbatch, then gradients.
    gradients = stages * microbatches
    position = [-1] * (2 * gradients)  # of the action that makes a result
    waiting: dict[int, list[int]] = {}  # ranks that wait for a result
    pairs: dict[tuple[int, int], int] = {}
    run: list[Action] = []
    ranks: list[int] = []
    durations: list[int] = []
    waits_for: list[int] = []
    links: list[int] = []
    first, last = [-1] * stages, [-1] * stages
    next_of = [0] * len(schedule.ranks)
    ready = list(range(len(schedule.ranks) - 1, -1, -1))
    while ready:
        rank = ready.pop()
        actions = schedule.ranks[rank]
        while next_of[rank] < len(actions):
            action = actions[next_of[rank]]
            stage, kind, microbatch = action
            # What it makes, and needs of its own stage and of another one, which is on `source`;
            # the stage that needs its result.
            activation = stage * microbatches + microbatch
            gradient = gradients + activation
            if kind is Kind.FORWARD:
                made, own, source, to = activation, -1, stage - 1, stage + 1
                other = activation - microbatches if source >= 0 else -1
            elif kind is Kind.WEIGHT:
                made, own, source, to, other = -1, gradient, -1, -1, -1
            else:
                made, own, source, to = gradient, activation, stage + 1, stage - 1
                other = gradient + microbatches if source < stages else -1
            if own >= 0 and position[own] < 0:
                waiting.setdefault(own, []).append(rank)
                break
            if other >= 0 and position[other] < 0:
                waiting.setdefault(other, []).append(rank)
                break
            at = len(run)
            if made >= 0:
                position[made] = at
                ready += waiting.pop(made, ())
            run.append(action)
            ranks.append(rank)
            durations.append(4 * stage + KINDS.index(kind))
            # What was made on this rank is there already.
            waits_for.append(position[other] if other >= 0 and rank_of[source] != rank else -1)
            sends = 0 <= to < stages and rank_of[to] != rank
            links.append(pairs.setdefault((rank, rank_of[to]), len(pairs)) if sends else -1)
            if first[stage] < 0:
                first[stage] = at
            last[stage] = at
            next_of[rank] += 1
    if len(run) < sum(map(len, schedule.ranks)):
        missing = {
            _Result(
                result % gradients // microbatches,
                Kind.INPUT if result >= gradients else Kind.FORWARD,
                result % microbatches,
            ): stuck
            for result, stuck in waiting.items()
        }
        raise PlanError(_deadlock(schedule, next_of, missing))
    return Execution(
        tuple(run), tuple(ranks), tuple(durations), tuple(waits_for), tuple(links),
        tuple(first), tuple(last), len(pairs),
    )  # fmt: skip


class _Result(NamedTuple):
    """What an action makes: F activations, B and I gradients of inputs, W nothing others need."""

    stage: int
    kind: Kind
    microbatch: int


def _makes(action: Action) -> _Result:
    stage, kind, microbatch = action
    return _Result(stage, Kind.INPUT if kind is Kind.BACKWARD else kind, microbatch)


def _deadlock(
    schedule: PipelineSchedule, next_of: Sequence[int], waiting: Mapping[_Result, Sequence[int]]
) -> str:
    """What every rank that is stuck waits for, the lowest rank first."""
    makes = {_makes(action): action for actions in schedule.ranks for action in actions}
    lines = {}
    for result, ranks in waiting.items():
        wanted = makes.get(result)
        owner = schedule.rank_of_stage[result.stage]
        where = f"which rank {owner} runs later" if wanted else "which no rank runs"
        for rank in ranks:
            action = schedule.ranks[rank][next_of[rank]]
            later = "later on this rank" if wanted and owner == rank else where
            lines[rank] = (
                f"rank {rank} waits at {action} (number {next_of[rank] + 1} of"
                f" {len(schedule.ranks[rank])}) for {wanted or Action(*result)}, {later}"
            )
    return (
        f"pipeline schedule {schedule.name} never ends: "
        + "; ".join(lines[rank] for rank in sorted(lines))
        + "; run what is waited for earlier"
    )
