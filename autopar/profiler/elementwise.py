"""What makes the elements of a kernel dearer than moving them, found without knowing the operator.

The kernel is taken apart into PyTorch's primitive operators, of which few are expensive: elementary
functions, random draws, reductions, look-ups. All other arithmetic hides behind memory. How the
operands lie in memory tells the rest: reads against the grain, and loops without vector
instructions.
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

# Primitive functions that cost many instructions an element. Roots and quotients are one each.
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

# More work than this per element of the largest operand is not believed.
_FOLD = 16

REDUCTIONS = frozenset(f"prims::{name}" for name in ("sum", "prod", "amax", "amin", "var"))


def expensive_elements(
    func: Any, args: Any, kwargs: Any, results: Sequence[torch.Tensor]
) -> dict[str, int]:
    """Elements by what makes them expensive, with the keys of `Device.extra_ns`.

    Args:
        func: the operator, with its arguments as they were dispatched.
        results: its tensors.
    """
    given = tensors_of((args, kwargs))
    # how often a table is looked up does not go with its size
    alone = not given or bool(indices_of(func, given))
    extra = (_taken_apart if alone else _in_proportion)(func, args, kwargs)
    if torch.Tag.reduction in func.tags:
        extra.pop("reduction", None)  # what is nothing else goes as fast as reading
    if not results:
        return extra
    if torch.Tag.pointwise in func.tags and _one_by_one(given, results[0]):
        extra["scalar"] = results[0].numel()
    if strided := sum(_distinct(t) for t in given if _strided(t, results[0])):
        extra["strided"] = strided
    return extra


def _in_proportion(func: Any, args: Any, kwargs: Any) -> dict[str, int]:
    """As `_taken_apart`, in proportion to the elements of another call that differs in them
    alone."""
    given = tensors_of((args, kwargs))
    size = max((t.numel() for t in given), default=0)
    described = pytree.tree_map_only(
        torch.Tensor, lambda t: (t.ndim, t.dtype, t.numel() == size), (args, kwargs)
    )
    key = f"{func} {described}"
    if key not in _PER_ELEMENT:
        found = _taken_apart(func, args, kwargs)
        _PER_ELEMENT[key] = {kind: n / max(1, size) for kind, n in found.items()}
    return {kind: round(n * size) for kind, n in _PER_ELEMENT[key].items()}


_PER_ELEMENT: dict[str, dict[str, float]] = {}


def _taken_apart(func: Any, args: Any, kwargs: Any) -> dict[str, int]:
    """How many elements are expensive, by what makes them so."""
    leaves = _Leaves()
    args, kwargs = pytree.tree_map_only(torch.Tensor, _on_meta, (args, kwargs))
    meta = torch.device("meta")
    args, kwargs = pytree.tree_map_only(torch.device, lambda _: meta, (args, kwargs))
    try:
        with leaves:
            func(*args, **kwargs)
    except Exception:  # a decomposition that fails is PyTorch's; the kernel counts as plain
        return {}
    # some are taken apart in ways that no kernel goes (a running sum: all pairs of elements)
    most = _FOLD * max((t.numel() for t in tensors_of((args, kwargs))), default=sys.maxsize)
    return {kind: min(n, most) for kind, n in leaves.counts.items()}


def _on_meta(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="meta")


class _Leaves(TorchDispatchMode):
    """Takes operators apart into primitive ones, and counts the elements of the expensive ones."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        seeded = torch.Tag.nondeterministic_seeded in func.tags
        apart = decomposition_table.get(func)
        if apart is None and func.namespace == "aten":
            apart = func.decompose
        if apart is not None and not seeded:
            with self:
                out = apart(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        name, results = func._schema.name, tensors_of(out)
        if seeded:
            self.counts["random"] += results[0].numel()
        elif name in FUNCTIONS and not (name == "prims::pow" and _whole_power(args[1])):
            self.counts["function"] += results[0].numel()
        elif name in REDUCTIONS:
            across = name == "prims::var" and not _trailing(args[1], args[0].ndim)
            self.counts["variance" if across else "reduction"] += args[0].numel()
        elif found := indices_of(func, tensors_of((args, kwargs))):
            self.counts["index"] += _lookups(args, found, results)
        return out


def _whole_power(exponent: Any) -> bool:
    """Squares and cubes are products."""
    return isinstance(exponent, int | float) and float(exponent).is_integer()


def _trailing(dims: Sequence[int] | None, ndim: int) -> bool:
    """Whether the dims are the innermost ones, which lie together."""
    return dims is None or sorted(d % ndim for d in dims) == list(range(ndim - len(dims), ndim))


def _integral(t: torch.Tensor) -> bool:
    return not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)


def indices_of(func: Any, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Operands that index another: whole numbers, in an operator that is not pointwise."""
    if torch.Tag.pointwise in func.tags or func._schema.name.startswith("prims::"):
        return []
    return [t for t in given[1:] if _integral(t)]


def _lookups(args: Any, found: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> int:
    """How many runs of adjacent elements are looked up."""
    table, where = args[0], args[1] if len(args) > 1 else None
    if isinstance(where, list | tuple):  # index, index_put: a tensor or None per dim
        last = max(i for i, t in enumerate(where) if t is not None)
        touched = args[2] if len(args) > 2 else results[0]
        run = int(np.prod(table.shape[last + 1 :], dtype=np.int64))
        return int(touched.numel() // max(1, run))
    return sum(t.numel() for t in found)


def _strided(t: torch.Tensor, result: torch.Tensor) -> bool:
    """Whether the operand is read against the grain: the result is adjacent along another dim.

    It must be about as large as the result; what is reduced or repeated is another matter.
    """
    if t.ndim != result.ndim or not result.numel() // 2 <= _distinct(t) <= result.numel():
        return False
    return _adjacent(t) != _adjacent(result)


def _one_by_one(given: Sequence[torch.Tensor], result: torch.Tensor) -> bool:
    """Whether a pointwise kernel has no vector instructions: results narrower than the operands,
    or operands repeated along the adjacent dim (all of them, or any of whole numbers and booleans).
    """
    if not given or result.numel() < 2:
        return False
    if all(t.element_size() > result.element_size() for t in given):
        return True
    dim = _adjacent(result) - result.ndim  # from the last, as shapes are matched
    repeated = [t.ndim < -dim or t.shape[dim] == 1 or not t.stride(dim) for t in given]
    return all(repeated) if result.is_floating_point() else any(repeated)


def _distinct(t: torch.Tensor) -> int:
    """Elements in memory, those that a broadcast repeats counted once."""
    return math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)


def _adjacent(t: torch.Tensor) -> int:
    """The dim along which the elements are nearest; dims without extent do not count."""
    dims = zip(t.shape, t.stride(), range(t.ndim), strict=True)
    return -min(((stride, -dim) for n, stride, dim in dims if n > 1 and stride), default=(0, 1))[1]
