"""Live bytes of a schedule, operator by operator, as the compiled step runs it.

While an operator runs, its operands and results are alive; a storage is freed after its last
reader. A pointwise operator may write its result over an operand that dies with it, and the parts
of a concatenation are copied into its result as they are made. Storages that the step makes count;
gradients of parameters count from when they are made, and a parameter that is offloaded counts
negatively meanwhile. Collectives have buffers while they run.
"""

from __future__ import annotations

import numpy as np

from autopar.schedule.live_ranges import LiveRanges, live_ranges
from autopar.schedule.program import INPUT, Program, Schedule
from autopar.schedule.streams import run_times
from autopar.schedule.timeline import Timeline, TimelineEvent


def occupancy(program: Program, schedule: Schedule, ranges: LiveRanges) -> np.ndarray:
    """Bytes alive at every position, more than before the step.

    Args:
        ranges: `live_ranges` of the schedule.
    """
    alive = _alive(schedule, ranges, program.sizes[ranges.storage]) - _before(program)
    return alive + _held(schedule, ranges)


def _held(schedule: Schedule, ranges: LiveRanges) -> np.ndarray:
    """Buffers at every position."""
    held = np.zeros(len(schedule.forward) + len(schedule.backward))
    held[list(ranges.buffers)] = list(ranges.buffers.values())
    return held


def _before(program: Program) -> int:
    """Bytes of parameters that have a transfer."""
    return sum(parameter.nbytes for parameter in program.parameters.values())


def _alive(schedule: Schedule, ranges: LiveRanges, nbytes: np.ndarray) -> np.ndarray:
    """The sum over the live ranges at every position."""
    count = len(schedule.forward) + len(schedule.backward)
    # what is written over an operand counts once that is freed
    start = ranges.start + (ranges.over >= 0)
    change = np.bincount(start, nbytes, count + 2) - np.bincount(ranges.end + 1, nbytes, count + 2)
    return np.cumsum(change[:count])


def live_bytes(program: Program, schedule: Schedule) -> np.ndarray:
    """Bytes alive at every position."""
    return occupancy(program, schedule, live_ranges(program, schedule))


def peak_bytes(program: Program, schedule: Schedule) -> int:
    """The most bytes that are alive at a time."""
    return int(live_bytes(program, schedule).max(initial=0))


def timeline(program: Program, schedule: Schedule) -> Timeline:
    """Simulate a schedule."""
    ranges = live_ranges(program, schedule)
    first = len(schedule.forward)
    start, end = ranges.start, ranges.end
    nbytes = program.sizes[ranges.storage]
    parameter = np.isin(ranges.storage, list(program.parameters))
    kept = (start < first) & (end >= first) & ~parameter
    recomputed = (start >= first) & np.isin(ranges.storage, list(program.forward_storages))
    kept_bytes, recomputed_bytes, other_bytes, present_bytes = (
        _alive(schedule, ranges, nbytes * mask).round().astype(int).tolist()
        for mask in (kept, recomputed, ~(kept | recomputed | parameter), parameter)
    )
    held = _held(schedule, ranges).astype(int)
    before = _before(program)
    saved = np.bincount(start[kept], nbytes[kept], first + 1)
    sequence = schedule.forward + schedule.backward
    times = run_times(program, sequence)
    events = list[TimelineEvent]()
    seen: set[int] = set()
    for at, (i, run) in enumerate(zip(sequence, times.runs, strict=True)):
        op = program.ops[i]
        s = program.transferred.get(i)
        offloads = s is not None and program.transfers[s].offload == i and i not in seen
        events.append(
            TimelineEvent(
                op.name, op.module, run.start, op.us,
                kept_bytes[at], recomputed_bytes[at], other_bytes[at] + int(held[at]),
                evicted_bytes=before - present_bytes[at],
                recomputed=s is None and program.started.get(i, i) in seen,
                saves_bytes=int(saved[at]) if at < first else 0,
                offloads_bytes=int(program.sizes[s]) if offloads else 0,
                parameter=s in program.parameters,
                flops=op.flops, resource=op.resource, issued_us=run.issued,
            )
        )  # fmt: skip
        seen.add(program.started.get(i, i))
    return Timeline(tuple(events), first, times.waited)


def check(program: Program, schedule: Schedule) -> None:
    """Check that every operator finds what it reads, that everything the step returns is made, that
    parameters are reloaded only if they were evicted, and that all are on the device at the end.

    Raises:
        AssertionError: the schedule cannot run.
    """
    present = {s for s, maker in enumerate(program.maker) if maker == INPUT}
    evicts = {program.transfers[s].evict: s for s in program.parameters}
    for i in (*schedule.forward, *schedule.backward):
        op = program.ops[i]
        missing = [s for s in op.reads if s not in present]
        assert not missing, f"{op.name} reads storages {missing} that are not there"
        on_device = present & program.parameters.keys()
        again = [program.parameters[s].name for s in op.makes if s in on_device]
        assert not again, f"{op.name} reloads {again}, which are not evicted"
        present.update(op.makes)
        present.discard(evicts.get(i, INPUT))
    evicted = [program.parameters[s].name for s in program.parameters.keys() - present]
    assert not evicted, f"parameters {evicted} stay on the host"
    missing = sorted((program.results | program.gradients) - present)
    assert not missing, f"storages {missing} are returned and never made"
    forward = [i for i in schedule.forward if i not in program.transferred]
    assert len(set(forward)) == len(forward), "the forward runs an operator twice"
    ran = {program.started.get(i, i) for i in forward}
    assert set(program.forward) <= ran, "the forward leaves an operator out"
