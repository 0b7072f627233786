"""Parts of a dim on the ranks of a group, and moves from one partition to another.

A rank holds spans `(start, length)` of a dim, ascending, one behind the other in its tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

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


def _common(own: Spans, others: Spans) -> list[tuple[int, int, int]]:
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
    sends = [_common(held[me], wanted[r]) for r in ranks]
    receives = [_common(wanted[me], held[r]) for r in ranks]
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


# -- rows that neighbors hold ----------------------------------------------------------------------


class _Fetched(torch.autograd.Function):
    """Rows that overlap on the ranks; the gradient of a row is summed where it is held."""

    @staticmethod
    def forward(ctx: Any, fetch: Fetch, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.fetch = fetch
        return tuple(fetch.forward(tensors))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return None, *ctx.fetch.transpose(grads)


class Fetch:
    """Rows (of dim -2) that the ranks of a group want, from those that hold them.

    What a rank has and wants stays. All the rest, of all tensors, is one exchange, in which every
    rank takes part: one that neither sends nor receives sends itself an element.

    Args:
        held: spans of every rank, which do not overlap.
        wanted: a span of every rank.
        me: this rank.
        group: of the ranks.
    """

    def __init__(self, held: Sequence[Spans], wanted: Sequence[Span], me: int, group: str) -> None:
        self.held, self.wanted, self.me, self.group = held, wanted, me, group

    @property
    def moves(self) -> bool:
        """Whether any rank wants what it has not."""
        pairs = permutations(range(len(self.held)), 2)
        return any(_common(self.held[a], (self.wanted[b],)) for a, b in pairs)

    def _sent(self) -> list[list[tuple[int, int, int]]]:
        """For each rank, what it wants of this rank's (`_common`)."""
        return self._without_own([_common(self.held[self.me], (span,)) for span in self.wanted])

    def _received(self) -> list[list[tuple[int, int, int]]]:
        """From each rank, what this rank wants of its; offsets are in what this rank wants."""
        return self._without_own([_common((self.wanted[self.me],), own) for own in self.held])

    def _without_own(self, parts: list[Any]) -> list[Any]:
        return [[] if r == self.me else part for r, part in enumerate(parts)]

    def elements(self, per_row: int) -> int:
        """Of the longer side of this rank's exchange; 0 if there is none.

        Args:
            per_row: elements of a row of all tensors.
        """
        sides = (self._sent(), self._received())
        most = max(sum(n for part in side for *_, n in part) for side in sides) * per_row
        return (most or 1) if self.moves else 0

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The wanted rows of tensors that hold this rank's; gradients move back, and are summed."""
        return _Fetched.apply(self, *tensors)

    def forward(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        received = self._received()
        moved = self._moved(tensors, self._sent(), received)
        results = []
        for x, pieces in zip(tensors, moved, strict=True):
            own = _common(self.held[self.me], (self.wanted[self.me],))
            found = [(start, x.narrow(-2, offset, n)) for offset, start, n in own]
            starts = [start for part in received for _, start, _ in part]
            found += zip(starts, pieces, strict=True)
            found.sort(key=lambda piece: piece[0])
            results.append(torch.cat([p for _, p in found] or [x.narrow(-2, 0, 0)], -2))
        return results

    def transpose(self, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        sent = self._sent()
        moved = self._moved(grads, self._received(), sent)
        results = []
        for grad, pieces in zip(grads, moved, strict=True):
            rows = length_of(self.held[self.me])
            total = grad.new_zeros(*grad.shape[:-2], rows, grad.shape[-1])
            start = self.wanted[self.me][0]
            for offset, first, n in _common(self.held[self.me], (self.wanted[self.me],)):
                total.narrow(-2, offset, n).copy_(grad.narrow(-2, first - start, n))
            offsets = [(offset, n) for part in sent for offset, _, n in part]
            for (offset, n), piece in zip(offsets, pieces, strict=True):
                total.narrow(-2, offset, n).add_(piece)
            results.append(total)
        return results

    def _moved(
        self, tensors: Sequence[torch.Tensor], sent: list[Any], received: list[Any]
    ) -> list[list[torch.Tensor]]:
        """Send each rank its parts of all tensors; the parts received, per tensor."""
        if not self.moves:
            return [[] for _ in tensors]
        per_row = sum(_rest(x, -2) for x in tensors)
        counts = [[per_row * sum(n for *_, n in part) for part in s] for s in (sent, received)]
        pieces = [
            x.narrow(-2, offset, n).reshape(-1)
            for part in sent for x in tensors for offset, _, n in part
        ]  # fmt: skip
        idle = not sum(counts[0]) and not sum(counts[1])
        if idle:
            counts[0][self.me] = counts[1][self.me] = 1
            pieces = [tensors[0].new_zeros(1)]
        row = torch.cat(pieces) if pieces else tensors[0].new_empty(0)
        row = torch.ops.autopar.exchange(row, *counts, self.group)
        found: list[list[torch.Tensor]] = [[] for _ in tensors]
        offset = 0
        for part in received:
            for x, own in zip(tensors, found, strict=True):
                for *_, n in part:
                    shape = (*x.shape[:-2], n, x.shape[-1])
                    numel = math.prod(shape)
                    own.append(row[offset : offset + numel].view(shape))
                    offset += numel
        return found


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
