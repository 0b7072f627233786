"""What operators of collectives are made of: functional collectives, and parts of tensors.

Uneven dims follow the rule of `torch.chunk`: parts are padded to the largest. Only the last parts
are short, so gathered parts concatenate to the dim followed by padding alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed._functional_collectives
import torch.nn.functional as F

from autopar.comm.groups import Group, find_group
from autopar.ir.spec import chunk

_C10D = torch.ops._c10d_functional

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
    if not (_in_place and group.gathers_in_place) or not numel:
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
    flat = _C10D.all_gather_into_tensor_out(
        _numbers(own), group.size, group.name, out=_numbers(rows.view(-1))
    )
    return _values(flat, rows.dtype).view(group.size, -1)


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


def start_exchanging(
    row: torch.Tensor, sent: Sequence[int], received: Sequence[int], group: Group
) -> torch.Tensor:
    """Start to send parts of [elements] to every rank, and to receive parts of theirs: [elements].

    Args:
        sent, received: elements for, and from, each rank.
    """
    each = 2 if row.is_complex() else 1
    numbers = _C10D.all_to_all_single(
        _numbers(row.contiguous()), [each * n for n in received], [each * n for n in sent],
        group.name,
    )  # fmt: skip
    return _values(numbers, row.dtype)


# These two collectives take real numbers alone; of the others torch does the same (torch 2.13).


def _numbers(row: torch.Tensor) -> torch.Tensor:
    """[elements] as real numbers in the same memory: two for a complex element."""
    return torch.view_as_real(row).view(-1) if row.is_complex() else row


def _values(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse."""
    return torch.view_as_complex(numbers.view(-1, 2)) if dtype.is_complex else numbers


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


def gathers_rows(dim: int) -> bool:
    """Whether gathered shards are the result as they arrive: padding comes last. It depends on no
    size, as the ranks of another group may gather another size, by the same operators."""
    return dim == 0


def gathered_rows(x: torch.Tensor, size: int, group: str) -> torch.Tensor:
    """An empty result of a gather along the first dim, in front of its padding."""
    ranks = find_group(group).size
    return x.new_empty((ranks * -(-size // ranks), *x.shape[1:]))[:size]
