"""Attention over blocks of keys that ranks hold: they travel on a ring, partial results merge.

Each rank has its queries, and sees one block of keys and values after the other (Liu et al. 2023,
"Ring attention"). In the backward the blocks travel again, with their gradients behind them. The
next block is on its way while a rank computes with one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from autopar.comm.groups import find_group
from autopar.comm.spans import Spans, length_of
from autopar.operators.attention_blocks import merge
from autopar.sharding.lowerings import attention_operators as operators

_OPS = torch.ops.autopar


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


def base_of(mask: torch.Tensor | None) -> torch.Tensor | None:
    """`Block.base`: the largest number that an additive mask has for a query."""
    if mask is None or not mask.is_floating_point():
        return None
    largest = mask.amax(-1, keepdim=True)
    return largest.masked_fill(largest.isinf(), 0.0)


def _forward(
    ring: Ring, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    result: tuple[torch.Tensor, torch.Tensor] | None = None
    blocks, row, base = _Blocks(ring, k, v), None, base_of(mask)
    queries = operators.flat(ring.queries)
    if ring.ranks > 1:
        row = blocks.row(k, v)
    for step in range(ring.ranks):
        own = ring.keys[ring.source(step)]
        following = None
        if row is not None and step < ring.ranks - 1:
            following = ring.next(row, blocks.elements(ring.source(step + 1)))
        part = _OPS.attention_block(
            q, k, v, _columns(mask, own), base, queries, operators.flat(own), ring.causal,
            ring.scale,
        )  # fmt: skip
        result = part if result is None else merge(result, part)
        if following is not None:
            row = following
            k, v = blocks.tensors(row, ring.source(step + 1))
    assert result is not None
    return result[0].to(q.dtype), result[1]


def _sum(a: torch.Tensor | None, b: torch.Tensor) -> torch.Tensor:
    return b if a is None else a + b


def _backward(
    ring: Ring, grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    mask: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, trained: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    blocks, row, base = _Blocks(ring, k, v), None, base_of(mask)
    dtypes = k.dtype, v.dtype
    queries = operators.flat(ring.queries)
    of_q: torch.Tensor | None = None
    of_columns: dict[int, torch.Tensor] = {}
    travelling: torch.Tensor | None = None
    if ring.ranks > 1:
        row = blocks.row(k, v)
    for step in range(ring.ranks):
        source = ring.source(step)
        own = ring.keys[source]
        following = None
        if row is not None and step < ring.ranks - 1:
            following = ring.next(row, blocks.elements(ring.source(step + 1)))
        dq, dk, dv, of_columns[source] = _OPS.attention_block_backward(
            grad, q, k, v, _columns(mask, own), base, out, lse, queries, operators.flat(own),
            ring.causal, ring.scale, trained,
        )  # fmt: skip
        of_q = _sum(of_q, dq)
        if row is not None:
            # the gradients follow their block, and come back to its owner
            gradients = _sum(travelling, blocks.row(dk, dv))
            travelling = ring.next(gradients, blocks.elements(ring.source(step + 1)))
        if following is not None:
            row = following
            k, v = blocks.tensors(row, ring.source(step + 1))
    assert of_q is not None
    if travelling is not None:
        dk, dv = blocks.tensors(travelling, ring.me)
    of_mask = None
    if trained:
        assert mask is not None
        # blocks are in the order of their owners; a single column is that of all
        parts = [of_columns[r] for r in range(ring.ranks)]
        of_mask = torch.cat(parts, -1) if mask.shape[-1] > 1 else sum(parts[1:], parts[0])
    return of_q.to(q.dtype), dk.to(dtypes[0]), dv.to(dtypes[1]), of_mask


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
