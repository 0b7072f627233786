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


def _narrow(x: torch.Tensor, dim: int, group: str) -> torch.Tensor:
    g = find_group(group)
    return x.narrow(dim, *chunk(x.shape[dim], g.size, g.index)).contiguous()


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
        ctx.args = dim, group
        return _OPS.all_gather(x, dim, size, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _narrow(grad, *ctx.args), None, None, None


class _AllGatherVary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
        ctx.args = dim, group
        return _OPS.all_gather(x, dim, size, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _OPS.reduce_scatter(grad, *ctx.args), None, None, None


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: str) -> torch.Tensor:
        ctx.args = dim, x.shape[dim], group
        return _narrow(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _OPS.all_gather(grad, *ctx.args), None, None


class _Vary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _OPS.all_reduce(grad, "sum", ctx.group), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        return _OPS.all_reduce(x, "sum", group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: str) -> torch.Tensor:
        ctx.args = dim, x.shape[dim], group
        return _OPS.reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _OPS.all_gather(grad, *ctx.args), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dim: int, size: int, to_dim: int, group: str
    ) -> torch.Tensor:
        ctx.args = to_dim, x.shape[to_dim], dim, group
        return _OPS.all_to_all(x, dim, size, to_dim, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _OPS.all_to_all(grad, *ctx.args), None, None, None, None


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        return x.clone() if find_group(group).index == 0 else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


def all_gather(x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    """S(dim) -> R; `size` is the extent of the dim on this rank when gathered."""
    return _AllGather.apply(x, dim, size, group)


def all_gather_vary(x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    """S(dim) -> V: all-gather whose backward is reduce-scatter."""
    return _AllGatherVary.apply(x, dim, size, group)


def slice_(x: torch.Tensor, dim: int, group: str) -> torch.Tensor:
    """R -> S(dim)."""
    return _Slice.apply(x, dim, group)


def vary(x: torch.Tensor, group: str) -> torch.Tensor:
    """R -> V: identity whose backward is all-reduce (Megatron's f)."""
    return _Vary.apply(x, group) if x.requires_grad else x


def all_reduce(x: torch.Tensor, group: str) -> torch.Tensor:
    """P -> R: all-reduce whose backward is the identity (Megatron's g)."""
    return _AllReduce.apply(x, group)


def reduce_scatter(x: torch.Tensor, dim: int, group: str) -> torch.Tensor:
    """P -> S(dim)."""
    return _ReduceScatter.apply(x, dim, group)


def all_to_all(x: torch.Tensor, dim: int, size: int, to_dim: int, group: str) -> torch.Tensor:
    """S(dim) -> S(to_dim); `size` is the extent of `dim` when gathered."""
    return _AllToAll.apply(x, dim, size, to_dim, group)


def inject(x: torch.Tensor, group: str) -> torch.Tensor:
    """R -> P: the first rank keeps the value, the others hold zero."""
    return _Inject.apply(x, group)


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
