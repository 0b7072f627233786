"""What an optimizer's step did, as a list of operators on values of global shape.

A `Recording` is a value: the planner reads it, and equal recordings share a program.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch

from autopar.optim.layout import Layout
from autopar.sharding.rules.pointwise import is_pointwise
from autopar.sharding.rules.registry import DERIVED, ROWS

_ATEN = torch.ops.aten


class Value(NamedTuple):
    """A tensor of the recording, described without its elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Ref:
    """The place of a value among arguments. There is one object per number, so that comparing and
    hashing go by identity."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"%{self.number}"


class Slot:
    """The place of a Python number, which may be another one in each step."""

    __slots__ = ("kind", "number")

    def __init__(self, number: int, kind: type) -> None:
        self.number, self.kind = number, kind

    def __repr__(self) -> str:
        return f"{self.kind.__name__}${self.number}"


class NumberOf:
    """The place of a Python number that is read off a value when the program runs."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"item(%{self.number})"


FORMULAS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv,
    "pow": operator.pow, "neg": operator.neg, "abs": operator.abs, "max": max, "min": min,
}  # fmt: skip


class Formula(NamedTuple):
    """The place of a Python number that is computed from others when the program runs.

    Args:
        name: of the function in `FORMULAS`.
        operands: places of numbers.
    """

    name: str
    operands: tuple[Any, ...]


@cache
def ref(number: int) -> Ref:
    """The place of a value."""
    return Ref(number)


@cache
def slot(number: int, kind: Any) -> Slot:
    """The place of a number."""
    return Slot(number, kind)


@cache
def number_of(number: int) -> NumberOf:
    """The place of a number that is read off a value."""
    return NumberOf(number)


class Call(NamedTuple):
    """One operator call.

    Args:
        op: the operator.
        args, kwargs: its arguments, with `Ref`, `Slot` and `NumberOf`; lists are tuples.
        results: numbers of the values that it makes; of an operator in place, none.
    """

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    results: tuple[int, ...]


@dataclass
class Recording:
    """The operators of a step, or of the part of it between two reads of a number.

    Args:
        values: all tensors.
        roots: per value the first one that shares its memory.
        inputs: numbers of the values that were there before, in the order of arguments.
        layouts: of the inputs.
        homes: per input the parameter that it belongs to, as an input; None if unknown.
        calls: in the order in which they were made.
        numbers: Python numbers, by the number of their slot.
        kinds: per value a number that equal values share.
    """

    values: list[Value] = field(default_factory=list)
    roots: list[int] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)
    homes: list[int | None] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    numbers: list[Any] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    _keys: list[Any] = field(default_factory=list)

    def add(self, value: Value) -> int:
        """A value, and its number; the caller adds its root."""
        self.values.append(value)
        self.kinds.append(_KINDS.setdefault(value, len(_KINDS)))
        return len(self.values) - 1

    def note(self, call: Call) -> None:
        """Add a call."""
        self.calls.append(call)
        self._keys.append((id(call.op), *call[1:]))  # hashing an operator takes longer

    def key(self) -> tuple[Any, ...]:
        """Equal for recordings of this process that differ in numbers and elements alone."""
        return (
            tuple(self._keys),
            tuple(self.inputs),
            tuple(self.layouts),
            tuple(self.kinds[i] for i in self.inputs),
            tuple(self.roots[i] for i in self.inputs),
            tuple(self.homes),
        )


# Values of this process, numbered: comparing numbers is faster.
_KINDS: dict[Value, int] = {}


class Traits(NamedTuple):
    """What is to be known of an operator.

    Args:
        pointwise: it treats each element by itself, and its numbers may change between steps.
        lists: it treats the tensors at each index of its lists by themselves.
        writes: positions of the arguments that it writes.
        view: its result shares the memory of its first argument.
        scalars: positions and names of arguments that are numbers.
        by_itself: it is not recorded.
        without_out: the operator that gives as a result what this one writes into `out`.
    """

    pointwise: bool
    lists: bool
    writes: tuple[int, ...]
    view: bool
    scalars: frozenset[int | str]
    by_itself: bool
    without_out: torch._ops.OpOverload | None


# On each element, though torch does not tag them so.
_POINTWISE = frozenset(
    "_to_copy clone copy copy_ zero zero_ fill fill_ zeros_like ones_like full_like empty_like "
    "masked_fill masked_fill_ lift_fresh nan_to_num_".split()
)
_LISTS_NOT_POINTWISE = frozenset({"_foreach_norm", "_foreach_max", "_foreach_powsum"})
_NEVER = frozenset(
    {"resize_", "set_", "equal", "is_nonzero", "nonzero", "masked_select", "unique2", "_unique2"}
)


_TRAITS: dict[int, Traits] = {}  # by identity: hashing an operator takes longer


def traits(op: torch._ops.OpOverload) -> Traits:
    """What is to be known of an operator."""
    found = _TRAITS.get(id(op))
    if found is None:
        found = _TRAITS[id(op)] = _traits(op)
    return found


def _traits(op: torch._ops.OpOverload) -> Traits:
    schema = op._schema
    name = schema.name.removeprefix("aten::")
    writes = [
        (i, a.kwarg_only)
        for i, a in enumerate(schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    view = any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)
    lists = name.startswith("_foreach_")
    pointwise = name not in _NEVER and (
        name in _POINTWISE
        or (lists and name not in _LISTS_NOT_POINTWISE)
        or ((torch.Tag.pointwise in op.tags or is_pointwise(op)) and not _has_row(op))
    )
    scalars = {
        key
        for i, a in enumerate(schema.arguments)
        if "number" in str(a.type) or str(a.type) == "Tensor"  # as which `x * 2` takes the 2
        for key in (i, a.name)
    }
    return Traits(
        pointwise,
        lists,
        tuple(i for i, _ in writes),
        view,
        frozenset(scalars if pointwise else ()),
        op.namespace != "aten"
        or not (schema.returns or writes)  # a check, as of `torch.linalg.inv`
        or name in _NEVER
        or name.startswith("_fused_")
        or any(by_keyword for _, by_keyword in writes)
        or torch.Tag.nondeterministic_seeded in op.tags
        or torch.Tag.inplace_view in op.tags
        or torch.Tag.dynamic_output_shape in op.tags,
        _without_out(op) if [by_keyword for _, by_keyword in writes] == [True] else None,
    )


def _has_row(op: torch._ops.OpOverload) -> bool:
    """Whether an operator is tagged as pointwise and has operands that are not (a weight per
    channel)."""
    return str(op) in ROWS or str(op) in DERIVED


def _without_out(op: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    if op.namespace != "aten" or op._schema.arguments[-1].name != "out":
        return None
    packet = getattr(_ATEN, op._schema.name.removeprefix("aten::"))
    name = op._overloadname.removesuffix("out").removesuffix("_") or "default"
    return getattr(packet, name) if name in packet.overloads() else None


def places(template: Any) -> Iterator[Any]:
    """The `Ref`s, `Slot`s and `NumberOf`s among arguments."""
    if isinstance(template, tuple):
        for item in template:
            yield from places(item)
    elif isinstance(template, Ref | Slot | NumberOf):
        yield template


def read_values(call: Call) -> Iterator[int]:
    """Numbers of the values among a call's arguments, those that it writes included."""
    for place in places((call.args, tuple(v for _, v in call.kwargs))):
        if not isinstance(place, Slot):
            yield place.number


def written_values(call: Call) -> list[int]:
    """Numbers of the values that a call writes."""
    written = (call.args[i] for i in traits(call.op).writes if i < len(call.args))
    return [place.number for value in written for place in places(value)]


def filled(template: Any, fill: Any) -> Any:
    """Arguments with what `fill` gives for each place; tuples become lists."""
    if isinstance(template, Formula):
        return FORMULAS[template.name](*filled(template.operands, fill))
    if isinstance(template, tuple):
        return [filled(item, fill) for item in template]
    if isinstance(template, Ref | Slot | NumberOf):
        return fill(template)
    return template


def bound(call: Call) -> dict[str, Any]:
    """Arguments by schema name."""
    names = (a.name for a in call.op._schema.arguments)
    return dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
