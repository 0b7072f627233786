"""Live bytes of a schedule, operator by operator, as the compiled step runs it.

While an operator runs, its operands and results are alive; what nobody reads any more is freed
after it. A pointwise operator may write its result over an operand that dies with it. Counted are
storages that the step makes; gradients of parameters from when they are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from autopar.memory.program import GIVEN, Program, Schedule
from autopar.memory.streams import run_times
from autopar.memory.timeline import Moment, Timeline


class Lives(NamedTuple):
    """Every making of a storage, to its last use; parallel lists.

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
    """Every storage that the schedule makes, as often as it makes it.

    Args:
        overwrite: results are written over operands where that is possible.
    """
    touched, nbytes = program.touched, program.nbytes
    forward = len(schedule.forward)
    current: dict[int, int] = {}
    storage: list[int] = []
    start: list[int] = []
    end: list[int] = []
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
    for s in program.stays.keys() & current.keys():
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
    """Bytes alive at every position.

    Args:
        found: of the schedule, as `lives` finds them.
    """
    return _alive(schedule, found, program.sizes[found.storage])


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
    kept = (start < first) & (end >= first)
    remade = (start >= first) & np.isin(found.storage, list(program.forward_made))
    kept_bytes, again_bytes, other_bytes = (
        _alive(schedule, found, nbytes * mask).round().astype(int).tolist()
        for mask in (kept, remade, ~(kept | remade))
    )
    handed = np.bincount(start[kept], nbytes[kept], first + 1)
    sequence = schedule.forward + schedule.backward
    busy = run_times(program, sequence)
    moments = list[Moment]()
    seen: set[int] = set()
    for at, (i, run) in enumerate(zip(sequence, busy.runs, strict=True)):
        op = program.ops[i]
        moments.append(
            Moment(
                op.name,
                op.module,
                run.start,
                op.us,
                kept_bytes[at],
                again_bytes[at],
                other_bytes[at],
                again=program.started.get(i, i) in seen,
                keeps_bytes=int(handed[at]) if at < first else 0,
                moves_bytes=_moved(program, i),
                flops=op.flops,
                resource=op.resource,
                issued_us=run.issued,
            )
        )
        seen.add(program.started.get(i, i))
    waited = tuple((resource, us) for resource, us in busy.waited.items() if us)
    return Timeline(tuple(moments), first, waited)


def _moved(program: Program, i: int) -> int:
    """Bytes that an operator brings to the host."""
    s = program.moves.get(i)
    return program.nbytes[s] if s is not None and program.transfers[s].out == i else 0


def peak_bytes(program: Program, schedule: Schedule, *, overwrite: bool = True) -> int:
    """The most that is alive at a time."""
    return int(live_bytes(program, schedule, overwrite=overwrite).max(initial=0))


def check(program: Program, schedule: Schedule) -> None:
    """Every operator finds what it reads, and everything that the step returns is made.

    Raises:
        AssertionError: the schedule cannot run.
    """
    made: set[int] = set()
    for i in (*schedule.forward, *schedule.backward):
        op = program.ops[i]
        missing = [s for s in op.reads if program.maker[s] != GIVEN and s not in made]
        assert not missing, f"{op.name} reads storages {missing} before they are made"
        made.update(op.makes)
    lost = {s for s in program.results | program.gradients if program.maker[s] != GIVEN} - made
    assert not lost, f"storages {sorted(lost)} are returned and never made"
    _check_once(program, schedule.forward)


def _check_once(program: Program, forward: Sequence[int]) -> None:
    assert len(set(forward)) == len(forward), "the forward runs an operator twice"
    ran = {program.started.get(i, i) for i in forward}
    assert set(program.forward) <= ran, "the forward leaves an operator out"
