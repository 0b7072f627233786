"""The optimizer's step on the host beside the backward, predicted.

A thread steps a chunk when its gradients are stored, into a second version
(`runtime/speculative_step.py`). What it has not begun when the backward ends is stepped then,
without a second version.
"""

from __future__ import annotations

from collections.abc import Sequence

from autopar.cluster.tiers import HOST, NVME, StateBytes, Tier, tier_named
from autopar.plan_records import HostStep
from autopar.schedule.program import Program, Resource, Schedule
from autopar.schedule.streams import run_times, step_us

# Of the parameters in a chunk: large enough to move at a drive's bandwidth. On the host, a small
# model has smaller ones, which are large enough for the calls that step them.
CHUNK_BYTES = 32 * 2**20
_CHUNKS, _LEAST_BYTES = 16, 2**20

# What speculating on one parameter takes of the thread that computes: on a Xeon of 2 cores, 120 us.
BOOKKEEPING_US = 150.0

_STORE = "autopar.store"


def chunk_bytes(total_bytes: float) -> float:
    """Of the parameters in a chunk on the host.

    Args:
        total_bytes: of all parameters.
    """
    return min(CHUNK_BYTES, max(_LEAST_BYTES, total_bytes / _CHUNKS))


def host_step(
    program: Program, schedule: Schedule, states: StateBytes, tiers: Sequence[Tier], states_on: str,
    room: float,
) -> HostStep:  # fmt: skip
    """What the optimizer's step takes where the states are, and what of it follows the backward:
    all of it, where nothing beside the backward makes the step shorter.

    Args:
        room: bytes of the host for second versions.
    """
    us = states.step_us(tiers, states_on)
    beside_us, second = states.second_step_us(tiers, states_on), states.second_bytes(states_on)
    stored = _stored(program, schedule) if Resource.HOST in program.beside else []
    total = sum(nbytes for _, nbytes in stored)
    least = CHUNK_BYTES if states_on == NVME else chunk_bytes(total)
    end_us = step_us(program, schedule)
    free_us = stepped = gathered = 0.0
    for ready_us, nbytes in stored:
        gathered += nbytes
        if gathered < least and stepped + gathered < total:
            continue
        start_us = max(free_us, ready_us)
        if start_us >= end_us or second * (stepped + gathered) / total > room:
            break
        free_us = start_us + beside_us * gathered / total
        stepped, gathered = stepped + gathered, 0.0
    left = us * (1 - stepped / total) if total else us
    exposed_us = left + max(0.0, free_us - end_us) + BOOKKEEPING_US * len(stored)
    return HostStep(us, min(us, exposed_us))


def _stored(program: Program, schedule: Schedule) -> list[tuple[float, float]]:
    """When gradients are on the host, in microseconds, and their bytes."""
    sequence = schedule.forward + schedule.backward
    runs = run_times(program, sequence).runs
    stored: list[tuple[float, float]] = []
    for i, run in zip(sequence, runs, strict=True):
        store = program.started.get(i, i)  # that is split, if it is
        if program.ops[store].kind.startswith(_STORE):
            stored.append(
                (run.end, float(sum(program.nbytes[s] for s in program.ops[store].reads)))
            )
    return sorted(stored)


def room_bytes(
    program: Program, schedule: Schedule, states: StateBytes, tiers: Sequence[Tier], states_on: str
) -> float:
    """Of the host, beside states and what the schedule offloads."""
    host = tier_named(tiers, HOST)
    if host is None:
        return 0.0
    offloaded = sum(program.nbytes[s] for s in schedule.offloaded(program))
    return max(0.0, host.device_bytes - states.on_host(states_on) - offloaded)
