"""Live bytes of a training step, as a value."""

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
    """Bytes allocated (positive) or freed (negative) while a node runs."""

    node: str
    phase: Phase
    delta_bytes: Count


@dataclass(frozen=True)
class MemoryTimeline:
    """Live bytes of a training step.

    Args:
        changes: in the order of execution.
        saved_by: bytes saved for the backward, by the node that saves them first. Each storage
            counts once. Inputs and buffers count although they exist before; parameters do not.
    """

    changes: tuple[Change, ...]
    saved_by: Mapping[str, Count]

    @property
    def saved_bytes(self) -> Count:
        """Bytes saved for the backward."""
        return sum(self.saved_by.values())

    @cached_property
    def live_bytes(self) -> tuple[Count, ...]:
        """Live bytes after every change."""
        return tuple(accumulate(c.delta_bytes for c in self.changes))

    @cached_property
    def peak_bytes(self) -> Count:
        """The most live bytes at a time."""
        return maximum([0, *self.live_bytes])
