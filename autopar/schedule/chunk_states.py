"""What the parameters of each module do over a step whose states are on the host.

A schedule is static, so the states that a manager of chunks would keep (PatrickStar,
arXiv:2108.05818; Gemini) are read off it.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Mapping

from autopar.schedule.live_ranges import live_ranges
from autopar.schedule.program import Program, Schedule
from autopar.schedule.streams import run_times

_FETCH, _STORE = "autopar.fetch", "autopar.store"


class ChunkState(enum.StrEnum):
    """Where a module's parameters are, and for what.

    FREE: on the host alone. COMPUTE: an operator reads them on the device. HOLD: on the device, for
    an operator of the same part of the step. HOLD_AFTER_FWD: kept from the forward for the
    backward. HOLD_AFTER_BWD: their gradients are on the device, and on their way to the host.
    """

    FREE = "FREE"
    COMPUTE = "COMPUTE"
    HOLD = "HOLD"
    HOLD_AFTER_FWD = "HOLD_AFTER_FWD"
    HOLD_AFTER_BWD = "HOLD_AFTER_BWD"


# If parameters of one module are in several states, the chunk is in the first of these.
_ORDER = (
    ChunkState.COMPUTE, ChunkState.HOLD, ChunkState.HOLD_AFTER_FWD, ChunkState.HOLD_AFTER_BWD,
    ChunkState.FREE,
)  # fmt: skip

Changes = tuple[tuple[float, ChunkState], ...]


def chunk_states(program: Program, schedule: Schedule) -> Mapping[str, Changes]:
    """By module, from when (microseconds) its parameters are in which state; none if no parameter
    is on the host between steps."""
    fetched = {s: op.module for op in program.ops if op.kind.startswith(_FETCH) for s in op.makes}
    if not fetched:
        return {}
    gradients = {s: op.module for op in program.ops if op.kind.startswith(_STORE) for s in op.reads}
    first, sequence = len(schedule.forward), schedule.forward + schedule.backward
    reads: dict[int, list[int]] = defaultdict(list)
    for at, i in enumerate(sequence):
        for s in program.ops[i].reads:
            reads[s].append(at)
    at_position: dict[str, list[set[ChunkState]]] = {
        module: [set() for _ in sequence] for module in fetched.values()
    }
    for s, start, end in live_ranges(program, schedule).each():
        if s in gradients and gradients[s] in at_position:
            for at in range(start, end + 1):
                at_position[gradients[s]][at].add(ChunkState.HOLD_AFTER_BWD)
        if s not in fetched:
            continue
        used = {at for at in reads[s] if start <= at <= end}
        last = max((at for at in used if at < first), default=first)
        for at in range(start, end + 1):
            kept = last < at < first or (at >= first and start < first and at not in used)
            state = ChunkState.HOLD_AFTER_FWD if kept else ChunkState.HOLD
            at_position[fetched[s]][at].add(ChunkState.COMPUTE if at in used else state)
    issued = [run.issued for run in run_times(program, sequence).runs]
    return {module: _changes(states, issued) for module, states in at_position.items()}


def _changes(at_position: list[set[ChunkState]], issued: list[float]) -> Changes:
    changes: list[tuple[float, ChunkState]] = []
    for states, us in zip(at_position, issued, strict=True):
        state = next((s for s in _ORDER if s in states), ChunkState.FREE)
        if not changes or changes[-1][1] != state:
            changes.append((us, state))
    return tuple(changes)


def chunk_table(chunks: Mapping[str, Changes]) -> str:
    """A line per module: its states in their order."""
    width = max(map(len, chunks), default=0)
    return "\n".join(
        f"{module.ljust(width)}  {' '.join(state for _, state in changes)}"
        for module, changes in chunks.items()
    )
