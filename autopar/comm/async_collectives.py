"""Collectives in two operators: a start, and a finish that waits, for compute to run between them.

A start packs its operands into a buffer, communicates in it and returns it; nothing may read it
before the finish. Some finish in the buffer itself (`wait_in_place`), the others unpack it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from autopar.comm.functional import (
    gathered_rows,
    join_parts,
    own_numel,
    own_parts,
    padded_shard,
    stack_parts,
    start_exchanging,
    start_gathering,
    start_reduction,
    start_scattering,
    wait,
)
from autopar.comm.groups import find_group
from autopar.comm.operators import operator
from autopar.ir.spec import chunk


@operator(lambda x: None, mutates=("x",), inline=True)
def wait_in_place(x: torch.Tensor) -> None:
    """Wait for the collective that writes to x. Declared as a mutation, although it changes nothing
    itself, so that it stays between the start and the readers."""
    wait(x)


@operator(
    lambda x, op, group: torch.empty_like(x, memory_format=torch.contiguous_format), inline=True
)
def start_all_reduce(x: torch.Tensor, op: str, group: str) -> torch.Tensor:
    """`all_reduce` in a copy; finished by `wait_in_place`, or by the caller of the program."""
    return start_reduction(x, op, group, copy=True)


@operator(torch.empty_like, inline=True)
def finish_all_reduce(x: torch.Tensor) -> torch.Tensor:
    """`all_reduce`'s result in memory of its own, for small ones: unlike `wait_in_place` it may be
    run again, like its start."""
    return wait(x).clone()


@operator(lambda x, dim, size, group: gathered_rows(x, size, group), inline=True)
def start_gather_rows(x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    """`all_gather` along the first dim, where padding comes last; finished by `wait_in_place`."""
    return start_all_gather(x, dim, size, group).flatten(0, 1)[:size]


def _padded_parts(x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    ranks = find_group(group).size
    rest = [n for d, n in enumerate(x.shape) if d != dim]
    return x.new_empty((ranks, -(-size // ranks), *rest))


@operator(_padded_parts, inline=True)
def start_all_gather(x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    """`all_gather` into parts, padded to equal sizes, [ranks, ceil(size / ranks), ...]."""
    g = find_group(group)
    shard = padded_shard(x, dim, size, g.size)
    return start_gathering([shard.reshape(-1)], g).view(g.size, *shard.shape)


def _unpadded(parts: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    rest = list(parts.shape[2:])
    return parts.new_empty([*rest[:dim], size, *rest[dim:]])


@operator(_unpadded, inline=True)
def finish_all_gather(parts: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """What `all_gather` returns."""
    parts = wait(parts)
    joined = join_parts(parts, dim, size)
    shared = joined.untyped_storage()._cdata == parts.untyped_storage()._cdata
    return joined.clone() if shared else joined  # an operator returns no view of its operand


def _own_part(x: torch.Tensor, dim: int, group: str) -> torch.Tensor:
    ranks = find_group(group).size
    rest = [n for d, n in enumerate(x.shape) if d != dim]
    return x.new_empty((ranks, -(-x.shape[dim] // ranks), *rest))[0]


@operator(_own_part, inline=True)
def start_reduce_scatter(x: torch.Tensor, dim: int, group: str) -> torch.Tensor:
    """`reduce_scatter` in a copy, in parts padded to equal sizes; this rank's, [ceil(n / ranks),
    ...], in a buffer of all."""
    g = find_group(group)
    parts = stack_parts(x, dim, g.size).clone(memory_format=torch.contiguous_format)
    return start_scattering(parts, g)


def _unpadded_part(own: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    g = find_group(group)
    rest = list(own.shape[1:])
    return own.new_empty([*rest[:dim], chunk(size, g.size, g.index)[1], *rest[dim:]])


@operator(_unpadded_part, inline=True)
def finish_reduce_scatter(own: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    """What `reduce_scatter` returns, out of the buffer of `start_reduce_scatter`.

    Args:
        size: extent of the dim before it.
    """
    g = find_group(group)
    _, length = chunk(size, g.size, g.index)
    return wait(own)[:length].movedim(0, dim).clone(memory_format=torch.contiguous_format)


@operator(lambda row, sent, received, group: row.new_empty(sum(received)), inline=True)
def start_exchange(
    row: torch.Tensor, sent: Sequence[int], received: Sequence[int], group: str
) -> torch.Tensor:
    """`exchange`; finished by `wait_in_place`."""
    if not row.numel() and not sum(received):
        return row.new_empty(0)
    return start_exchanging(row, sent, received, find_group(group))


# -- several at once: their shapes, as tensors they would be alive until the finish, are numbers --


def _shapes(ranks: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Shapes, from their lengths and all their numbers."""
    return [list(sizes[a:b]) for a, b in pairwise(accumulate(ranks, initial=0))]


def numbers_of(shapes: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """The inverse: operators take lists of numbers, not of lists."""
    return [len(s) for s in shapes], [n for s in shapes for n in s]


@operator(lambda xs, op, group: xs[0].new_empty(sum(x.numel() for x in xs)), inline=True)
def start_all_reduce_many(xs: Sequence[torch.Tensor], op: str, group: str) -> torch.Tensor:
    """`all_reduce_many`; finished by `wait_in_place`."""
    return start_reduction(torch.cat([x.reshape(-1) for x in xs]), op, group, copy=False)


def _row_per_rank(
    xs: Sequence[torch.Tensor], dims: Sequence[int], sizes: Sequence[int], group: str
) -> torch.Tensor:
    ranks = find_group(group).size
    numel = sum(
        -(-size // ranks) * (x.numel() // max(1, x.shape[dim]))
        for x, dim, size in zip(xs, dims, sizes, strict=True)
    )
    return xs[0].new_empty((ranks, numel))


@operator(_row_per_rank, inline=True)
def start_all_gather_many(
    xs: Sequence[torch.Tensor], dims: Sequence[int], sizes: Sequence[int], group: str
) -> torch.Tensor:
    """`all_gather_many` in a row per rank."""
    g = find_group(group)
    shards = [
        padded_shard(x, dim, size, g.size).reshape(-1)
        for x, dim, size in zip(xs, dims, sizes, strict=True)
    ]
    return start_gathering(shards, g)


def _gathered(
    rows: torch.Tensor, dims: Sequence[int], ranks: Sequence[int], sizes: Sequence[int]
) -> list[torch.Tensor]:
    return [rows.new_empty(shape) for shape in _shapes(ranks, sizes)]


@operator(_gathered, inline=True)
def finish_all_gather_many(
    rows: torch.Tensor, dims: Sequence[int], ranks: Sequence[int], sizes: Sequence[int]
) -> list[torch.Tensor]:
    """What `all_gather_many` returns, in these shapes."""
    rows = wait(rows)
    shapes = _shapes(ranks, sizes)
    padded = [
        (-(-shape[dim] // rows.shape[0]), *shape[:dim], *shape[dim + 1 :])
        for shape, dim in zip(shapes, dims, strict=True)
    ]
    parts = rows.split([torch.Size(s).numel() for s in padded], 1)
    return [
        join_parts(part.clone().view(rows.shape[0], *inner), dim, shape[dim])
        for part, inner, dim, shape in zip(parts, padded, dims, shapes, strict=True)
    ]


def _own_row(xs: Sequence[torch.Tensor], dims: Sequence[int], group: str) -> torch.Tensor:
    ranks = find_group(group).size
    numel = sum(
        -(-x.shape[dim] // ranks) * (x.numel() // max(1, x.shape[dim]))
        for x, dim in zip(xs, dims, strict=True)
    )
    return xs[0].new_empty((ranks, numel))[0]


@operator(_own_row, inline=True)
def start_reduce_scatter_many(
    xs: Sequence[torch.Tensor], dims: Sequence[int], group: str
) -> torch.Tensor:
    """`reduce_scatter_many` in a row per rank; this rank's, in a buffer of all."""
    g = find_group(group)
    stacked = [
        stack_parts(x, dim, g.size).reshape(g.size, -1) for x, dim in zip(xs, dims, strict=True)
    ]
    return start_scattering(torch.cat(stacked, 1), g)


def _unpadded_row(
    row: torch.Tensor, dims: Sequence[int], ranks: Sequence[int], sizes: Sequence[int], group: str
) -> torch.Tensor:
    return row.new_empty(own_numel(_shapes(ranks, sizes), dims, find_group(group)))


@operator(_unpadded_row, inline=True)
def finish_reduce_scatter_many(
    row: torch.Tensor, dims: Sequence[int], ranks: Sequence[int], sizes: Sequence[int], group: str
) -> torch.Tensor:
    """What `reduce_scatter_many` returns of tensors of these shapes."""
    own = wait(row)
    parts = own_parts(own, _shapes(ranks, sizes), dims, find_group(group))
    return own.clone() if parts is own else parts
