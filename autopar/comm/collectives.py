"""Collectives of sharded programs as single operators, with tensor dims and padding.

`torch.ops.autopar.*` are opaque to autograd and stand for one collective each while a program is
planned, bucketed and scheduled. Each is implemented by `torch.ops._c10d_functional` collectives and
`wait_tensor`. The last pass (`autopar.passes.functional_collectives`) writes these implementations
into the graphs that run.

A collective is also available in two halves, for compute to run between them: a start returns a
buffer that must not be read before its finish. The results are the same to the bit.

Uneven dims follow the rule of `torch.chunk`: parts are padded to the largest. Only the last parts
are short, so gathered parts concatenate to the dim followed by padding alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed._functional_collectives
import torch.nn.functional as F

from autopar.comm.groups import Group, find_group
from autopar.ir.spec import chunk

_C10D = torch.ops._c10d_functional

# An operator's implementation by functional collectives.
IMPLEMENTATIONS: dict[torch._ops.OpOverload, Callable[..., Any]] = {}

# Whether halves communicate in their buffer, which saves a copy, or in new tensors, which
# Inductor's graphs need.
_in_place = True


@contextmanager
def out_of_place() -> Any:
    """Implementations that mutate nothing."""
    global _in_place
    before, _in_place = _in_place, False
    try:
        yield
    finally:
        _in_place = before


def operator(
    shapes: Callable[..., Any], mutates: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as `torch.ops.autopar.<its name>`.

    Args:
        shapes: the same on fake tensors.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        registered = torch.library.custom_op(f"autopar::{name}", function, mutates_args=mutates)
        registered.register_fake(shapes)
        IMPLEMENTATIONS[getattr(torch.ops.autopar, name).default] = function
        return registered

    return register


# -- functional collectives ---------------------------------------------------------------------


def wait(x: torch.Tensor) -> torch.Tensor:
    """Wait for the collective that writes to this storage, if one is running."""
    return _C10D.wait_tensor(x)


def start_reduction(x: torch.Tensor, op: str, group: str, *, copy: bool) -> torch.Tensor:
    """Start an all-reduce.

    Args:
        copy: keep x, which may have any strides; else x is contiguous, and its memory is reused.
    """
    if not x.numel():
        return x.clone() if copy else x
    if not _in_place:
        return _C10D.all_reduce(x.contiguous(), op, group)
    return _C10D.all_reduce_(
        x.clone(memory_format=torch.contiguous_format) if copy else x, op, group
    )


def start_gathering(shards: Sequence[torch.Tensor], group: Group) -> torch.Tensor:
    """Start to gather flat shards of every rank, one behind the other: [ranks, elements]."""
    numel = sum(x.numel() for x in shards)
    if not _in_place or not numel:
        row = torch.cat(list(shards))
        if not numel:
            return row.new_empty((group.size, 0))
        return _C10D.all_gather_into_tensor(row, group.size, group.name).view(group.size, -1)
    rows = shards[0].new_empty((group.size, numel))
    own = rows[group.index]
    if len(shards) == 1:
        own.copy_(shards[0])
    else:
        torch.cat(list(shards), out=own)
    flat = _C10D.all_gather_into_tensor_out(own, group.size, group.name, out=rows.view(-1))
    return flat.view(group.size, -1)


def start_scattering(parts: torch.Tensor, group: Group) -> torch.Tensor:
    """Start to sum this rank's part of [ranks, ...], whose memory may be reused: [...]."""
    if not parts.numel():
        return parts[group.index]
    flat = parts.view(-1)
    if _in_place and hasattr(_C10D, "reduce_scatter_tensor_out"):  # torch 2.11 lacks it
        own = flat.chunk(group.size)[group.index]
        own = _C10D.reduce_scatter_tensor_out(flat, "sum", group.size, group.name, out=own)
    else:
        own = _C10D.reduce_scatter_tensor(flat, "sum", group.size, group.name)
    return own.view(parts.shape[1:])


# -- parts of tensors ---------------------------------------------------------------------------


def pad(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """x with zeros behind its dim, up to a size."""
    missing = size - x.shape[dim]
    if not missing:
        return x
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, missing])


def padded_shard(x: torch.Tensor, dim: int, size: int, ranks: int) -> torch.Tensor:
    """A shard padded to the size of the largest, its dim in front: [ceil(size / ranks), ...]."""
    return pad(x, dim, -(-size // ranks)).movedim(dim, 0)


def stack_parts(x: torch.Tensor, dim: int, parts: int) -> torch.Tensor:
    """[.., n, ..] to [parts, ceil(n / parts), ...]: dim split into padded parts, moved in front."""
    step = -(-x.shape[dim] // parts)
    return pad(x, dim, step * parts).movedim(dim, 0).unflatten(0, (parts, step))


def join_parts(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """[parts, ceil, ...] to [.., size, ..]: the inverse."""
    return x.flatten(0, 1)[:size].movedim(0, dim).contiguous()


def own_parts(
    row: torch.Tensor, shapes: Sequence[Sequence[int]], dims: Sequence[int], group: Group
) -> torch.Tensor:
    """A rank's parts of tensors of these shapes, in a row as `stack_parts` lays them out, without
    padding and with the split dims in their places."""
    if not any(dims) and all(shape[0] % group.size == 0 for shape in shapes):
        return row
    parts, begin = [], 0
    for shape, dim in zip(shapes, dims, strict=True):
        inner = (-(-shape[dim] // group.size), *shape[:dim], *shape[dim + 1 :])
        _, length = chunk(shape[dim], group.size, group.index)
        end = begin + math.prod(inner)
        parts.append(row[begin:end].view(inner)[:length].movedim(0, dim).reshape(-1))
        begin = end
    return torch.cat(parts)


def own_numel(shapes: Sequence[Sequence[int]], dims: Sequence[int], group: Group) -> int:
    """Elements of what `own_parts` returns."""
    return sum(
        math.prod(shape) // max(1, shape[dim]) * chunk(shape[dim], group.size, group.index)[1]
        for shape, dim in zip(shapes, dims, strict=True)
    )


def gathered_shape(x: torch.Tensor, dim: int, size: int) -> list[int]:
    """A shard's shape with the dim at its global size."""
    return [size if d == dim else n for d, n in enumerate(x.shape)]


def scattered_shape(x: torch.Tensor, dim: int, group: str) -> list[int]:
    """A tensor's shape with this rank's part of the dim."""
    g = find_group(group)
    return gathered_shape(x, dim, chunk(x.shape[dim], g.size, g.index)[1])


# -- one collective, one operator ---------------------------------------------------------------


@operator(lambda x, op, group: torch.empty_like(x, memory_format=torch.contiguous_format))
def all_reduce(x: torch.Tensor, op: str, group: str) -> torch.Tensor:
    """Elementwise `op` ("sum" or "max") over the group."""
    if x.dtype is torch.bool:  # backends do not add truth values
        return all_reduce_bytes(x, op, group)
    return wait(start_reduction(x, op, group, copy=True))


def all_reduce_bytes(x: torch.Tensor, op: str, group: str) -> torch.Tensor:
    return wait(start_reduction(x.to(torch.uint8), op, group, copy=False)).to(torch.bool)


@operator(lambda x, dim, size, group: x.new_empty(gathered_shape(x, dim, size)))
def all_gather(x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    """Concatenate the shards of `dim`, whose global size is `size`."""
    g = find_group(group)
    shard = padded_shard(x, dim, size, g.size).contiguous()
    if not shard.numel():
        return x.new_empty(gathered_shape(x, dim, size))
    rows = wait(_C10D.all_gather_into_tensor(shard.view(-1), g.size, g.name))
    return join_parts(rows.view(g.size, *shard.shape), dim, size)


@operator(lambda x, dim, group: x.new_empty(scattered_shape(x, dim, group)))
def reduce_scatter(x: torch.Tensor, dim: int, group: str) -> torch.Tensor:
    """Sum over the group, each rank keeping its part of `dim`."""
    g = find_group(group)
    _, length = chunk(x.shape[dim], g.size, g.index)
    if x.dtype is torch.bool:
        return reduce_scatter(x.to(torch.uint8), dim, group).to(torch.bool)
    parts = stack_parts(x, dim, g.size).contiguous()
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


@operator(_exchanged_shape)
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
        received = wait(_C10D.all_to_all_single(parts.view(-1), sizes, sizes, g.name))
    # [parts, split, ...]: bring the gathered dim next to the parts, then concatenate over both
    inner = gather_dim if gather_dim > split_dim else gather_dim + 1
    joined = received.view(parts.shape).movedim(inner + 1, 1).flatten(0, 1)[:gather_size]
    # now [gathered, split, rest...]
    joined = joined[:, :length]
    if gather_dim < split_dim:
        return joined.movedim(1, split_dim).movedim(0, gather_dim).contiguous()
    return joined.movedim(1, split_dim + 1).movedim(0, gather_dim).contiguous()


# -- several collectives in one message (`passes/bucket.py`) ------------------------------------
#
# Reductions return one row, all results one behind the other, for the graph to take views of.


@operator(lambda xs, op, group: xs[0].new_empty(sum(x.numel() for x in xs)))
def all_reduce_many(xs: Sequence[torch.Tensor], op: str, group: str) -> torch.Tensor:
    """`all_reduce` of each, in a row."""
    row = torch.cat([x.reshape(-1) for x in xs])
    if row.dtype is torch.bool:
        return all_reduce_bytes(row, op, group)
    return wait(start_reduction(row, op, group, copy=False))


def _gathered_shapes(
    xs: Sequence[torch.Tensor], dims: Sequence[int], sizes: Sequence[int], group: str
) -> list[torch.Tensor]:
    return [
        x.new_empty(gathered_shape(x, dim, size))
        for x, dim, size in zip(xs, dims, sizes, strict=True)
    ]


@operator(_gathered_shapes)
def all_gather_many(
    xs: Sequence[torch.Tensor], dims: Sequence[int], sizes: Sequence[int], group: str
) -> list[torch.Tensor]:
    """`all_gather` of each, along a dim of its own."""
    g = find_group(group)
    shards = [
        padded_shard(x, dim, size, g.size) for x, dim, size in zip(xs, dims, sizes, strict=True)
    ]
    row = torch.cat([shard.reshape(-1) for shard in shards])
    rows = row.new_empty((g.size, 0))
    if row.numel():
        rows = wait(_C10D.all_gather_into_tensor(row, g.size, g.name)).view(g.size, -1)
    parts = rows.split([shard.numel() for shard in shards], 1)
    return [
        join_parts(part.clone().view(g.size, *shard.shape), dim, size)
        for part, shard, dim, size in zip(parts, shards, dims, sizes, strict=True)
    ]


@operator(
    lambda xs, dims, group: xs[0].new_empty(
        own_numel([x.shape for x in xs], dims, find_group(group))
    )
)
def reduce_scatter_many(
    xs: Sequence[torch.Tensor], dims: Sequence[int], group: str
) -> torch.Tensor:
    """`reduce_scatter` of each, along a dim of its own, in a row."""
    g = find_group(group)
    stacked = [stack_parts(x, dim, g.size) for x, dim in zip(xs, dims, strict=True)]
    parts = torch.cat([s.reshape(g.size, -1) for s in stacked], 1)
    own = parts[0]
    if parts.numel():
        own = wait(_C10D.reduce_scatter_tensor(parts.view(-1), "sum", g.size, g.name))
    return own_parts(own, [x.shape for x in xs], dims, g)
