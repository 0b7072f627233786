"""The predicted step as a value: what runs when, and what is alive meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from autopar.files import write_atomically
from autopar.plan import ModuleMemory
from autopar.schedule.program import Resource

_ROWS = {resource: {"pid": 0, "tid": row} for row, resource in enumerate(Resource)}


@dataclass(frozen=True)
class TimelineEvent:
    """An operator that runs.

    Args:
        name: of its node.
        module: path of the module that it belongs to; "" where that is not known.
        start_us, us: when it starts on its resource, and how long it takes.
        kept_bytes: alive meanwhile, handed from forward to backward.
        again_bytes: alive meanwhile, computed again.
        other_bytes: alive meanwhile, all else: gradients, and what does not leave the forward.
        away_bytes: of parameters that are on the host meanwhile.
        again: it ran before.
        keeps_bytes: that it makes and the forward hands to the backward.
        moves_bytes: that it brings to the host.
        parameter: what it moves is one.
        flops: of its own.
        resource: what it occupies.
        issued_us: when the program reaches it, and its memory is taken; before `start_us` where it
            waits.
    """

    name: str
    module: str
    start_us: float
    us: float
    kept_bytes: int
    again_bytes: int
    other_bytes: int
    away_bytes: int = 0
    again: bool = False
    keeps_bytes: int = 0
    moves_bytes: int = 0
    parameter: bool = False
    flops: float = 0.0
    resource: Resource = Resource.COMPUTE
    issued_us: float = 0.0

    @property
    def end_us(self) -> float:
        return self.start_us + self.us

    @property
    def live_bytes(self) -> int:
        """Alive, more than before the step."""
        return self.kept_bytes + self.again_bytes + self.other_bytes - self.away_bytes


@dataclass(frozen=True)
class Timeline:
    """A step.

    Args:
        events: its operators, as they run.
        forward: how many of them are the forward's.
        waited_us: by resource, how long compute waits for it.
    """

    events: tuple[TimelineEvent, ...]
    forward: int
    waited_us: tuple[tuple[Resource, float], ...] = ()

    @cached_property
    def during_bytes(self) -> tuple[int, ...]:
        """Alive at every moment."""
        return tuple(m.live_bytes for m in self.events)

    @cached_property
    def peak_bytes(self) -> int:
        return max(self.during_bytes, default=0)

    @property
    def peak_at(self) -> int:
        """The first position at which the peak is reached."""
        return self.during_bytes.index(self.peak_bytes) if self.events else 0

    @cached_property
    def us(self) -> float:
        """Of the whole step, until all resources are done."""
        return max((m.end_us for m in self.events), default=0.0)

    def busy_us(self, resource: Resource) -> float:
        """How long a resource is occupied."""
        return sum(m.us for m in self.events if m.resource is resource)

    def exposed_us(self, resource: Resource) -> float:
        """How much of a resource's time compute waits for: what it does not hide."""
        return dict(self.waited_us).get(resource, 0.0)

    def __str__(self) -> str:
        if not self.events:
            return "an empty step"
        at = self.peak_at
        phase = "forward" if at < self.forward else "backward"
        return f"{self.peak_bytes} bytes at {self.events[at].name} ({phase})"

    def by_module(self) -> tuple[ModuleMemory, ...]:
        """What is kept, moved and computed again, per block, in the order of the forward."""
        blocks = dict.fromkeys(block_of(m.module) for m in self.events[: self.forward])
        found: dict[str, list[TimelineEvent]] = {block: [] for block in blocks}
        for moment in self.events:
            if moment.keeps_bytes or moment.moves_bytes or moment.again:
                found.setdefault(block_of(moment.module), []).append(moment)
        return tuple(_summed(block, mine) for block, mine in found.items() if mine)

    def to_trace(self) -> dict[str, Any]:
        """As a Chrome trace, which Perfetto reads too: a row of operators per resource, and
        counters of the bytes alive. Operators that run again have a category of their own."""
        used = {m.resource for m in self.events} | {Resource.COMPUTE}
        return {"traceEvents": [*_names(used), *self._events()], "displayTimeUnit": "ms"}

    def save_trace(self, path: str | Path) -> None:
        """Write `to_trace` to a file; it opens in https://ui.perfetto.dev."""
        write_atomically(path, json.dumps(self.to_trace()) + "\n")

    def _events(self) -> Iterator[dict[str, Any]]:
        leave = any(moment.parameter for moment in self.events)
        for at, moment in enumerate(self.events):
            phase = "forward" if at < self.forward else "backward"
            yield _ROWS[moment.resource] | {
                "ph": "X",
                "name": moment.name,
                "cat": "again" if moment.again else phase,
                "ts": moment.start_us,
                "dur": moment.us,
                "args": {"module": moment.module, "live bytes": moment.live_bytes},
            }
            yield _counter("live bytes", moment.issued_us, {"bytes": moment.live_bytes})
            parts = {"kept": moment.kept_bytes, "computed again": moment.again_bytes}
            yield _counter(
                "live by origin", moment.issued_us, parts | {"other": moment.other_bytes}
            )
            if leave:
                away = {"bytes": moment.away_bytes}
                yield _counter("parameters on the host", moment.issued_us, away)
        yield _counter("live bytes", self.us, {"bytes": 0})


def _summed(block: str, events: Iterable[TimelineEvent]) -> ModuleMemory:
    again = [m for m in events if m.again]
    gathered = [m for m in again if m.resource is Resource.COMMUNICATION]
    return ModuleMemory(
        block,
        sum(m.keeps_bytes for m in events),
        sum(m.moves_bytes for m in events if not m.parameter),
        sum(m.moves_bytes for m in events if m.parameter),
        sum(m.us for m in again) - sum(m.us for m in gathered),
        sum(m.flops for m in again),
        sum(m.us for m in gathered),
    )


def block_of(module: str) -> str:
    """The path up to its first number: modules of a block are one, blocks are apart."""
    parts = module.split(".")
    numbers = [k for k, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else module


def _names(used: Iterable[Resource]) -> Iterable[dict[str, Any]]:
    yield _ROWS[Resource.COMPUTE] | {
        "ph": "M", "name": "process_name", "args": {"name": "predicted step"},
    }  # fmt: skip
    for resource in sorted(used, key=list(Resource).index):
        yield _ROWS[resource] | {
            "ph": "M", "name": "thread_name", "args": {"name": str(resource)},
        }  # fmt: skip


def _counter(name: str, at_us: float, values: dict[str, int]) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": 0, "ts": at_us, "args": values}
