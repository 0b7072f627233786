"""Sorting, searching and scans along one dim: over all the others."""

from __future__ import annotations

from collections.abc import Callable

from autopar.sharding.rule import OpRule, Row
from autopar.sharding.rules.call import Call


def _along(call: Call) -> OpRule:
    """One dim is not split; results keep the others (the extent along it may differ)."""
    return call.bind(_notation(call, -1))


def _scan(call: Call) -> OpRule:
    """As `_along`, of an op that is linear."""
    return call.bind(_notation(call, 0), linear=((0,),))


def _diff(call: Call) -> OpRule | None:
    """None if other tensors are joined to the operand."""
    if sum(s is not None for s in call.inputs) > 1:
        return None
    return call.bind(_notation(call, -1), linear=((0,),))


def _notation(call: Call, default: int) -> str:
    shape = call.operand(0)
    dim = call.arguments.get("dim", call.arguments.get("axis", default))
    unsplit = dim % max(len(shape), 1)
    names = [f"d{d}" for d in range(len(shape))]

    def pattern(name: str) -> str:
        return " ".join(f"[{name}]" if d == unsplit else n for d, n in enumerate(names))

    return f"{pattern('x')} -> " + ", ".join([pattern("y")] * len(call.outputs))


ROWS: dict[str, Row | tuple[Row, ...]] = {
    "aten.bucketize.Tensor": Row("*d, [x] -> *d"),
    "aten.searchsorted.Tensor": (
        Row("[x], *d -> *d", when=lambda a: len(a["sorted_sequence"]) == 1),
        Row("*d [x], *d y -> *d y"),
    ),
    "aten.histc.default": (
        Row("*d -> [b]", when=lambda a: a.get("min", 0) != a.get("max", 0)),
        Row("... -> [b]"),  # the range is that of all values
    ),
    "aten.nonzero_static.default": Row("... -> [n] [d]"),
}

DERIVED: dict[str, Callable[[Call], OpRule | None]] = {
    **{
        f"aten.{name}": _along
        for name in (
            "topk.default sort.default sort.stable argsort.default argsort.stable cummax.default "
            "cummin.default cumprod.default logcumsumexp.default glu.default"
        ).split()
    },
    "aten.cumsum.default": _scan,
    "aten.diff.default": _diff,
}
