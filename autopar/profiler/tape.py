"""The memory of one operator call, and of a training step, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

import sympy

# a number, or an expression in the symbols of a dynamic graph
Count: TypeAlias = Any

Strides: TypeAlias = tuple[Any, ...]

OWN = "own"
OPERAND = "operand"
GRADIENT = "gradient"


class Storage(NamedTuple):
    """A storage as one operator call sees it.

    Args:
        owner: "own" if the call makes it, else "operand", or "gradient" (of a result).
        number: index among the call's own storages, its operands or its results.
    """

    owner: str
    number: int


class Event(NamedTuple):
    """One change.

    Args:
        kind: an own storage is made or freed; autograd releases a saved tensor; the gradient of a
            result is spent (freed); the gradient of an operand is emitted.
        number: index in `Tape.sizes`, `Tape.saved`, the results, or `Tape.emitted`.
    """

    kind: Literal["make", "free", "release", "spend", "emit"]
    number: int


class Emission(NamedTuple):
    """The gradient of an operand.

    Args:
        operand: index of the operand.
        storage: the gradient's storage.
        tensor: equal for operands that get the same tensor; `~k` is the gradient of result k,
            passed on unchanged.
        view: the gradient is a view, which holds the tensor that it views.
        strides: of the gradient.
    """

    operand: int
    storage: Storage
    tensor: int
    view: bool
    strides: Strides


@dataclass(frozen=True)
class Tape:
    """The storages of one operator call, forward and backward.

    Args:
        sizes: bytes of its own storages.
        forward: events.
        results: the storage of every result.
        saved: the storage of every tensor that autograd saves for the backward.
        backward: events; none if no gradient comes in.
        emitted: gradients of operands, in the order of their events.
        overwrites: pairs of own storages: a result, and an operand in whose place it fits.
    """

    sizes: tuple[Count, ...] = ()
    forward: tuple[Event, ...] = ()
    results: tuple[Storage, ...] = ()
    saved: tuple[Storage, ...] = ()
    backward: tuple[Event, ...] = ()
    emitted: tuple[Emission, ...] = ()
    overwrites: tuple[tuple[int, int], ...] = ()

    @cached_property
    def saved_operands(self) -> tuple[int, ...]:
        """Operands whose storage is saved."""
        return tuple(sorted({s.number for s in self.saved if s.owner == OPERAND}))

    @cached_property
    def saved_results(self) -> tuple[int, ...]:
        """Results whose storage is saved and is not an operand's; each storage once."""
        first = {s: k for k, s in reversed(list(enumerate(self.results)))}
        return tuple(sorted({first[s] for s in self.saved if s.owner == OWN and s in first}))

    @cached_property
    def saved_own_bytes(self) -> Count:
        """Bytes of saved storages that are neither operands nor results."""
        numbers = {s.number for s in self.saved if s.owner == OWN and s not in self.results}
        return sum(self.sizes[i] for i in sorted(numbers))

    def levels(self, events: tuple[Event, ...], *, overwriting: bool = False) -> list[Count]:
        """Own live bytes before and after every allocation of `forward` or `backward`.

        Args:
            overwriting: results are written over operands that die with them.
        """
        signs = {"make": 1, "free": -1}
        changes = [e for e in events if e.kind in signs]
        for k, (event, after) in enumerate(pairwise(tuple(changes)) if overwriting else ()):
            over = (event.number, after.number) in self.overwrites
            if over and event.kind == "make" and after.kind == "free":
                changes[k : k + 2] = after, event
        return list(accumulate((signs[e.kind] * self.sizes[e.number] for e in changes), initial=0))

    def in_place(self) -> Tape:
        """The same call written over its first operand, if eager PyTorch could do that.

        If the backward needs the operand's old value, eager PyTorch keeps a copy. That takes as
        much memory as the call out of place.
        """
        old, new = self.results[0], Storage(OPERAND, 0)
        if old.owner != OWN or new in self.saved:
            return self

        def moved(s: Storage) -> Storage:
            return new if s == old else s

        return replace(
            self,
            forward=tuple(e for e in self.forward if e != Event("make", old.number)),
            results=tuple(map(moved, self.results)),
            saved=tuple(map(moved, self.saved)),
            emitted=tuple(e._replace(storage=moved(e.storage)) for e in self.emitted),
        )


def maximum(values: Sequence[Count]) -> Count:
    """The largest value. Of expressions, all those that no other one exceeds for all sizes."""
    if not any(isinstance(v, sympy.Expr) for v in values):
        return max(values)
    maximal: dict[sympy.Expr, Mapping[sympy.Expr, Any]] = {}
    for value in dict.fromkeys(map(sympy.expand, values)):
        terms = _above_one(value)
        if not any(_never_less(other, terms) for other in maximal.values()):
            maximal = {v: t for v, t in maximal.items() if not _never_less(terms, t)}
            maximal[value] = terms
    return sympy.Max(*maximal, evaluate=False) if len(maximal) > 1 else next(iter(maximal))


def _above_one(value: sympy.Expr) -> Mapping[sympy.Expr, Any]:
    """Coefficients of a formula in (size - 1) of each size."""
    shifted = value.xreplace({s: s + 1 for s in value.free_symbols})
    return sympy.expand(shifted).as_coefficients_dict()


def _never_less(a: Mapping[sympy.Expr, Any], b: Mapping[sympy.Expr, Any]) -> bool:
    """No coefficient is smaller, so a >= b for all sizes."""
    return all(a.get(term, 0) >= b.get(term, 0) for term in {*a, *b})


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
