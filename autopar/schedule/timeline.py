"""The predicted step as a value: what runs when, and what is alive meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from autopar.plan_records import ModuleMemory
from autopar.schedule.program import Resource


@dataclass(frozen=True)
class TimelineEvent:
    """An operator that runs.

    Args:
        module: path of its module; "" if that is not known.
        start_us, us: when it starts on its resource, and how long it takes.
        kept_bytes: alive meanwhile, saved by the forward for the backward.
        recomputed_bytes: alive meanwhile, recomputed.
        other_bytes: alive meanwhile, everything else: gradients, and values of the forward alone.
        evicted_bytes: of parameters that are on the host meanwhile.
        recomputed: it ran before.
        saves_bytes: that it makes and the forward saves for the backward.
        offloads_bytes: that it copies to the host.
        parameter: it moves a parameter.
        issued_us: when the program reaches it and allocates its results; before `start_us` if it
            waits.
    """

    name: str
    module: str
    start_us: float
    us: float
    kept_bytes: int
    recomputed_bytes: int
    other_bytes: int
    evicted_bytes: int = 0
    recomputed: bool = False
    saves_bytes: int = 0
    offloads_bytes: int = 0
    parameter: bool = False
    flops: float = 0.0
    resource: Resource = Resource.COMPUTE
    issued_us: float = 0.0

    @property
    def live_bytes(self) -> int:
        """Bytes alive, more than before the step."""
        return self.kept_bytes + self.recomputed_bytes + self.other_bytes - self.evicted_bytes


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
    waited_us: Mapping[Resource, float] = field(default_factory=dict)

    @cached_property
    def live_bytes(self) -> tuple[int, ...]:
        """Bytes alive at every position."""
        return tuple(event.live_bytes for event in self.events)

    @cached_property
    def peak_bytes(self) -> int:
        return max(self.live_bytes, default=0)

    @property
    def peak_at(self) -> int:
        """The first position at which the peak is reached."""
        return self.live_bytes.index(self.peak_bytes) if self.events else 0

    @cached_property
    def us(self) -> float:
        """Of the whole step, until all resources are done."""
        return max((event.start_us + event.us for event in self.events), default=0.0)

    def by_module(self) -> tuple[ModuleMemory, ...]:
        """What is kept, offloaded and recomputed, per block, in the order of the forward."""
        blocks: dict[str, list[TimelineEvent]] = {
            block_of(event.module): [] for event in self.events[: self.forward]
        }
        for event in self.events:
            if event.saves_bytes or event.offloads_bytes or event.recomputed:
                blocks.setdefault(block_of(event.module), []).append(event)
        return tuple(_module_memory(block, events) for block, events in blocks.items() if events)


def _module_memory(block: str, events: Iterable[TimelineEvent]) -> ModuleMemory:
    recomputed = [e for e in events if e.recomputed]
    repeated_collectives_us = sum(e.us for e in recomputed if e.resource is Resource.COMMUNICATION)
    return ModuleMemory(
        block,
        kept_bytes=sum(e.saves_bytes for e in events),
        offloaded_bytes=sum(e.offloads_bytes for e in events if not e.parameter),
        parameters_bytes=sum(e.offloads_bytes for e in events if e.parameter),
        recompute_us=sum(e.us for e in recomputed) - repeated_collectives_us,
        recompute_flops=sum(e.flops for e in recomputed),
        repeated_collectives_us=repeated_collectives_us,
    )


def block_of(module: str) -> str:
    """The path up to its first number: the modules of a block share it, blocks differ."""
    parts = module.split(".")
    numbers = [k for k, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else module
