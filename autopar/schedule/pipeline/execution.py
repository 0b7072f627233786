"""In which order the actions of all ranks can run, and what each waits for.

An action waits for the action before it on its rank, and

    F of stage s    for F of s - 1
    B or I of s     for B or I of s + 1, and for F of s
    W of s          for I of s

of the same microbatch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    rank_of, stages = schedule.rank_of_stage, schedule.stages
    run: list[Action] = []
    position: dict[_Result, int] = {}  # of the action that makes a result
    waiting: dict[_Result, list[int]] = {}  # ranks that wait for a result
    next_of = [0] * len(schedule.ranks)
    ready = list(range(len(schedule.ranks) - 1, -1, -1))
    while ready:
        rank = ready.pop()
        actions = schedule.ranks[rank]
        while next_of[rank] < len(actions):
            action = actions[next_of[rank]]
            missing = next((r for r in _needs(action, stages) if r not in position), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            made = _makes(action)
            position[made] = len(run)
            ready += waiting.pop(made, ())
            run.append(action)
            next_of[rank] += 1
    if len(run) < sum(map(len, schedule.ranks)):
        raise PlanError(_deadlock(schedule, next_of, waiting))

    pairs: dict[tuple[int, int], int] = {}
    waits_for, links = [], []
    first, last = [-1] * stages, [-1] * stages
    for at, action in enumerate(run):
        stage, rank = action.stage, rank_of[action.stage]
        # What was made on this rank is there already.
        remote = [r for r in _needs(action, stages) if rank_of[r.stage] != rank]
        waits_for.append(position[remote[0]] if remote else -1)
        to = _sends_to(action)
        sends = 0 <= to < stages and rank_of[to] != rank
        links.append(pairs.setdefault((rank, rank_of[to]), len(pairs)) if sends else -1)
        if first[stage] < 0:
            first[stage] = at
        last[stage] = at
    return Execution(
        tuple(run), tuple(rank_of[a.stage] for a in run),
        tuple(4 * a.stage + KINDS.index(a.kind) for a in run),
        tuple(waits_for), tuple(links), tuple(first), tuple(last), len(pairs),
    )  # fmt: skip


class _Result(NamedTuple):
    """What an action makes: F activations, B and I gradients of inputs, W nothing others need."""

    stage: int
    kind: Kind
    microbatch: int


def _makes(action: Action) -> _Result:
    stage, kind, microbatch = action
    return _Result(stage, Kind.INPUT if kind is Kind.BACKWARD else kind, microbatch)


def _needs(action: Action, stages: int) -> Iterator[_Result]:
    """Results that an action waits for; at most one of them is another stage's."""
    stage, kind, microbatch = action
    if kind is Kind.WEIGHT:
        yield _Result(stage, Kind.INPUT, microbatch)
    elif kind is Kind.FORWARD:
        if stage > 0:
            yield _Result(stage - 1, Kind.FORWARD, microbatch)
    else:
        yield _Result(stage, Kind.FORWARD, microbatch)
        if stage + 1 < stages:
            yield _Result(stage + 1, Kind.INPUT, microbatch)


def _sends_to(action: Action) -> int:
    """The stage that needs the result; there may be no such stage."""
    if action.kind is Kind.WEIGHT:
        return -1
    return action.stage + 1 if action.kind is Kind.FORWARD else action.stage - 1


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
