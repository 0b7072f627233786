"""Expensive elementwise work of kernels, found without a table of operators.

A kernel is decomposed into PyTorch's primitive operators. Few of them are expensive: elementary
functions, random draws, reductions, look-ups. All other arithmetic hides behind memory. Strides of
the operands show two more costs: strided reads, and loops without vector instructions.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch._decomp import decomposition_table
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.ir.aliasing import tensors_of

# Primitive functions with many instructions per element. Roots and quotients are one each.
FUNCTIONS = frozenset(
    f"prims::{name}"
    for name in (
        *("exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "pow"),
        *("sin", "cos", "tan", "sinh", "cosh", "tanh"),
        *("asin", "acos", "atan", "atan2", "asinh", "acosh", "atanh"),
        *("erf", "erfc", "erf_inv", "erfcx", "ndtri", "lgamma", "digamma", "zeta"),
        *("bessel_i0", "bessel_i0e", "bessel_i1", "bessel_i1e", "bessel_j0", "bessel_j1"),
    )
)

# Upper bound of the work per element of the largest operand.
_MAX_PER_ELEMENT = 16

REDUCTIONS = frozenset(f"prims::{name}" for name in ("sum", "prod", "amax", "amin", "var"))


def expensive_elements(
    func: Any, args: Any, kwargs: Any, results: Sequence[torch.Tensor]
) -> dict[str, int]:
    """Number of expensive elements by kind of work, with the keys of `Device.extra_ns`.

    Args:
        func, args, kwargs: the operator call, as dispatched.
        results: its tensors.
    """
    inputs = tensors_of((args, kwargs))
    # the number of look-ups does not follow from the size of the table
    single = not inputs or bool(indices_of(func, inputs))
    extra = (_decomposed if single else _scaled)(func, args, kwargs)
    if torch.Tag.reduction in func.tags:
        extra.pop("reduction", None)  # a plain reduction is as fast as reading
    if not results:
        return extra
    if torch.Tag.pointwise in func.tags and _scalar_loop(inputs, results[0]):
        extra["scalar"] = results[0].numel()
    if strided := sum(_distinct(t) for t in inputs if _strided(t, results[0])):
        extra["strided"] = strided
    return extra


def _scaled(func: Any, args: Any, kwargs: Any) -> dict[str, int]:
    """As `_decomposed`, scaled from another call that differs only in the number of elements."""
    inputs = tensors_of((args, kwargs))
    size = max((t.numel() for t in inputs), default=0)
    described = pytree.tree_map_only(
        torch.Tensor, lambda t: (t.ndim, t.dtype, t.numel() == size), (args, kwargs)
    )
    key = f"{func} {described}"
    if key not in _PER_ELEMENT:
        counts = _decomposed(func, args, kwargs)
        _PER_ELEMENT[key] = {kind: n / max(1, size) for kind, n in counts.items()}
    return {kind: round(n * size) for kind, n in _PER_ELEMENT[key].items()}


_PER_ELEMENT: dict[str, dict[str, float]] = {}


def _decomposed(func: Any, args: Any, kwargs: Any) -> dict[str, int]:
    """Number of expensive elements by kind of work, from the decomposed call."""
    primitives = _PrimitiveCounter()
    args, kwargs = pytree.tree_map_only(torch.Tensor, _on_meta, (args, kwargs))
    meta = torch.device("meta")
    args, kwargs = pytree.tree_map_only(torch.device, lambda _: meta, (args, kwargs))
    try:
        with primitives:
            func(*args, **kwargs)
    except Exception:  # without a decomposition the kernel counts as cheap
        return {}
    # some decompositions do more work than any kernel (a running sum: all pairs of elements)
    largest = max((t.numel() for t in tensors_of((args, kwargs))), default=sys.maxsize)
    limit = _MAX_PER_ELEMENT * largest
    return {kind: min(n, limit) for kind, n in primitives.counts.items()}


def _on_meta(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="meta")


class _PrimitiveCounter(TorchDispatchMode):
    """Decomposes operators into primitive ones, and counts the elements of the expensive ones."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        seeded = torch.Tag.nondeterministic_seeded in func.tags
        decompose = decomposition_table.get(func)
        if decompose is None and func.namespace == "aten":
            decompose = func.decompose
        if decompose is not None and not seeded:
            with self:
                out = decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        name, results = func._schema.name, tensors_of(out)
        if seeded:
            self.counts["random"] += results[0].numel()
        elif name in FUNCTIONS and not (name == "prims::pow" and _integer_power(args[1])):
            self.counts["function"] += results[0].numel()
        elif name in REDUCTIONS:
            across = name == "prims::var" and not _trailing(args[1], args[0].ndim)
            self.counts["variance" if across else "reduction"] += args[0].numel()
        elif indices := indices_of(func, tensors_of((args, kwargs))):
            self.counts["index"] += _lookups(args, indices, results)
        return out


def _integer_power(exponent: Any) -> bool:
    """Such as squares and cubes, which are products."""
    return isinstance(exponent, int | float) and float(exponent).is_integer()


def _trailing(dims: Sequence[int] | None, ndim: int) -> bool:
    """Whether the dims are the innermost ones, which are adjacent in memory."""
    return dims is None or sorted(d % ndim for d in dims) == list(range(ndim - len(dims), ndim))


def _is_integer(t: torch.Tensor) -> bool:
    return not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)


def indices_of(func: Any, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Operands that index another one: integers, in an operator that is not pointwise."""
    if torch.Tag.pointwise in func.tags or func._schema.name.startswith("prims::"):
        return []
    return [t for t in inputs[1:] if _is_integer(t)]


def _lookups(args: Any, indices: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> int:
    """Number of runs of adjacent elements that are looked up."""
    table, where = args[0], args[1] if len(args) > 1 else None
    if isinstance(where, list | tuple):  # index, index_put: a tensor or None per dim
        last = max(i for i, t in enumerate(where) if t is not None)
        touched = args[2] if len(args) > 2 else results[0]
        run = int(np.prod(table.shape[last + 1 :], dtype=np.int64))
        return int(touched.numel() // max(1, run))
    return sum(t.numel() for t in indices)


def _strided(t: torch.Tensor, result: torch.Tensor) -> bool:
    """Whether reading the operand is strided: the result is adjacent along another dim.

    The operand must be about as large as the result. Reduced and repeated operands do not count.
    """
    if t.ndim != result.ndim or not result.numel() // 2 <= _distinct(t) <= result.numel():
        return False
    return _adjacent(t) != _adjacent(result)


def _scalar_loop(inputs: Sequence[torch.Tensor], result: torch.Tensor) -> bool:
    """Whether a pointwise kernel has no vector instructions.

    Its result is narrower than the operands, or operands are repeated along the adjacent dim (all
    of them, or any of integers and booleans).
    """
    if not inputs or result.numel() < 2:
        return False
    if all(t.element_size() > result.element_size() for t in inputs):
        return True
    dim = _adjacent(result) - result.ndim  # from the last, as shapes are matched
    repeated = [t.ndim < -dim or t.shape[dim] == 1 or not t.stride(dim) for t in inputs]
    return all(repeated) if result.is_floating_point() else any(repeated)


def _distinct(t: torch.Tensor) -> int:
    """Number of elements in memory; those that a broadcast repeats count once."""
    return math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)


def _adjacent(t: torch.Tensor) -> int:
    """The dim along which elements are nearest in memory. Dims of size 1 do not count."""
    dims = zip(t.shape, t.stride(), range(t.ndim), strict=True)
    return -min(((stride, -dim) for n, stride, dim in dims if n > 1 and stride), default=(0, 1))[1]
