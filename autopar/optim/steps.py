"""Steps of a program of shards: what ranks hold, run and send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from autopar.optim.layout import Layout
from autopar.optim.recording import Value


class LocalShape(NamedTuple):
    """The place of a shape among arguments: that of a rank's part."""

    shape: tuple[int, ...]
    layout: Layout


@dataclass(frozen=True)
class Part:
    """What ranks hold of a value, in one layout.

    Args:
        value: what it is like as a whole.
        layout: in which ranks hold it.
        root: parts of the same root may share memory.
    """

    value: Value
    layout: Layout
    root: int


@dataclass
class Step:
    """One step of a program.

    Args:
        kind: "run" an operator; or one of the conversions: "slice" without communication, "sum"
            of all ranks' parts, "exchange" of parts between ranks.
        target: the operator.
        args, kwargs: as in a `Call`, with numbers of parts.
        reads, writes, makes: numbers of parts.
        lists: each index of the lists is by itself, for ranks that hold its parts.
        level: the number of rounds of communication that come before it.
    """

    kind: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    makes: tuple[int, ...]
    lists: bool = False
    level: int = 0

    @property
    def communicates(self) -> bool:
        return self.kind in ("sum", "exchange")

    def order(self) -> tuple[int, str]:
        """Sorts steps by levels, and the messages of a level behind its other steps, by kind."""
        return self.level, self.kind if self.communicates else ""


@dataclass(frozen=True)
class StepPlan:
    """A recording with layouts.

    Args:
        parts: what is held.
        inputs: numbers of the parts that are there before.
        steps: in an order that is right; those of one kind of communication and one level may be
            one message.
        outputs: numbers of the parts that are wanted.
        cost_us: a rough prediction of its time.
    """

    parts: Sequence[Part]
    inputs: Sequence[int]
    steps: Sequence[Step]
    outputs: Sequence[int]
    cost_us: float


def is_list(place: Any, count: int) -> bool:
    """Whether an argument has something for each of `count` tensors."""
    return type(place) is tuple and len(place) == count
