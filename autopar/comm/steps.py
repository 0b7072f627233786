"""Differentiable steps of sharded programs: what `apply_sharding` writes into a forward graph.

Each is a linear map, and its backward is the transpose (the table in
`autopar/sharding/conversion/converter.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from autopar.comm import collectives  # noqa: F401  (defines the operators)
from autopar.comm.groups import find_group
from autopar.ir.spec import chunk

_OPS = torch.ops.autopar
_Map = Callable[[torch.Tensor], torch.Tensor]


class _Linear(torch.autograd.Function):
    """A linear map, given with its transpose."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: _Map, transpose: _Map) -> torch.Tensor:
        ctx.transpose = transpose
        return forward(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.transpose(grad), None, None


def linear(x: torch.Tensor, forward: _Map, transpose: _Map) -> torch.Tensor:
    """A linear map of x whose gradient is the transpose of the result's."""
    return _Linear.apply(x, forward, transpose)


def _narrow(x: torch.Tensor, dim: int, group: str) -> torch.Tensor:
    g = find_group(group)
    return x.narrow(dim, *chunk(x.shape[dim], g.size, g.index)).contiguous()


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _in_dtype(dtype: torch.dtype | None, reduce: _Map) -> _Map:
    """A sum over ranks in a dtype, rounded once afterwards."""
    if dtype is None:
        return reduce
    return lambda g: reduce(g.to(dtype)).to(g.dtype)


def all_gather(x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    """S(dim) -> R; `size` is the extent of the dim on this rank when gathered."""
    return linear(
        x, lambda v: _OPS.all_gather(v, dim, size, group), lambda g: _narrow(g, dim, group)
    )


def all_gather_vary(
    x: torch.Tensor, dim: int, size: int, group: str, sum_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """S(dim) -> V: all-gather whose backward is reduce-scatter, in `sum_dtype` if given."""
    return linear(
        x,
        lambda v: _OPS.all_gather(v, dim, size, group),
        _in_dtype(sum_dtype, lambda g: _OPS.reduce_scatter(g, dim, group)),
    )


def slice_(x: torch.Tensor, dim: int, group: str) -> torch.Tensor:
    """R -> S(dim)."""
    size = x.shape[dim]
    return linear(
        x, lambda v: _narrow(v, dim, group), lambda g: _OPS.all_gather(g, dim, size, group)
    )


def vary(x: torch.Tensor, group: str, sum_dtype: torch.dtype | None = None) -> torch.Tensor:
    """R -> V: identity whose backward is all-reduce (Megatron's f), in `sum_dtype` if given."""
    if not x.requires_grad:
        return x
    return linear(
        x,
        lambda v: v.view_as(v),
        _in_dtype(sum_dtype, lambda g: _OPS.all_reduce(g, "sum", group)),
    )


def all_reduce(x: torch.Tensor, group: str) -> torch.Tensor:
    """P -> R: all-reduce whose backward is the identity (Megatron's g)."""
    return linear(x, lambda v: _OPS.all_reduce(v, "sum", group), _same)


def reduce_scatter(x: torch.Tensor, dim: int, group: str) -> torch.Tensor:
    """P -> S(dim)."""
    size = x.shape[dim]
    return linear(
        x,
        lambda v: _OPS.reduce_scatter(v, dim, group),
        lambda g: _OPS.all_gather(g, dim, size, group),
    )


def all_to_all(x: torch.Tensor, dim: int, size: int, to_dim: int, group: str) -> torch.Tensor:
    """S(dim) -> S(to_dim); `size` is the extent of `dim` when gathered."""
    to_size = x.shape[to_dim]
    return linear(
        x,
        lambda v: _OPS.all_to_all(v, dim, size, to_dim, group),
        lambda g: _OPS.all_to_all(g, to_dim, to_size, dim, group),
    )


def inject(x: torch.Tensor, group: str) -> torch.Tensor:
    """R -> P: the first rank keeps the value, the others hold zero."""
    first = find_group(group).index == 0
    return linear(x, torch.clone if first else torch.zeros_like, _same)


# Steps whose backward sums over ranks.
SUMMED = ("all_gather_vary", "vary")

# The steps, by the kind that a layout conversion gives them.
STEPS: dict[str, Callable[..., Any]] = {
    "all_gather": all_gather,
    "all_gather_vary": all_gather_vary,
    "slice": slice_,
    "vary": vary,
    "all_reduce": all_reduce,
    "reduce_scatter": reduce_scatter,
    "all_to_all": all_to_all,
    "inject": inject,
}
