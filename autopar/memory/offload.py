"""Where in a schedule a value leaves for the host, and where it comes back.

It leaves when it is made, and is gone at the first operator by which the copy is done, but in any
case before the peak that it is to relieve: what the copy lacks until then, compute waits for. It
comes back as late as the copy takes, and as early as there is room.
"""

from __future__ import annotations

import numpy as np

from autopar.memory.program import Program, Resource, Schedule
from autopar.memory.streams import Run, run_times


def host_bytes(program: Program, schedule: Schedule) -> int:
    """What a schedule holds on the host."""
    return sum(program.nbytes[s] for s in schedule.moved(program))


def waited_us(program: Program, schedule: Schedule) -> float:
    """How long compute waits for copies."""
    if not schedule.moved(program):
        return 0.0
    return run_times(program, schedule.forward + schedule.backward).waited[Resource.HOST]


def moved(
    program: Program,
    schedule: Schedule,
    runs: list[Run],
    storage: int,
    *,
    made: int,
    at: int,
    use: int,
    crowded: np.ndarray,
) -> Schedule | None:
    """The schedule with a storage on the host at a position.

    Args:
        runs: of the schedule.
        made: where the forward makes the storage.
        at: a position at which nobody reads it.
        use: its first reader behind that, in the backward.
        crowded: positions at which there is no room for it, in ascending order.

    Returns:
        None where there is no place for the copies.
    """
    out, left, back = program.transfers[storage]
    sequence, first = schedule.forward + schedule.backward, len(schedule.forward)
    us, ops = program.ops[out].us, program.ops
    read = max(p for p in range(made, at) if p == made or storage in ops[sequence[p]].reads)
    queue = [runs[p].end for p in range(made + 1) if ops[sequence[p]].resource is Resource.HOST]
    done = max([runs[made].end, *queue[-1:]]) + us
    gone = next((p for p in range(read + 1, at) if runs[p].issued >= done), at)
    earliest = max(at + 1, first)
    if crowded.size and (before := crowded[crowded < use]).size:
        earliest = max(earliest, int(before[-1]) + 1)
    if earliest > use:
        return None
    start, wanted = use, us
    while start > earliest and runs[use].issued - runs[start].issued < wanted:
        start -= 1
        if ops[sequence[start]].resource is Resource.HOST:
            wanted += ops[sequence[start]].us
    inserted = sorted([(made + 1, 0, out), (gone, 1, left), (start, 2, back)], reverse=True)
    forward, backward = list(schedule.forward), list(schedule.backward)
    for position, _, i in inserted:
        if position > first or (position == first and i == back):
            backward.insert(position - first, i)
        else:
            forward.insert(position, i)
    return Schedule(tuple(forward), tuple(backward))


def without(program: Program, schedule: Schedule, storage: int) -> Schedule:
    """The schedule in which a storage stays on the device."""
    gone = set(program.transfers[storage])
    return Schedule(
        tuple(i for i in schedule.forward if i not in gone),
        tuple(i for i in schedule.backward if i not in gone),
    )
