"""Where in a schedule a value leaves for the host, and where it comes back.

A value leaves when it is made, a parameter so that the copy is done when it is read last. It is
gone at the first operator by which the copy is done, but in any case before the peak that it is to
relieve: what the copy lacks until then, compute waits for. It comes back as late as the copy takes,
and as early as there is room.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from autopar.schedule.program import Op, Program, Resource, Schedule
from autopar.schedule.streams import Busy, run_times

BEFORE = -1  # the position of what was there before the step


class Gap(NamedTuple):
    """Between two uses of a storage, it may be on the host.

    Args:
        made: the position that makes it or brings it back; `BEFORE` for a parameter that did not
            leave yet.
        at: a position between the uses, at which it is not to be there.
        use: its first reader behind that; the length of the sequence where only the caller reads.
    """

    made: int
    at: int
    use: int


def host_bytes(program: Program, schedule: Schedule) -> int:
    """What a schedule holds on the host."""
    return int(sum(program.sizes[s] for s in schedule.moved(program)))


def waited_us(program: Program, schedule: Schedule) -> float:
    """How long compute waits for copies."""
    if not schedule.moved(program):
        return 0.0
    return run_times(program, schedule.forward + schedule.backward).waited[Resource.HOST]


def moved(
    program: Program, schedule: Schedule, busy: Busy, storage: int, gap: Gap, crowded: np.ndarray
) -> Schedule | None:
    """The schedule with a storage on the host in a gap.

    Args:
        busy: the times of the schedule.
        crowded: positions at which there is no room for it, in ascending order.

    Returns:
        None where there is no place for the copies.
    """
    out, left, back = program.transfers[storage]
    sequence, first = schedule.forward + schedule.backward, len(schedule.forward)
    made, at, use = gap
    own = storage in program.parameters
    ops, us = [program.ops[i] for i in sequence], program.ops[out].us
    issued = [*(run.issued for run in busy.runs), busy.end]
    read = max((p for p in range(made + 1, at) if storage in ops[p].reads), default=made)
    if own:
        leaves = _ahead(issued, ops, read + 1, us, made + 1)
        earliest = at + 1
        ready = issued[leaves]
    else:
        leaves = made + 1
        earliest = max(at + 1, first)
        ready = busy.runs[made].end
    queue = [busy.runs[p].end for p in range(leaves) if ops[p].resource is Resource.HOST]
    done = max([ready, *queue[-1:]]) + us
    gone = next((p for p in range(read + 1, at) if issued[p] >= done), at)
    if crowded.size and (before := crowded[crowded < use]).size:
        earliest = max(earliest, int(before[-1]) + 1)
    if earliest > use:
        return None
    start = _ahead(issued, ops, use, us, earliest)
    inserted = sorted([(leaves, 0, out), (gone, 1, left), (start, 2, back)], reverse=True)
    forward, backward = list(schedule.forward), list(schedule.backward)
    for position, _, i in inserted:
        if position > first or (position == first and i == back):
            backward.insert(position - first, i)
        else:
            forward.insert(position, i)
    return Schedule(tuple(forward), tuple(backward))


def _ahead(issued: Sequence[float], ops: Sequence[Op], end: int, us: float, earliest: int) -> int:
    """The last position from which a copy is done by another one, or the earliest.

    Args:
        issued: when every position is reached, and the end.
        us: that the copy takes; to that come the copies that are begun behind it.
    """
    start = end
    while start > earliest and issued[end] - issued[start] < us:
        start -= 1
        if ops[start].resource is Resource.HOST:
            us += ops[start].us
    return start


def without(program: Program, schedule: Schedule, storage: int) -> Schedule:
    """The schedule in which a storage stays on the device."""
    gone = set(program.transfers[storage])
    return Schedule(
        tuple(i for i in schedule.forward if i not in gone),
        tuple(i for i in schedule.backward if i not in gone),
    )
