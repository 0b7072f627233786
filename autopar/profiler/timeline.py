"""Live bytes of a training step as a value: what is made and freed, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal, TypeAlias

from autopar.profiler.tape import Count, maximum

Phase: TypeAlias = Literal["forward", "backward"]


@dataclass(frozen=True)
class Change:
    """Bytes made (positive) or freed (negative) while a node runs."""

    node: str
    phase: Phase
    delta_bytes: Count


@dataclass(frozen=True)
class MemoryTimeline:
    """Live bytes of a training step.

    Args:
        changes: in the order of execution.
        saved_by: bytes kept for backward, by the node that keeps them first: distinct storages,
            parameters excluded; inputs and buffers included, though they were there before.
    """

    changes: tuple[Change, ...]
    saved_by: Mapping[str, Count]

    @property
    def saved_bytes(self) -> Count:
        """Distinct storages kept for backward."""
        return sum(self.saved_by.values())

    @cached_property
    def live_bytes(self) -> tuple[Count, ...]:
        """Alive after every change."""
        return tuple(accumulate(c.delta_bytes for c in self.changes))

    @cached_property
    def peak_bytes(self) -> Count:
        """The most that is alive at a time."""
        return maximum([0, *self.live_bytes])
