"""Reductions over dims, and pooling."""

from __future__ import annotations

from collections.abc import Callable

from autopar.sharding import lowerings
from autopar.sharding.rule import OpRule, Row
from autopar.sharding.rules.call import Call

ROWS: dict[str, Row | tuple[Row, ...]] = {
    name: Row("*b [h] [w] -> *b [i] [j]")
    for name in (
        "aten.max_pool2d.default",
        "aten.avg_pool2d.default",
        "aten.adaptive_avg_pool2d.default",
        "aten._adaptive_avg_pool2d.default",
    )
}


def _reduced_dims(call: Call) -> set[int]:
    shape = call.inputs[0]
    assert shape is not None
    dim = call.arguments.get("dim")
    if dim is None or dim == []:
        return set(range(len(shape)))
    dims = dim if isinstance(dim, list | tuple) else [dim]
    return {d % len(shape) for d in dims if shape}


def _notation(call: Call, mark: str) -> str:
    """Reduced dims are named r0, r1, ...; `mark` is what a split of them needs."""
    shape = call.inputs[0]
    assert shape is not None
    reduced = _reduced_dims(call)
    names = [
        (f"[r{d}]" if mark == "[]" else f"r{d}{mark}") if d in reduced else f"d{d}"
        for d in range(len(shape))
    ]
    keep = call.arguments.get("keepdim", False)
    out = [
        f"[k{d}]" if d in reduced else f"d{d}"
        for d in range(len(shape))
        if keep or d not in reduced
    ]
    return " ".join(names) + " -> " + " ".join(out)


def _sum(call: Call) -> OpRule:
    return Row(_notation(call, ""), linear=((0,),)).bind(call.inputs, call.outputs)


def _mean(call: Call) -> OpRule:
    row = Row(_notation(call, "!"), linear=((0,),), lowering=lowerings.mean)
    return row.bind(call.inputs, call.outputs)


def _unsplit(call: Call) -> OpRule:
    return Row(_notation(call, "[]")).bind(call.inputs, call.outputs)


DERIVED: dict[str, Callable[[Call], OpRule | None]] = {
    "aten.sum.default": _sum,
    "aten.sum.dim_IntList": _sum,
    "aten.mean.dim": _mean,
    "aten.amax.default": _unsplit,
    "aten.amin.default": _unsplit,
    "aten.var.correction": _unsplit,
}
