"""Attention over blocks of keys that ranks hold: they travel on a ring, partial results merge.

Each rank has its queries, and sees one block of keys and values after the other (Liu et al. 2023,
"Ring attention"). In the backward the blocks travel again, with their gradients behind them.

Causal attention has no mask: pairs of queries and keys are cut into products that are whole, or
causal with as many queries as keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from autopar.comm.groups import find_group
from autopar.comm.spans import Span, Spans, length_of, overlap
from autopar.operators.attention_blocks import (
    Block,
    accumulated,
    attend,
    attend_backward,
    bias_of,
    merge,
)


@dataclass(frozen=True)
class Product:
    """Queries that attend to keys of a block: offsets and lengths in both tensors."""

    rows: Span
    columns: Span
    causal: bool = False


def segments(queries: Spans, keys: Sequence[Spans]) -> Spans:
    """Spans of queries, cut where spans of keys begin or end."""
    borders = sorted({b for own in keys for start, n in own for b in (start, start + n)})
    cut = []
    for start, length in queries:
        inner = [b for b in borders if start < b < start + length]
        bounds = [start, *inner, start + length]
        cut += [(a, b - a) for a, b in pairwise(bounds)]
    return tuple(cut)


def products(queries: Spans, keys: Spans, causal: bool) -> list[Product]:
    """What queries compute with a block of keys.

    Args:
        queries: as `segments` cuts them if causal.
    """
    columns = length_of(keys)
    if not causal:
        return [Product((0, length_of(queries)), (0, columns))]
    if queries == keys:
        return [Product((0, columns), (0, columns), causal=True)]
    whole: list[Product] = []
    diagonal = []
    row = 0
    for query in queries:
        start, length = query
        before = sum(overlap(span, (0, start))[1] for span in keys)
        last = whole[-1] if whole else None
        if before and last and last.columns == (0, before) and sum(last.rows) == row:
            whole[-1] = Product((last.rows[0], last.rows[1] + length), last.columns)
        elif before:
            whole.append(Product((row, length), (0, before)))
        if any(overlap(span, query)[1] for span in keys):
            diagonal.append(Product((row, length), (before, length), causal=True))
        row += length
    return whole + diagonal


@dataclass(frozen=True)
class Ring:
    """Who holds what.

    Args:
        queries: this rank's spans.
        keys: spans of every rank along the ring.
        group: of the ring; None where a rank has all keys.
        causal: whether a query sees only the keys up to it.
        scale: of the scores.
    """

    queries: Spans
    keys: tuple[Spans, ...]
    group: str | None
    causal: bool
    scale: float

    @property
    def ranks(self) -> int:
        """Along the ring."""
        return len(self.keys)

    @property
    def me(self) -> int:
        """This rank."""
        return 0 if self.group is None else find_group(self.group).index

    def source(self, step: int) -> int:
        """Whose keys this rank has in a step."""
        return (self.me - step) % self.ranks

    def next(self, row: torch.Tensor, received: int) -> torch.Tensor:
        """Pass a row on; receive that of the rank before, with so many elements."""
        assert self.group is not None
        counts = [[0] * self.ranks, [0] * self.ranks]
        counts[0][(self.me + 1) % self.ranks] = row.numel()
        counts[1][(self.me - 1) % self.ranks] = received
        return torch.ops.autopar.exchange(row, *counts, self.group)


class _Blocks:
    """Keys and values as one row, and back."""

    def __init__(self, ring: Ring, k: torch.Tensor, v: torch.Tensor) -> None:
        self.ring, self.shapes = ring, (k.shape, v.shape)
        self.per_key = (k.numel() + v.numel()) // max(1, k.shape[-2])

    def length(self, rank: int) -> int:
        """Keys of a rank."""
        return length_of(self.ring.keys[rank % self.ring.ranks])

    def elements(self, rank: int) -> int:
        """Of a rank's keys and values."""
        return self.per_key * self.length(rank)

    def row(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.cat([k.reshape(-1), v.reshape(-1)])

    def tensors(self, row: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        length = self.length(rank)
        shapes = [(*shape[:-2], length, shape[-1]) for shape in self.shapes]
        numel = torch.Size(shapes[0]).numel()
        return row[:numel].view(shapes[0]), row[numel:].view(shapes[1])


def _columns(mask: torch.Tensor | None, keys: Spans) -> torch.Tensor | None:
    """A mask's columns for a block of keys."""
    if mask is None or mask.shape[-1] == 1:
        return mask
    parts = [mask.narrow(-1, *span) for span in keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _of_product(bias: torch.Tensor | None, p: Product) -> torch.Tensor | None:
    """The part of a block's bias for a product."""
    if bias is not None and bias.shape[-1] > 1:
        bias = bias.narrow(-1, *p.columns)
    if bias is not None and bias.shape[-2] > 1:
        bias = bias.narrow(-2, *p.rows)
    return bias


def _forward(
    ring: Ring, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    own = segments(ring.queries, ring.keys) if ring.causal else ring.queries
    results: list[Any] = [None] * len(own)
    blocks = _Blocks(ring, k, v)
    row = blocks.row(k, v) if ring.ranks > 1 else None
    for step in range(ring.ranks):
        source = ring.source(step)
        following = None
        if step < ring.ranks - 1:
            assert row is not None
            following = ring.next(row, blocks.elements(ring.source(step + 1)))
        bias = bias_of(_columns(mask, ring.keys[source]), q.dtype)
        for p in products(own, ring.keys[source], ring.causal):
            out, lse = attend(
                q.narrow(-2, *p.rows), k.narrow(-2, *p.columns), v.narrow(-2, *p.columns),
                _of_product(bias, p), Block(p.causal, ring.scale),
            )  # fmt: skip
            out = out.to(accumulated(q.dtype))
            for i, (offset, length) in enumerate(_within(own, p.rows)):
                if length:
                    part = out.narrow(-2, offset, length), lse.narrow(-1, offset, length)
                    before = results[i]
                    results[i] = (
                        part if before is None else merge(before, part, masked=mask is not None)
                    )
        if following is not None:
            row = following
            k, v = blocks.tensors(row, ring.source(step + 1))
    out = _joined([r[0] for r in results], -2).to(q.dtype)
    return out, _joined([r[1] for r in results], -1)


def _within(own: Spans, rows: Span) -> list[Span]:
    """The part of each of a rank's spans that is among some rows, in these rows."""
    parts, offset = [], 0
    for _, length in own:
        start, common = overlap((offset, length), rows)
        parts.append((start - rows[0], common))
        offset += length
    return parts


def _joined(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _padded(x: torch.Tensor, part: Span, size: int) -> torch.Tensor:
    """Zeros around a part of dim -2."""
    if part == (0, size):
        return x
    return F.pad(x, [0, 0, part[0], size - sum(part)])


def _sum(a: torch.Tensor | None, b: torch.Tensor) -> torch.Tensor:
    return b if a is None else a + b


def _backward(
    ring: Ring, grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    mask: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, trained: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    own = segments(ring.queries, ring.keys) if ring.causal else ring.queries
    high = accumulated(q.dtype)
    blocks = _Blocks(ring, k, v)
    of_q: torch.Tensor | None = None
    of_columns: dict[int, torch.Tensor] = {}
    row = blocks.row(k, v) if ring.ranks > 1 else None
    travelling: torch.Tensor | None = None
    for step in range(ring.ranks):
        source = ring.source(step)
        following = None
        if step < ring.ranks - 1:
            assert row is not None
            following = ring.next(row, blocks.elements(ring.source(step + 1)))
        bias = bias_of(_columns(mask, ring.keys[source]), q.dtype)
        of_k: torch.Tensor | None = None
        of_v: torch.Tensor | None = None
        for p in products(own, ring.keys[source], ring.causal):
            narrow = [x.narrow(-2, *p.rows) for x in (grad, q, out)]
            part = attend_backward(
                narrow[0], narrow[1], k.narrow(-2, *p.columns), v.narrow(-2, *p.columns),
                _of_product(bias, p), narrow[2], lse.narrow(-1, *p.rows),
                Block(p.causal, ring.scale, trained),
            )  # fmt: skip
            dq, dk, dv = (x.to(high) for x in part[:3])
            of_q = _sum(of_q, _padded(dq, p.rows, q.shape[-2]))
            of_k = _sum(of_k, _padded(dk, p.columns, k.shape[-2]))
            of_v = _sum(of_v, _padded(dv, p.columns, v.shape[-2]))
            if part[3] is not None:
                of_columns[source] = part[3]
        if of_k is None or of_v is None:
            of_k, of_v = torch.zeros_like(k, dtype=high), torch.zeros_like(v, dtype=high)
        if ring.group is None:
            travelling = None
        else:
            # the gradients follow their block, and come back to its owner
            gradients = _sum(travelling, blocks.row(of_k, of_v))
            travelling = ring.next(gradients, blocks.elements(ring.source(step + 1)))
        if following is not None:
            row = following
            k, v = blocks.tensors(row, ring.source(step + 1))
    assert of_q is not None and of_k is not None and of_v is not None
    if travelling is not None:
        of_k, of_v = blocks.tensors(travelling, ring.me)
    of_mask = None
    if trained:
        assert mask is not None
        # blocks are in the order of their owners; a single column is that of all
        parts = [of_columns[r] for r in range(ring.ranks)]
        of_mask = torch.cat(parts, -1) if mask.shape[-1] > 1 else sum(parts[1:], parts[0])
    return of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype), of_mask


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
        ring: Ring,
    ) -> torch.Tensor:  # fmt: skip
        out, lse = _forward(ring, q, k, v, mask)
        ctx.ring, ctx.trained = ring, ctx.needs_input_grad[3]
        ctx.save_for_backward(q, k, v, mask, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, v, mask, out, lse = ctx.saved_tensors
        grads = _backward(ctx.ring, grad, q, k, v, mask, out, lse, ctx.trained)
        return *grads, None


def ring_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, ring: Ring
) -> torch.Tensor:
    """Attention of this rank's queries to the keys of all ranks.

    Args:
        q: [*b, heads, queries, d], this rank's spans.
        k, v: [*b, key heads, keys, d], likewise.
        mask: for this rank's queries and all keys, or None; the same for all queries if causal.

    Returns:
        [*b, heads, queries, d].
    """
    return _RingAttention.apply(q, k, v, mask, ring)
