"""Collectives of sharded programs as single operators, with tensor dims and padding.

`torch.ops.autopar.*` are opaque to autograd and stand for one collective each while a program is
planned, bucketed and scheduled. Each is implemented by `torch.ops._c10d_functional` collectives and
`wait_tensor`. A late pass (`autopar.passes.functional_collectives`) writes these implementations
into the graphs that run.

A collective is also available in two halves, for compute to run between them
(`async_collectives.py`). The results are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autopar.comm.async_collectives import (
    finish_all_gather,
    finish_all_gather_many,
    finish_reduce_scatter_many,
    numbers_of,
    start_all_gather,
    start_all_gather_many,
    start_all_reduce,
    start_all_reduce_many,
    start_exchange,
    start_gather_rows,
    start_reduce_scatter_many,
)
from autopar.comm.functional import (
    gathered_rows,
    gathered_shape,
    gathers_rows,
    own_numel,
    pad,
    scattered_shape,
    stack_parts,
    start_exchanging,
    wait,
)
from autopar.comm.groups import find_group
from autopar.comm.operators import operator
from autopar.ir.spec import chunk

_C10D = torch.ops._c10d_functional


# -- one collective, one operator ---------------------------------------------------------------


@operator(
    lambda x, op, group: torch.empty_like(x, memory_format=torch.contiguous_format), inline=True
)
def all_reduce(x: torch.Tensor, op: str, group: str) -> torch.Tensor:
    """Elementwise `op` ("sum" or "max") over the group."""
    if x.dtype is torch.bool:  # backends do not add truth values
        return all_reduce(x.to(torch.uint8), op, group).to(torch.bool)
    return wait(start_all_reduce(x, op, group))


def _gathered(x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    return (
        gathered_rows(x, size, group)
        if gathers_rows(dim)
        else x.new_empty(gathered_shape(x, dim, size))
    )


@operator(_gathered, inline=True)
def all_gather(x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    """Concatenate the shards of `dim`, whose global size is `size`."""
    if gathers_rows(dim):
        return wait(start_gather_rows(x, dim, size, group))
    return finish_all_gather(start_all_gather(x, dim, size, group), dim, size)


@operator(lambda x, dim, group: x.new_empty(scattered_shape(x, dim, group)), inline=True)
def reduce_scatter(x: torch.Tensor, dim: int, group: str) -> torch.Tensor:
    """Sum over the group, each rank keeping its part of `dim`."""
    g = find_group(group)
    _, length = chunk(x.shape[dim], g.size, g.index)
    if x.dtype is torch.bool:
        return reduce_scatter(x.to(torch.uint8), dim, group).to(torch.bool)
    parts = stack_parts(x, dim, g.size).contiguous()  # unlike a start: x itself, if it can be
    if not parts.numel():
        return x.new_empty(scattered_shape(x, dim, group))
    own = wait(_C10D.reduce_scatter_tensor(parts.view(-1), "sum", g.size, g.name))
    return own.view(parts.shape[1:])[:length].movedim(0, dim).contiguous()


def _exchanged_shape(
    x: torch.Tensor, gather_dim: int, gather_size: int, split_dim: int, group: str
) -> torch.Tensor:
    shape = scattered_shape(x, split_dim, group)
    shape[gather_dim] = gather_size
    return x.new_empty(shape)


@operator(_exchanged_shape, inline=True)
def all_to_all(
    x: torch.Tensor, gather_dim: int, gather_size: int, split_dim: int, group: str
) -> torch.Tensor:
    """Move a split from `gather_dim` (global size `gather_size`) to `split_dim`."""
    g = find_group(group)
    _, length = chunk(x.shape[split_dim], g.size, g.index)
    padded = pad(x, gather_dim, -(-gather_size // g.size))
    parts = stack_parts(padded, split_dim, g.size).contiguous()
    sizes = [parts.numel() // g.size] * g.size
    received = parts
    if parts.numel():
        received = wait(start_exchanging(parts.view(-1), sizes, sizes, g))
    # [parts, split, ...]: bring the gathered dim next to the parts, then concatenate over both
    inner = gather_dim if gather_dim > split_dim else gather_dim + 1
    joined = received.view(parts.shape).movedim(inner + 1, 1).flatten(0, 1)[:gather_size]
    # now [gathered, split, rest...]
    joined = joined[:, :length]
    if gather_dim < split_dim:
        return joined.movedim(1, split_dim).movedim(0, gather_dim).contiguous()
    return joined.movedim(1, split_dim + 1).movedim(0, gather_dim).contiguous()


@operator(lambda row, sent, received, group: row.new_empty(sum(received)), inline=True)
def exchange(
    row: torch.Tensor, sent: Sequence[int], received: Sequence[int], group: str
) -> torch.Tensor:
    """Send parts of a row to the ranks of a group, and receive parts of theirs.

    Args:
        row: [elements], the part for rank 0 first.
        sent, received: elements for, and from, each rank; 0 where nothing is sent.

    Returns:
        [elements], the part from rank 0 first.
    """
    return wait(start_exchange(row, sent, received, group))


# -- several collectives in one message (`passes/bucket.py`) ------------------------------------
#
# Reductions return one row, all results one behind the other, for the graph to take views of.


@operator(lambda xs, op, group: xs[0].new_empty(sum(x.numel() for x in xs)), inline=True)
def all_reduce_many(xs: Sequence[torch.Tensor], op: str, group: str) -> torch.Tensor:
    """`all_reduce` of each, in a row."""
    if xs[0].dtype is torch.bool:
        return all_reduce_many([x.to(torch.uint8) for x in xs], op, group).to(torch.bool)
    return wait(start_all_reduce_many(xs, op, group))


def _gathered_shapes(
    xs: Sequence[torch.Tensor], dims: Sequence[int], sizes: Sequence[int], group: str
) -> list[torch.Tensor]:
    return [
        x.new_empty(gathered_shape(x, dim, size))
        for x, dim, size in zip(xs, dims, sizes, strict=True)
    ]


@operator(_gathered_shapes, inline=True)
def all_gather_many(
    xs: Sequence[torch.Tensor], dims: Sequence[int], sizes: Sequence[int], group: str
) -> list[torch.Tensor]:
    """`all_gather` of each, along a dim of its own."""
    shapes = [gathered_shape(x, dim, size) for x, dim, size in zip(xs, dims, sizes, strict=True)]
    rows = start_all_gather_many(xs, dims, sizes, group)
    return finish_all_gather_many(rows, dims, *numbers_of(shapes))


@operator(
    lambda xs, dims, group: xs[0].new_empty(
        own_numel([x.shape for x in xs], dims, find_group(group))
    ),
    inline=True,
)
def reduce_scatter_many(
    xs: Sequence[torch.Tensor], dims: Sequence[int], group: str
) -> torch.Tensor:
    """`reduce_scatter` of each, along a dim of its own, in a row."""
    row = start_reduce_scatter_many(xs, dims, group)
    return finish_reduce_scatter_many(row, dims, *numbers_of([x.shape for x in xs]), group)
