"""Parts of a dim on the ranks of a group, and moves from one partition to another.

A rank holds spans `(start, length)` of a dim, ascending, one behind the other in its tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from autopar.comm.groups import find_group
from autopar.comm.steps import linear
from autopar.ir.spec import chunk

Span = tuple[int, int]
Spans = tuple[Span, ...]


def halves(spans: Sequence[Spans]) -> list[Span]:
    """All spans of all ranks in order, each cut in two."""
    cut = []
    for start, length in sorted(span for own in spans for span in own):
        first = -(-length // 2)
        cut += [(start, first), (start + first, length - first)]
    return cut


def zigzag(spans: Sequence[Spans]) -> list[Spans]:
    """Of ranks that hold one span each, the partition in which rank r of n has the halves r and
    2n - 1 - r of all: each has as much of the causal half of attention (Brandon et al. 2023,
    "Striped attention"; Zhu 2024, "ring-flash-attention")."""
    parts = halves(spans)
    count = len(parts)
    return [
        tuple(span for span in (parts[r], parts[count - 1 - r]) if span[1])
        for r in range(count // 2)
    ]


def overlap(a: Span, b: Span) -> Span:
    """The part of two spans that both have; of length 0 if there is none."""
    start = max(a[0], b[0])
    return start, max(0, min(a[0] + a[1], b[0] + b[1]) - start)


def length_of(spans: Spans) -> int:
    """Elements of all."""
    return sum(length for _, length in spans)


def common(own: Spans, others: Spans) -> list[tuple[int, int, int]]:
    """What two ranks both have: offset in the tensor of the first, start, length; ascending."""
    found, offset = [], 0
    for span in own:
        for other in others:
            start, length = overlap(span, other)
            if length:
                found.append((offset + start - span[0], start, length))
        offset += span[1]
    return sorted(found, key=lambda part: part[1])


def _rest(x: torch.Tensor, dim: int) -> int:
    return math.prod(n for d, n in enumerate(x.shape) if d != dim % x.ndim)


def moved_elements(held: Sequence[Spans], wanted: Sequence[Spans], rank: int, rest: int) -> int:
    """Elements of the longer side of `exchange` on a rank, where an index of the dim has `rest`."""
    return rest * max(length_of(held[rank]), length_of(wanted[rank]))


def _move(
    x: torch.Tensor, dim: int, held: Sequence[Spans], wanted: Sequence[Spans], group: str
) -> torch.Tensor:
    me, ranks = find_group(group).index, range(len(held))
    rest = _rest(x, dim)
    sends = [common(held[me], wanted[r]) for r in ranks]
    receives = [common(wanted[me], held[r]) for r in ranks]
    pieces = [x.narrow(dim, offset, n).reshape(-1) for part in sends for offset, _, n in part]
    counts = ([rest * sum(n for *_, n in part) for part in side] for side in (sends, receives))
    row = torch.ops.autopar.exchange(torch.cat(pieces), *counts, group)
    shape = list(x.shape)
    found, offset = [], 0
    for part in receives:
        for _, start, n in part:
            shape[dim] = n
            found.append((start, row[offset : offset + rest * n].view(shape)))
            offset += rest * n
    found.sort(key=lambda piece: piece[0])
    return torch.cat([piece for _, piece in found], dim)


def regroup(
    x: torch.Tensor, dim: int, held: Sequence[Spans], wanted: Sequence[Spans], group: str
) -> torch.Tensor:
    """The spans that a rank wants, from the ranks that hold them.

    Args:
        x: holds the rank's spans in `dim`.
        held, wanted: spans of every rank of the group; together the same indices, each once.

    Returns:
        The wanted spans; the gradient moves back.
    """
    return linear(
        x,
        lambda v: _move(v, dim, held, wanted, group),
        lambda g: _move(g, dim, wanted, held, group),
    )


def chunks(size: int, ranks: int, start: int = 0) -> list[Spans]:
    """The spans of a dim's shards."""
    parts = (chunk(size, ranks, r) for r in range(ranks))
    return [((start + begin, length),) for begin, length in parts]


# -- from one dim to another -----------------------------------------------------------------------


def _to_dim(
    x: torch.Tensor, dim: int, spans: Sequence[Span], to_dim: int, lengths: Sequence[int],
    group: str,
) -> torch.Tensor:  # fmt: skip
    """Send each rank its span of `dim`; join what ranks of these lengths in `to_dim` sent."""
    me = find_group(group).index
    parts = [x.narrow(dim, *span) for span in spans]
    shape = list(x.shape)
    shape[dim] = spans[me][1]
    rest = math.prod(shape) // shape[to_dim]
    received = [rest * n for n in lengths]
    row = torch.cat([part.reshape(-1) for part in parts])
    row = torch.ops.autopar.exchange(row, [p.numel() for p in parts], received, group)
    joined = []
    for piece, length in zip(row.split(received), lengths, strict=True):
        shape[to_dim] = length
        joined.append(piece.view(shape))
    return torch.cat(joined, to_dim)


def _from_dim(
    x: torch.Tensor, dim: int, size: int, spans: Sequence[Span], to_dim: int,
    lengths: Sequence[int], group: str,
) -> torch.Tensor:  # fmt: skip
    """The transpose of `_to_dim`: what several ranks have of an index is summed."""
    me = find_group(group).index
    parts = [part.reshape(-1) for part in x.split(list(lengths), to_dim)]
    shape = list(x.shape)
    shape[to_dim] = lengths[me]
    rest = math.prod(shape) // shape[dim]
    received = [rest * length for _, length in spans]
    row = torch.cat(parts)
    row = torch.ops.autopar.exchange(row, [p.numel() for p in parts], received, group)
    pieces = []
    for piece, (_, length) in zip(row.split(received), spans, strict=True):
        shape[dim] = length
        pieces.append(piece.view(shape))
    ends = [start + length for start, length in spans]
    if [start for start, _ in spans] == [0, *ends[:-1]]:
        return torch.cat(pieces, dim)
    total = None
    for piece, (start, length) in zip(pieces, spans, strict=True):
        around = [0, 0] * (x.ndim - 1 - dim % x.ndim) + [start, size - start - length]
        padded = torch.nn.functional.pad(piece, around)
        total = padded if total is None else total + padded
    assert total is not None
    return total


def spread(
    x: torch.Tensor, dim: int, spans: Sequence[Span], to_dim: int, lengths: Sequence[int],
    group: str,
) -> torch.Tensor:  # fmt: skip
    """Exchange a part of `to_dim` for a part of `dim`: S(to_dim) -> S(dim).

    Args:
        x: has this rank's part of `to_dim`, and all of `dim`.
        spans: of `dim`, for every rank; they may overlap.
        lengths: of `to_dim`, on every rank.

    Returns:
        This rank's span of `dim`, and all of `to_dim`. The gradient moves back, and is summed over
        the ranks that have an index of `dim`.
    """
    size = x.shape[dim]
    return linear(
        x,
        lambda v: _to_dim(v, dim, spans, to_dim, lengths, group),
        lambda g: _from_dim(g, dim, size, spans, to_dim, lengths, group),
    )


def collect(
    x: torch.Tensor, dim: int, spans: Sequence[Span], to_dim: int, lengths: Sequence[int],
    group: str,
) -> torch.Tensor:  # fmt: skip
    """The inverse of `spread` where the spans cover `dim` once: S(dim) -> S(to_dim)."""
    size = sum(length for _, length in spans)
    return linear(
        x,
        lambda v: _from_dim(v, dim, size, spans, to_dim, lengths, group),
        lambda g: _to_dim(g, dim, spans, to_dim, lengths, group),
    )
