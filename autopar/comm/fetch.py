"""Rows that neighbors hold: windows over a split dim reach beyond a rank's part (the halo).

What is sent and where it goes are numbers among the operands of two operators. So the programs of
all ranks have the same operators, and what one computes again in its backward the others do too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch

from autopar.comm.operators import operator
from autopar.comm.spans import Span, Spans, common, length_of

_OPS = torch.ops.autopar


def _rest(x: torch.Tensor) -> int:
    """Elements of a row."""
    return math.prod(x.shape[:-2]) * x.shape[-1]


def _packed_shape(tensors: Sequence[torch.Tensor], rows: Sequence[int], idle: bool) -> torch.Tensor:
    numel = sum(map(_rest, tensors)) * sum(rows[1::2])
    return tensors[0].new_empty(1 if idle else numel)


@operator(_packed_shape)
def packed_rows(tensors: Sequence[torch.Tensor], rows: Sequence[int], idle: bool) -> torch.Tensor:
    """Rows of tensors as one row of elements.

    Args:
        tensors: [..., n, d] each.
        rows: starts and lengths of what is taken, of all tensors before the next.
        idle: there are none; then it is a single element.
    """
    if idle:
        return tensors[0].new_zeros(1)
    spans = zip(rows[::2], rows[1::2], strict=True)
    pieces = [x.narrow(-2, *span).reshape(-1) for span in spans for x in tensors]
    return torch.cat(pieces) if pieces else tensors[0].new_empty(0)


def _placed_shape(
    x: torch.Tensor, received: torch.Tensor, own: Sequence[int], other: Sequence[int], size: int
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-2], size, x.shape[-1])


@operator(_placed_shape)
def placed_rows(
    x: torch.Tensor, received: torch.Tensor, own: Sequence[int], other: Sequence[int], size: int
) -> torch.Tensor:
    """Own rows and received ones at their places, [..., size, d]; what meets there is summed.

    Args:
        own: per piece its start in `x`, its start in the result, its length.
        other: per piece its first element in `received`, its start in the result, its length.
    """
    total = x.new_zeros(*x.shape[:-2], size, x.shape[-1])
    for start, place, n in zip(own[::3], own[1::3], own[2::3], strict=True):
        total.narrow(-2, place, n).copy_(x.narrow(-2, start, n))
    for first, place, n in zip(other[::3], other[1::3], other[2::3], strict=True):
        piece = received.narrow(0, first, n * _rest(x)).view(*x.shape[:-2], n, x.shape[-1])
        total.narrow(-2, place, n).add_(piece)
    return total


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
        moves: whether there is an exchange; by default, whether any rank wants what it has not.
    """

    def __init__(
        self, held: Sequence[Spans], wanted: Sequence[Span], me: int, group: str,
        moves: bool | None = None,
    ) -> None:  # fmt: skip
        self.held, self.wanted, self.me, self.group = held, wanted, me, group
        pairs = permutations(range(len(held)), 2)
        wants = any(common(held[a], (wanted[b],)) for a, b in pairs)
        self.moves = wants if moves is None else moves

    def _sent(self) -> list[list[tuple[int, int, int]]]:
        """For each rank, what it wants of this rank's (`common`)."""
        return self._without_own([common(self.held[self.me], (span,)) for span in self.wanted])

    def _received(self) -> list[list[tuple[int, int, int]]]:
        """From each rank, what this rank wants of its; offsets are in what this rank wants."""
        return self._without_own([common((self.wanted[self.me],), own) for own in self.held])

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
        """The wanted rows."""
        start, size = self.wanted[self.me]
        own = common(self.held[self.me], (self.wanted[self.me],))
        stays = [(offset, first - start, n) for offset, first, n in own]
        received = [[(place, n) for place, _, n in part] for part in self._received()]
        return self._moved(tensors, self._sent(), received, stays, size)

    def transpose(self, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Gradients of the held rows, from those of the wanted ones."""
        start, _ = self.wanted[self.me]
        own = common(self.held[self.me], (self.wanted[self.me],))
        stays = [(first - start, offset, n) for offset, first, n in own]
        received = [[(place, n) for place, _, n in part] for part in self._sent()]
        size = length_of(self.held[self.me])
        return self._moved(grads, self._received(), received, stays, size)

    def _moved(
        self, tensors: Sequence[torch.Tensor], sent: list[list[tuple[int, int, int]]],
        received: list[list[tuple[int, int]]], stays: list[tuple[int, int, int]], size: int,
    ) -> list[torch.Tensor]:  # fmt: skip
        """Send each rank its parts of all tensors; place what stays and what comes.

        Args:
            received: per rank the places of its rows.
            stays: starts in a tensor and in its result, and lengths.
            size: rows of a result.
        """
        own = [n for piece in stays for n in piece]
        nothing = tensors[0].new_zeros(1)
        if not self.moves:
            return [_OPS.placed_rows(x, nothing, own, [], size) for x in tensors]
        per_row = sum(map(_rest, tensors))
        counts = [[per_row * sum(n for *_, n in part) for part in s] for s in (sent, received)]
        idle = not any(counts[0]) and not any(counts[1])
        if idle:
            counts[0][self.me] = counts[1][self.me] = 1
        rows = [n for part in sent for start, _, length in part for n in (start, length)]
        row = _OPS.packed_rows(tensors, rows, idle)
        row = _OPS.exchange(row, *counts, self.group)
        places: list[list[int]] = [[] for _ in tensors]
        offset = 0
        for part in received:
            for place, n in part:
                for x, found in zip(tensors, places, strict=True):
                    found += (offset, place, n)
                    offset += n * _rest(x)
        return [
            _OPS.placed_rows(x, row, own, o, size) for x, o in zip(tensors, places, strict=True)
        ]
