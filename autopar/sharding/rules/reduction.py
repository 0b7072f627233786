"""Reductions over dims."""

from __future__ import annotations

from collections.abc import Callable

from autopar.sharding.lowerings import extremes, norms
from autopar.sharding.rule import OpRule
from autopar.sharding.rules.call import Call


def _reduced_dims(call: Call) -> set[int]:
    shape = call.operand(0)
    dim = call.arguments.get("dim")
    if dim is None or dim == []:
        return set(range(len(shape)))
    dims = dim if isinstance(dim, list | tuple) else [dim]
    return {d % len(shape) for d in dims if shape}


def _notation(call: Call, split: str) -> str:
    """Reduced dims are named r0, r1, ...

    Args:
        split: what a split of them needs, as a word of the notation; "[]" for no split.
    """
    shape = call.operand(0)
    reduced = _reduced_dims(call)
    names = [
        (f"[r{d}]" if split == "[]" else f"r{d}{split}") if d in reduced else f"d{d}"
        for d in range(len(shape))
    ]
    keep = call.arguments.get("keepdim", False)
    out = " ".join(
        f"[k{d}]" if d in reduced else f"d{d}"
        for d in range(len(shape))
        if keep or d not in reduced
    )
    return " ".join(names) + " -> " + ", ".join([out] * len(call.outputs))


def _reduces(
    word: str, lowering: Callable | None = None, *, linear: bool = False
) -> Callable[[Call], OpRule]:
    """A rule whose reduced dims need `word`, see `_notation`."""

    def bind(call: Call) -> OpRule:
        return call.bind(_notation(call, word), ((0,),) if linear else (), lowering)

    return bind


_sum, _unsplit = _reduces("", linear=True), _reduces("[]")


def _norm(call: Call) -> OpRule:
    """Of absolute values, a sum; of squares, the root of one."""
    order = call.arguments.get("ord", call.arguments.get("p", 2))
    if order not in (1, 2, None):
        return _unsplit(call)
    return call.bind(_notation(call, "" if order == 1 else ":complete"), lowering=norms.vector_norm)


def _over_ranks(lowering: Callable) -> Callable[[Call], OpRule]:
    """The ranks' results are reduced by the op itself."""
    return _reduces(":complete", lowering)


DERIVED: dict[str, Callable[[Call], OpRule | None]] = {
    "aten.sum.default": _sum,
    "aten.sum.dim_IntList": _sum,
    "aten.mean.default": _reduces(":lowered", norms.mean_of_all, linear=True),
    "aten.mean.dim": _reduces(":lowered", norms.mean, linear=True),
    "aten.linalg_vector_norm.default": _norm,
    "aten.norm.ScalarOpt_dim": _norm,
    "aten.amax.default": _over_ranks(extremes.amax),
    "aten.amin.default": _over_ranks(extremes.amin),
    "aten.max.default": _over_ranks(extremes.amax),
    "aten.min.default": _over_ranks(extremes.amin),
    **{f"aten.any.{o}": _over_ranks(extremes.any_of) for o in ("default", "dim", "dims")},
    **{f"aten.all.{o}": _over_ranks(extremes.all_of) for o in ("default", "dim", "dims")},
    **{
        f"aten.{name}": _unsplit
        for name in (
            "var.correction var.dim std.correction std.dim var_mean.correction max.dim min.dim "
            "argmax.default argmin.default logsumexp.default prod.default prod.dim_int median.dim "
            "linalg_norm.default"
        ).split()
    },
}
