"""Collectives of sharded graphs: operators, and the differentiable steps made of them.

The operators (`torch.ops.autopar.*`) are opaque to autograd and appear as single nodes in lowered
graphs. The steps are what `apply_sharding` writes into the forward graph; each is a linear map and
its backward is the transpose (the table in `autopar.sharding.conversion.converter`).

Uneven dims follow `torch.chunk`'s rule: parts are padded to the largest, and as only the last parts
are short, gathered parts concatenate to the dim followed by padding alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from autopar.comm.groups import Group, find_group
from autopar.ir.spec import chunk


def _pad(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    missing = size - x.shape[dim]
    if not missing:
        return x
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, missing])


def _stack_parts(x: torch.Tensor, dim: int, parts: int) -> torch.Tensor:
    """[.., n, ..] to [parts, ceil(n / parts), ...]: dim split into padded parts, moved in front."""
    step = -(-x.shape[dim] // parts)
    return _pad(x, dim, step * parts).movedim(dim, 0).unflatten(0, (parts, step))


def _join_parts(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """[parts, ceil, ...] to [.., size, ..]: the inverse."""
    return x.flatten(0, 1)[:size].movedim(0, dim).contiguous()


@torch.library.custom_op("autopar::all_gather", mutates_args=())
def all_gather(x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    """Concatenate the shards of `dim`, whose whole extent is `size`."""
    g = find_group(group)
    step = -(-size // g.size)
    shard = _pad(x, dim, step).movedim(dim, 0).contiguous()
    return _join_parts(g.all_gather(shard), dim, size)


@all_gather.register_fake
def _(x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    return x.new_empty([size if d == dim else n for d, n in enumerate(x.shape)])


@torch.library.custom_op("autopar::reduce_scatter", mutates_args=())
def reduce_scatter(x: torch.Tensor, dim: int, group: str) -> torch.Tensor:
    """Sum over the group, each rank keeping its part of `dim`."""
    g = find_group(group)
    _, length = chunk(x.shape[dim], g.size, g.index)
    mine = g.reduce_scatter(_stack_parts(x, dim, g.size).contiguous())
    return mine[:length].movedim(0, dim).contiguous()


@reduce_scatter.register_fake
def _(x: torch.Tensor, dim: int, group: str) -> torch.Tensor:
    g = find_group(group)
    _, length = chunk(x.shape[dim], g.size, g.index)
    return x.new_empty([length if d == dim else n for d, n in enumerate(x.shape)])


@torch.library.custom_op("autopar::all_reduce", mutates_args=())
def all_reduce(x: torch.Tensor, op: str, group: str) -> torch.Tensor:
    """Elementwise `op` ("sum" or "max") over the group."""
    return find_group(group).all_reduce(x, op)


@all_reduce.register_fake
def _(x: torch.Tensor, op: str, group: str) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("autopar::all_to_all", mutates_args=())
def all_to_all(
    x: torch.Tensor, gather_dim: int, gather_size: int, split_dim: int, group: str
) -> torch.Tensor:
    """Move a split from `gather_dim` (whole extent `gather_size`) to `split_dim`."""
    g = find_group(group)
    _, length = chunk(x.shape[split_dim], g.size, g.index)
    step = -(-gather_size // g.size)
    parts = _stack_parts(_pad(x, gather_dim, step), split_dim, g.size)
    # [parts, split, ...]: bring the gathered dim next to the parts, then concatenate over both
    inner = gather_dim if gather_dim > split_dim else gather_dim + 1
    got = g.all_to_all(parts.contiguous()).movedim(inner + 1, 1)
    joined = got.flatten(0, 1)[:gather_size]
    # now [gathered, split, rest...]
    joined = joined[:, :length]
    if gather_dim < split_dim:
        joined = joined.movedim(1, split_dim)
        return joined.movedim(0, gather_dim).contiguous()
    return joined.movedim(1, split_dim + 1).movedim(0, gather_dim).contiguous()


@all_to_all.register_fake
def _(
    x: torch.Tensor, gather_dim: int, gather_size: int, split_dim: int, group: str
) -> torch.Tensor:
    g = find_group(group)
    shape = list(x.shape)
    shape[gather_dim] = gather_size
    shape[split_dim] = chunk(x.shape[split_dim], g.size, g.index)[1]
    return x.new_empty(shape)


# -- several at once, in one message: what `passes/bucket.py` makes. Reductions return one row: what
# becomes of every operand, one behind the other, for the graph to take views of


@torch.library.custom_op("autopar::all_reduce_many", mutates_args=())
def all_reduce_many(xs: Sequence[torch.Tensor], op: str, group: str) -> torch.Tensor:
    """`all_reduce` of each, in a row."""
    return find_group(group).reduce_row(xs, op)


@all_reduce_many.register_fake
def _(xs: Sequence[torch.Tensor], op: str, group: str) -> torch.Tensor:
    return xs[0].new_empty(sum(x.numel() for x in xs))


@torch.library.custom_op("autopar::all_gather_many", mutates_args=())
def all_gather_many(
    xs: Sequence[torch.Tensor], dims: Sequence[int], sizes: Sequence[int], group: str
) -> list[torch.Tensor]:
    """`all_gather` of each, along a dim of its own."""
    g = find_group(group)
    shards = [
        _pad(x, dim, -(-size // g.size)).movedim(dim, 0)
        for x, dim, size in zip(xs, dims, sizes, strict=True)
    ]
    every = g.all_gather(torch.cat([shard.reshape(-1) for shard in shards]))
    parts = every.split([shard.numel() for shard in shards], 1)
    return [
        _join_parts(part.clone().view(g.size, *shard.shape), dim, size)
        for part, shard, dim, size in zip(parts, shards, dims, sizes, strict=True)
    ]


@all_gather_many.register_fake
def _(
    xs: Sequence[torch.Tensor], dims: Sequence[int], sizes: Sequence[int], group: str
) -> list[torch.Tensor]:
    return [
        x.new_empty([size if d == dim else n for d, n in enumerate(x.shape)])
        for x, dim, size in zip(xs, dims, sizes, strict=True)
    ]


@torch.library.custom_op("autopar::reduce_scatter_many", mutates_args=())
def reduce_scatter_many(
    xs: Sequence[torch.Tensor], dims: Sequence[int], group: str
) -> torch.Tensor:
    """`reduce_scatter` of each, along a dim of its own, in a row."""
    g = find_group(group)
    stacked = [_stack_parts(x, dim, g.size) for x, dim in zip(xs, dims, strict=True)]
    mine = g.reduce_scatter(torch.cat([s.reshape(g.size, -1) for s in stacked], 1))
    return kept_parts(mine, [x.shape for x in xs], dims, g)


@reduce_scatter_many.register_fake
def _(xs: Sequence[torch.Tensor], dims: Sequence[int], group: str) -> torch.Tensor:
    return xs[0].new_empty(kept_numel([x.shape for x in xs], dims, find_group(group)))


def kept_parts(
    row: torch.Tensor, shapes: Sequence[Sequence[int]], dims: Sequence[int], group: Group
) -> torch.Tensor:
    """A rank's parts of tensors of these shapes, in a row as `_stack_parts` lays them out, without
    padding and with the split dims in their places."""
    if not any(dims) and all(shape[0] % group.size == 0 for shape in shapes):
        return row
    found, begin = [], 0
    for shape, dim in zip(shapes, dims, strict=True):
        inner = (-(-shape[dim] // group.size), *shape[:dim], *shape[dim + 1 :])
        _, length = chunk(shape[dim], group.size, group.index)
        end = begin + math.prod(inner)
        part = row[begin:end].view(inner)[:length].movedim(0, dim)
        found.append(part.reshape(-1))
        begin = end
    return torch.cat(found)


def kept_numel(shapes: Sequence[Sequence[int]], dims: Sequence[int], group: Group) -> int:
    """Elements of what `kept_parts` returns."""
    lengths = [
        chunk(s[dim], group.size, group.index)[1] for s, dim in zip(shapes, dims, strict=True)
    ]
    rest = [
        math.prod(s[:dim]) * math.prod(s[dim + 1 :]) for s, dim in zip(shapes, dims, strict=True)
    ]
    return sum(n * m for n, m in zip(lengths, rest, strict=True))


def _narrow(x: torch.Tensor, dim: int, group: str) -> torch.Tensor:
    g = find_group(group)
    return x.narrow(dim, *chunk(x.shape[dim], g.size, g.index))


# -- differentiable steps -----------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
        ctx.args = dim, group
        return all_gather(x, dim, size, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        dim, group = ctx.args
        return _narrow(grad, dim, group).contiguous(), None, None, None


class _GatherVary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
        ctx.args = dim, group
        return all_gather(x, dim, size, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return reduce_scatter(grad, *ctx.args), None, None, None


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: str) -> torch.Tensor:
        ctx.args = dim, x.shape[dim], group
        return _narrow(x, dim, group).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return all_gather(grad, *ctx.args), None, None


class _Vary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return all_reduce(grad, "sum", ctx.group), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        return all_reduce(x, "sum", group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: str) -> torch.Tensor:
        ctx.args = dim, x.shape[dim], group
        return reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return all_gather(grad, *ctx.args), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dim: int, size: int, to_dim: int, group: str
    ) -> torch.Tensor:
        ctx.args = to_dim, x.shape[to_dim], dim, group
        return all_to_all(x, dim, size, to_dim, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return all_to_all(grad, *ctx.args), None, None, None, None


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        return x.clone() if find_group(group).index == 0 else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


def gather(x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    """S(dim) -> R; `size` is the extent of the dim on this rank when gathered."""
    return _Gather.apply(x, dim, size, group)


def gather_vary(x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    """S(dim) -> V: all-gather whose backward is reduce-scatter."""
    return _GatherVary.apply(x, dim, size, group)


def slice_(x: torch.Tensor, dim: int, group: str) -> torch.Tensor:
    """R -> S(dim)."""
    return _Slice.apply(x, dim, group)


def vary(x: torch.Tensor, group: str) -> torch.Tensor:
    """R -> V: identity whose backward is all-reduce (Megatron's f)."""
    return _Vary.apply(x, group) if x.requires_grad else x


def reduce(x: torch.Tensor, group: str) -> torch.Tensor:
    """P -> R: all-reduce whose backward is the identity (Megatron's g)."""
    return _AllReduce.apply(x, group)


def scatter_sum(x: torch.Tensor, dim: int, group: str) -> torch.Tensor:
    """P -> S(dim)."""
    return _ReduceScatter.apply(x, dim, group)


def exchange(x: torch.Tensor, dim: int, size: int, to_dim: int, group: str) -> torch.Tensor:
    """S(dim) -> S(to_dim); `size` is the extent of `dim` when gathered."""
    return _AllToAll.apply(x, dim, size, to_dim, group)


def inject(x: torch.Tensor, group: str) -> torch.Tensor:
    """R -> P: the first rank keeps the value, the others hold zero."""
    return _Inject.apply(x, group)
