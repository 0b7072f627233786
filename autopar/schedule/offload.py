"""Where in a schedule a storage is offloaded, evicted and reloaded.

The copy of a value to the host starts when the value is made; that of a parameter, so that it is
done at the last read before the gap. The storage is evicted at the first operator by which the copy
is done, but before the peak that it is to relieve: compute waits for the rest of the copy. The
reload starts as late as the copy takes, and as early as there is room.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from autopar.schedule.program import Op, Program, Resource, Schedule
from autopar.schedule.streams import ResourceTimes

BEFORE = -1  # the position of what exists before the step


class IdleInterval(NamedTuple):
    """Between two uses of a storage; it may be on the host meanwhile.

    Args:
        written: the position that writes or reloads it; `BEFORE` for a parameter not yet offloaded.
        at: a position between the uses, at which it is not to be on the device.
        use: its first reader behind that; the length of the sequence if only the caller reads it.
    """

    written: int
    at: int
    use: int


def host_bytes(program: Program, schedule: Schedule) -> int:
    """Bytes that a schedule holds on the host."""
    return int(sum(program.sizes[s] for s in schedule.offloaded(program)))


def with_offload(
    program: Program, schedule: Schedule, times: ResourceTimes, storage: int,
    interval: IdleInterval, full: np.ndarray,
) -> Schedule | None:  # fmt: skip
    """The schedule with a storage on the host in an idle interval.

    Args:
        times: of the schedule.
        full: positions at which there is no room for the storage, in ascending order.

    Returns:
        None if there is no place for the copies.
    """
    offload, evict, reload = program.transfers[storage]
    sequence, first = schedule.forward + schedule.backward, len(schedule.forward)
    written, at, use = interval
    ops, us = [program.ops[i] for i in sequence], program.ops[offload].us
    issued = [*(run.issued for run in times.runs), times.end]
    read = max((p for p in range(written + 1, at) if storage in ops[p].reads), default=written)
    if storage in program.parameters:
        offload_at = _copy_start(issued, ops, read + 1, us, written + 1)
        earliest = at + 1
        ready = issued[offload_at]
    else:
        offload_at = written + 1
        earliest = max(at + 1, first)
        ready = times.runs[written].end
    copies = [times.runs[p].end for p in range(offload_at) if ops[p].resource is Resource.HOST]
    done = max([ready, *copies[-1:]]) + us
    evict_at = next((p for p in range(read + 1, at) if issued[p] >= done), at)
    full = full[full < use]
    if full.size:
        earliest = max(earliest, int(full[-1]) + 1)
    if earliest > use:
        return None
    reload_at = _copy_start(issued, ops, use, us, earliest)
    inserted = [(offload_at, 0, offload), (evict_at, 1, evict), (reload_at, 2, reload)]
    forward, backward = list(schedule.forward), list(schedule.backward)
    for position, _, i in sorted(inserted, reverse=True):
        if position > first or (position == first and i == reload):
            backward.insert(position - first, i)
        else:
            forward.insert(position, i)
    return Schedule(tuple(forward), tuple(backward))


def _copy_start(
    issued: Sequence[float], ops: Sequence[Op], end: int, us: float, earliest: int
) -> int:
    """The last position from which a copy is done by position `end`, or the earliest.

    Args:
        issued: when every position is reached, and the end.
        us: of the copy; copies that start after it add to that.
    """
    start = end
    while start > earliest and issued[end] - issued[start] < us:
        start -= 1
        if ops[start].resource is Resource.HOST:
            us += ops[start].us
    return start


def without_offload(program: Program, schedule: Schedule, storage: int) -> Schedule:
    """The schedule in which a storage stays on the device."""
    transfer = program.transfers[storage]
    return Schedule(
        tuple(i for i in schedule.forward if i not in transfer),
        tuple(i for i in schedule.backward if i not in transfer),
    )
