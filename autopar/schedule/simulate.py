"""Live bytes of a schedule, operator by operator, as the compiled step runs it.

While an operator runs, its operands and results are alive; what nobody reads any more is freed
after it. A pointwise operator may write its result over an operand that dies with it. Counted are
storages that the step makes; gradients of parameters from when they are made. A parameter that is
on the host meanwhile counts by its bytes less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from autopar.schedule.program import GIVEN, Program, Schedule
from autopar.schedule.streams import run_times
from autopar.schedule.timeline import Timeline, TimelineEvent


class Lives(NamedTuple):
    """Every making of a storage, to its last use; parallel lists. Parameters that may leave come
    first, and live from the first position to where they leave, and from where they are back to the
    last.

    Args:
        storage: of the program.
        start, end: positions in the sequence: forward, then backward.
        over: the life that it overwrites, -1 for memory of its own.
    """

    storage: list[int]
    start: list[int]
    end: list[int]
    over: list[int]


def lives(program: Program, schedule: Schedule, *, overwrite: bool = True) -> Lives:
    """Every storage that the schedule makes, as often as it makes it, and the parameters.

    Args:
        overwrite: results are written over operands where that is possible.
    """
    touched, nbytes = program.touched, program.nbytes
    forward = len(schedule.forward)
    storage: list[int] = list(program.parameters)
    current: dict[int, int] = {s: life for life, s in enumerate(storage)}
    start: list[int] = [0] * len(storage)
    end: list[int] = [0] * len(storage)
    writers: list[tuple[int, int, tuple[int, ...]]] = []  # life, position, lives to write over
    for at, i in enumerate(schedule.forward + schedule.backward):
        reads, makes, overwrites = touched[i]
        for s in reads:
            if s in current:
                end[current[s]] = at
        if overwrites and overwrite:
            over = tuple([current[s] for s in overwrites if s in current])
            writers.append((len(storage), at, over))
        for s in makes:
            current[s] = len(storage)
            storage.append(s)
            start.append(at)
            end.append(at)
        if at == forward - 1:
            for s in program.results & current.keys():
                end[current[s]] = at
    held = program.results | program.gradients
    for s in (program.stays.keys() | program.parameters.keys()) & current.keys():
        end[current[s]] = forward + len(schedule.backward) - 1
    found = [-1] * len(storage)
    for life, at, candidates in writers:
        for other in candidates:
            s = storage[other]
            same_part = (start[other] >= forward) == (at >= forward)
            if end[other] == at and same_part and nbytes[s] and s not in held:
                found[life] = other
                break
    return Lives(storage, start, end, found)


def occupancy(program: Program, schedule: Schedule, found: Lives) -> np.ndarray:
    """Bytes alive at every position, more than were there before the step.

    Args:
        found: of the schedule, as `lives` finds them.
    """
    return _alive(schedule, found, program.sizes[found.storage]) - _before(program)


def _before(program: Program) -> int:
    """Bytes of parameters that may leave."""
    return sum(parameter.nbytes for parameter in program.parameters.values())


def _alive(schedule: Schedule, found: Lives, nbytes: np.ndarray) -> np.ndarray:
    """The sum over the lives at every position."""
    count = len(schedule.forward) + len(schedule.backward)
    start, end = np.array(found.start), np.array(found.end)
    # what is written over an operand takes its place as that is freed
    start = start + (np.array(found.over) >= 0)
    change = np.bincount(start, nbytes, count + 2) - np.bincount(end + 1, nbytes, count + 2)
    return np.cumsum(change[:count])


def live_bytes(program: Program, schedule: Schedule, *, overwrite: bool = True) -> np.ndarray:
    """Bytes alive at every position."""
    return occupancy(program, schedule, lives(program, schedule, overwrite=overwrite))


def timeline(program: Program, schedule: Schedule, *, overwrite: bool = True) -> Timeline:
    """Simulate a schedule."""
    found = lives(program, schedule, overwrite=overwrite)
    first = len(schedule.forward)
    start, end = np.array(found.start), np.array(found.end)
    nbytes = program.sizes[found.storage]
    # a result that nobody reads but the caller ends with the forward
    given = np.isin(found.storage, list(program.parameters))
    kept = (start < first) & (end >= first) & ~given
    remade = (start >= first) & np.isin(found.storage, list(program.forward_made))
    kept_bytes, again_bytes, other_bytes, there_bytes = (
        _alive(schedule, found, nbytes * mask).round().astype(int).tolist()
        for mask in (kept, remade, ~(kept | remade | given), given)
    )
    before = _before(program)
    handed = np.bincount(start[kept], nbytes[kept], first + 1)
    sequence = schedule.forward + schedule.backward
    busy = run_times(program, sequence)
    events = list[TimelineEvent]()
    seen: set[int] = set()
    for at, (i, run) in enumerate(zip(sequence, busy.runs, strict=True)):
        op = program.ops[i]
        events.append(
            TimelineEvent(
                op.name,
                op.module,
                run.start,
                op.us,
                kept_bytes[at],
                again_bytes[at],
                other_bytes[at],
                again=i not in program.moves and program.started.get(i, i) in seen,
                away_bytes=before - there_bytes[at],
                keeps_bytes=int(handed[at]) if at < first else 0,
                moves_bytes=0 if i in seen else _moved(program, i),
                parameter=program.moves.get(i) in program.parameters,
                flops=op.flops,
                resource=op.resource,
                issued_us=run.issued,
            )
        )
        seen.add(program.started.get(i, i))
    waited = tuple((resource, us) for resource, us in busy.waited.items() if us)
    return Timeline(tuple(events), first, waited)


def _moved(program: Program, i: int) -> int:
    """Bytes that an operator brings to the host."""
    s = program.moves.get(i)
    return int(program.sizes[s]) if s is not None and program.transfers[s].out == i else 0


def peak_bytes(program: Program, schedule: Schedule, *, overwrite: bool = True) -> int:
    """The most that is alive at a time."""
    return int(live_bytes(program, schedule, overwrite=overwrite).max(initial=0))


def check(program: Program, schedule: Schedule) -> None:
    """Every operator finds what it reads, and everything that the step returns is made, and every
    parameter is back.

    Raises:
        AssertionError: the schedule cannot run.
    """
    made = {s for s, maker in enumerate(program.maker) if maker == GIVEN}
    leaves = {program.transfers[s].left: s for s in program.parameters}
    for i in (*schedule.forward, *schedule.backward):
        op = program.ops[i]
        missing = [s for s in op.reads if s not in made]
        assert not missing, f"{op.name} reads storages {missing} that are not there"
        made.update(op.makes)
        made.discard(leaves.get(i, GIVEN))
    gone = program.parameters.keys() - made
    assert not gone, f"parameters {[program.parameters[s].name for s in gone]} stay on the host"
    lost = (program.results | program.gradients) - made
    assert not lost, f"storages {sorted(lost)} are returned and never made"
    _check_once(program, [i for i in schedule.forward if i not in program.moves])


def _check_once(program: Program, forward: Sequence[int]) -> None:
    assert len(set(forward)) == len(forward), "the forward runs an operator twice"
    ran = {program.started.get(i, i) for i in forward}
    assert set(program.forward) <= ran, "the forward leaves an operator out"
