"""Finds the rule of a node: rows by name, pointwise ops by torch's tag, views from their shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from autopar.sharding.rule import OpRule, Row
from autopar.sharding.rules import contraction, embedding_loss, normalization, reduction, view
from autopar.sharding.rules.call import Call
from autopar.sharding.rules.pointwise import bind_pointwise

ROWS: dict[str, Row | tuple[Row, ...]] = {
    **contraction.ROWS,
    **normalization.ROWS,
    **reduction.ROWS,
    **embedding_loss.ROWS,
}

# Rules that follow from the shapes of the call rather than from a row.
DERIVED: dict[str, Callable[[Call], OpRule | None]] = {**view.DERIVED, **reduction.DERIVED}


@cache
def _is_pointwise(op: torch._ops.OpOverload) -> bool:
    return torch.Tag.pointwise in op.tags


def has_rule(op: torch._ops.OpOverload) -> bool:
    """Whether the table covers the operator (it may still not cover a particular call)."""
    return str(op) in ROWS or str(op) in DERIVED or _is_pointwise(op)


def bind(call: Call) -> OpRule | None:
    """The rule of a call, or None where there is none: the op then runs replicated."""
    name = str(call.op)
    derived = DERIVED.get(name)
    if derived is not None:
        return derived(call)
    rows = ROWS.get(name)
    if rows is not None:
        for row in rows if isinstance(rows, tuple) else (rows,):
            if row.when is None or row.when(call.arguments):
                return row.bind(call.inputs, call.outputs)
        return None
    if _is_pointwise(call.op):
        return bind_pointwise(name, call.inputs, call.outputs)
    return None


def describe_missing(call: Call, where: str) -> str:
    """Message for an op without a rule."""
    shapes = ", ".join("-" if s is None else str(list(s)) for s in call.inputs)
    return (
        f"{call.op} on ({shapes}) has no sharding rule and runs replicated; at {where}. "
        "Add a row in autopar/sharding/rules (docs/architecture.md, 'a new op')."
    )
