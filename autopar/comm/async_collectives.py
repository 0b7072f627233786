"""Collectives in two operators: a start, and a finish that waits, with compute between them.

A start packs what it is given into a buffer and communicates in it; it returns the buffer, which is
not to be read before the finish. Some finish in the buffer itself (`arrived_here`); the others
unpack it. The results are those of `collectives.py`, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from autopar.comm.collectives import (
    _join_parts,
    _pad,
    _stack_parts,
    kept_numel,
    kept_parts,
)
from autopar.comm.groups import Wait, find_group
from autopar.ir.spec import chunk

# of the collectives under way, by the address of their buffer: what waits for them
_UNDER_WAY: dict[int, Wait] = {}


def _wait(buffer: torch.Tensor) -> None:
    wait = _UNDER_WAY.pop(buffer.data_ptr(), None)
    if wait is not None:
        wait()


def under_way(result: torch.Tensor) -> Wait | None:
    """What waits for a result that its program has started (`all_reduce_late`); asked once."""
    return _UNDER_WAY.pop(result.data_ptr(), None)


def _reduce(buffer: torch.Tensor, op: str, group: str) -> torch.Tensor:
    if buffer.numel():
        _UNDER_WAY[buffer.data_ptr()] = find_group(group).start_all_reduce(buffer, op)
    return buffer


def _gather(shard: torch.Tensor, buffer: torch.Tensor, group: str) -> torch.Tensor:
    """Start in a buffer [size, ...] of a shard [...] per rank."""
    g = find_group(group)
    buffer[g.index].copy_(shard)
    if buffer.numel():
        _UNDER_WAY[buffer.data_ptr()] = g.start_all_gather(buffer)
    return buffer


def _scatter(buffer: torch.Tensor, group: str) -> torch.Tensor:
    if buffer.numel():
        _UNDER_WAY[buffer.data_ptr()] = find_group(group).start_reduce_scatter(buffer)
    return buffer


@torch.library.custom_op("autopar::arrived_here", mutates_args=("x",))
def arrived_here(x: torch.Tensor) -> None:
    """Wait for what a collective makes in its buffer. It changes nothing itself; saying that it
    does keeps it between the start and the readers."""
    _wait(x)


@arrived_here.register_fake
def _(x: torch.Tensor) -> None:
    return None


@torch.library.custom_op("autopar::start_all_reduce", mutates_args=())
def start_all_reduce(x: torch.Tensor, op: str, group: str) -> torch.Tensor:
    """`all_reduce` in a copy; finished by `arrived_here`."""
    return _reduce(x.clone(memory_format=torch.contiguous_format), op, group)


@start_all_reduce.register_fake
def _(x: torch.Tensor, op: str, group: str) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("autopar::finish_all_reduce", mutates_args=())
def finish_all_reduce(x: torch.Tensor) -> torch.Tensor:
    """`all_reduce`'s result in memory of its own, for small ones: unlike `arrived_here` it may be
    run again, like its start."""
    _wait(x)
    return x.clone()


@finish_all_reduce.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("autopar::all_reduce_late", mutates_args=())
def all_reduce_late(x: torch.Tensor, op: str, group: str) -> torch.Tensor:
    """`all_reduce` in a copy, which the program returns; finished by its caller
    (`autopar/comm/async_result.py`)."""
    return _reduce(x.clone(memory_format=torch.contiguous_format), op, group)


@all_reduce_late.register_fake
def _(x: torch.Tensor, op: str, group: str) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("autopar::start_gather_rows", mutates_args=())
def start_gather_rows(x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    """`all_gather` of equal parts along the first dim; finished by `arrived_here`."""
    out = x.new_empty((size, *x.shape[1:]))
    _gather(x, out.view(-1, *x.shape), group)
    return out


@start_gather_rows.register_fake
def _(x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    return x.new_empty((size, *x.shape[1:]))


@torch.library.custom_op("autopar::start_all_gather", mutates_args=())
def start_all_gather(x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    """`all_gather` into parts, padded to equal sizes, [ranks, ceil(size / ranks), ...]."""
    ranks = find_group(group).size
    shard = _pad(x, dim, -(-size // ranks)).movedim(dim, 0)
    return _gather(shard, x.new_empty((ranks, *shard.shape)), group)


@start_all_gather.register_fake
def _(x: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    ranks = find_group(group).size
    rest = [n for d, n in enumerate(x.shape) if d != dim]
    return x.new_empty((ranks, -(-size // ranks), *rest))


@torch.library.custom_op("autopar::finish_all_gather", mutates_args=())
def finish_all_gather(parts: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """What `all_gather` returns."""
    _wait(parts)
    return _joined(parts, dim, size)


def _joined(parts: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Memory of its own: operators return no views of what they are given."""
    joined = _join_parts(parts, dim, size)
    own = joined.untyped_storage().data_ptr() != parts.untyped_storage().data_ptr()
    return joined if own else joined.clone()


@finish_all_gather.register_fake
def _(parts: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    rest = list(parts.shape[2:])
    return parts.new_empty([*rest[:dim], size, *rest[dim:]])


@torch.library.custom_op("autopar::start_reduce_scatter", mutates_args=())
def start_reduce_scatter(x: torch.Tensor, dim: int, group: str) -> torch.Tensor:
    """`reduce_scatter` in parts, padded to equal sizes, [ranks, ceil(size / ranks), ...]."""
    parts = _stack_parts(x, dim, find_group(group).size)
    return _scatter(parts.clone(memory_format=torch.contiguous_format), group)


@start_reduce_scatter.register_fake
def _(x: torch.Tensor, dim: int, group: str) -> torch.Tensor:
    ranks = find_group(group).size
    rest = [n for d, n in enumerate(x.shape) if d != dim]
    return x.new_empty((ranks, -(-x.shape[dim] // ranks), *rest))


@torch.library.custom_op("autopar::finish_reduce_scatter", mutates_args=())
def finish_reduce_scatter(parts: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    """What `reduce_scatter` returns.

    Args:
        size: extent of the dim before it.
    """
    _wait(parts)
    g = find_group(group)
    _, length = chunk(size, g.size, g.index)
    mine = parts[g.index, :length].movedim(0, dim)
    return mine.clone(memory_format=torch.contiguous_format)


@finish_reduce_scatter.register_fake
def _(parts: torch.Tensor, dim: int, size: int, group: str) -> torch.Tensor:
    g = find_group(group)
    rest = list(parts.shape[2:])
    return parts.new_empty([*rest[:dim], chunk(size, g.size, g.index)[1], *rest[dim:]])


# -- several at once: their shapes, as tensors they would be alive until the finish, are numbers --


def _shapes(ranks: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Shapes, from their lengths and all their numbers."""
    return [list(sizes[a:b]) for a, b in pairwise(accumulate(ranks, initial=0))]


def numbers_of(shapes: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """The inverse: operators take lists of numbers, not of lists."""
    return [len(s) for s in shapes], [n for s in shapes for n in s]


@torch.library.custom_op("autopar::start_all_reduce_many", mutates_args=())
def start_all_reduce_many(xs: Sequence[torch.Tensor], op: str, group: str) -> torch.Tensor:
    """`all_reduce_many`; finished by `arrived_here`."""
    return _reduce(torch.cat([x.reshape(-1) for x in xs]), op, group)


@start_all_reduce_many.register_fake
def _(xs: Sequence[torch.Tensor], op: str, group: str) -> torch.Tensor:
    return xs[0].new_empty(sum(x.numel() for x in xs))


@torch.library.custom_op("autopar::start_all_gather_many", mutates_args=())
def start_all_gather_many(
    xs: Sequence[torch.Tensor], dims: Sequence[int], sizes: Sequence[int], group: str
) -> torch.Tensor:
    """`all_gather_many` in a row per rank."""
    ranks = find_group(group).size
    shards = [
        _pad(x, dim, -(-size // ranks)).movedim(dim, 0).reshape(-1)
        for x, dim, size in zip(xs, dims, sizes, strict=True)
    ]
    row = torch.cat(shards)
    return _gather(row, row.new_empty((ranks, row.numel())), group)


@start_all_gather_many.register_fake
def _(
    xs: Sequence[torch.Tensor], dims: Sequence[int], sizes: Sequence[int], group: str
) -> torch.Tensor:
    ranks = find_group(group).size
    steps = [-(-size // ranks) for size in sizes]
    rest = [x.numel() // max(1, x.shape[dim]) for x, dim in zip(xs, dims, strict=True)]
    return xs[0].new_empty((ranks, sum(s * n for s, n in zip(steps, rest, strict=True))))


@torch.library.custom_op("autopar::finish_all_gather_many", mutates_args=())
def finish_all_gather_many(
    rows: torch.Tensor, dims: Sequence[int], ranks: Sequence[int], sizes: Sequence[int]
) -> list[torch.Tensor]:
    """What `all_gather_many` returns, in these shapes."""
    _wait(rows)
    shapes = _shapes(ranks, sizes)
    padded = [
        (-(-shape[dim] // rows.shape[0]), *shape[:dim], *shape[dim + 1 :])
        for shape, dim in zip(shapes, dims, strict=True)
    ]
    parts = rows.split([torch.Size(s).numel() for s in padded], 1)
    return [
        _join_parts(part.clone().view(-1, *inner), dim, shape[dim])
        for part, inner, dim, shape in zip(parts, padded, dims, shapes, strict=True)
    ]


@finish_all_gather_many.register_fake
def _(
    rows: torch.Tensor, dims: Sequence[int], ranks: Sequence[int], sizes: Sequence[int]
) -> list[torch.Tensor]:
    return [rows.new_empty(shape) for shape in _shapes(ranks, sizes)]


@torch.library.custom_op("autopar::start_reduce_scatter_many", mutates_args=())
def start_reduce_scatter_many(
    xs: Sequence[torch.Tensor], dims: Sequence[int], group: str
) -> torch.Tensor:
    """`reduce_scatter_many` in a row per rank."""
    ranks = find_group(group).size
    stacked = [
        _stack_parts(x, dim, ranks).reshape(ranks, -1) for x, dim in zip(xs, dims, strict=True)
    ]
    return _scatter(torch.cat(stacked, 1), group)


@start_reduce_scatter_many.register_fake
def _(xs: Sequence[torch.Tensor], dims: Sequence[int], group: str) -> torch.Tensor:
    ranks = find_group(group).size
    parts = [
        -(-x.shape[dim] // ranks) * (x.numel() // max(1, x.shape[dim]))
        for x, dim in zip(xs, dims, strict=True)
    ]
    return xs[0].new_empty((ranks, sum(parts)))


@torch.library.custom_op("autopar::finish_reduce_scatter_many", mutates_args=())
def finish_reduce_scatter_many(
    rows: torch.Tensor, dims: Sequence[int], ranks: Sequence[int], sizes: Sequence[int], group: str
) -> torch.Tensor:
    """What `reduce_scatter_many` returns of tensors of these shapes."""
    _wait(rows)
    g = find_group(group)
    mine = rows[g.index]
    kept = kept_parts(mine, _shapes(ranks, sizes), dims, g)
    return mine.clone() if kept is mine else kept


@finish_reduce_scatter_many.register_fake
def _(
    rows: torch.Tensor, dims: Sequence[int], ranks: Sequence[int], sizes: Sequence[int], group: str
) -> torch.Tensor:
    return rows.new_empty(kept_numel(_shapes(ranks, sizes), dims, find_group(group)))
