"""Finds the rule of a node: rows by name, pointwise ops by torch's tag, the rest from shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from autopar.sharding.rule import OpRule, Row
from autopar.sharding.rules import (
    attention,
    contraction,
    convolution,
    creation,
    embedding_loss,
    functions,
    indexing,
    movement,
    normalization,
    order,
    pointwise,
    reduction,
    view,
)
from autopar.sharding.rules.call import Call

_FAMILIES = (
    contraction, attention, convolution, normalization, pointwise, view, movement, reduction,
    indexing, order, embedding_loss, creation,
)  # fmt: skip


def _merged(tables: Iterator[Mapping]) -> dict:
    merged: dict = {}
    for table in tables:
        assert not merged.keys() & table.keys(), merged.keys() & table.keys()
        merged |= table
    return merged


# The rows of an op; the first that applies to a call holds.
ROWS: dict[str, tuple[Row, ...]] = {
    name: rows if isinstance(rows, tuple) else (rows,)
    for name, rows in _merged(getattr(f, "ROWS", {}) for f in _FAMILIES).items()
}

# Rules that follow from the arguments and shapes of the call rather than from a row.
DERIVED: dict[str, Callable[[Call], OpRule | None]] = _merged(
    getattr(f, "DERIVED", {}) for f in _FAMILIES
)


def has_rule(op: torch._ops.OpOverload) -> bool:
    """Whether the table covers the operator (it may still not cover a particular call)."""
    return str(op) in ROWS or str(op) in DERIVED or pointwise.is_pointwise(op)


def bind(call: Call) -> OpRule | None:
    """The rule of a call, or None where there is none: the op then runs replicated."""
    name = str(call.op)
    derived = DERIVED.get(name)
    if derived is not None:
        return derived(call)
    if name in ROWS:
        row = next((r for r in ROWS[name] if r.applies(call.arguments)), None)
        return None if row is None else row.bind(call.inputs, call.outputs)
    if call.op.namespace == functions.NAMESPACE:
        return functions.bind_function(call)
    if pointwise.is_pointwise(call.op):
        return pointwise.bind_pointwise(call)
    return None


def describe_missing(call: Call, where: str) -> str:
    """Message for an op without a rule."""
    shapes = ", ".join("-" if s is None else str(list(s)) for s in call.inputs)
    return (
        f"{call.op} on ({shapes}) has no sharding rule and runs replicated; at {where}. "
        "Add a row in autopar/sharding/rules (docs/rules.md)."
    )
