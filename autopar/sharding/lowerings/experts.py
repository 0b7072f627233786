"""Grouped matrix products of a mixture of experts, over split tokens or split experts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from autopar.sharding.lowerings.shard import Shard

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def grouped_mm(
    x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor, *, shard: Shard
) -> torch.Tensor:
    """Of any dtype, expert by expert."""
    return _grouped(torch.ops.transformers.grouped_mm_fallback, x, weight, offs, shard)


def grouped_mm_kernel(
    x: torch.Tensor,
    weight: torch.Tensor,
    offs: torch.Tensor,
    bias: None = None,
    out_dtype: torch.dtype | None = None,
    *,
    shard: Shard,
) -> torch.Tensor:
    """By one kernel, for types of 4 bytes and less."""
    return _grouped(torch.ops.aten._grouped_mm.default, x, weight, offs, shard)


def _grouped(
    product: Product, x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor, shard: Shard
) -> torch.Tensor:
    """Rows of x [s, k] are sorted by expert; expert e owns those before offs[e].

    With tokens (s) split, a rank's rows are a part of the sorted list, and the ends are clamped to
    it. With experts (e) split, the rows of this rank's experts are rolled to the front, so that the
    product reads no others, and the result is a pending sum with zeros for all other rows.
    """
    first = offs.new_zeros(())
    if "e" in shard:
        start, length, _, _ = shard["e"]
        first = offs[start - 1] if start else first
        offs = offs[start : start + length]
    if "s" in shard:
        start, length, _, _ = shard["s"]
        offs = (offs - start).clamp(0, length)
        first = (first - start).clamp(0, length)
    if "e" not in shard:
        return product(x, weight, offs)
    rows = torch.arange(x.shape[0], device=x.device)
    front = x.index_select(0, (rows + first) % x.shape[0])
    own = (rows < offs[-1] - first).unsqueeze(-1)
    out = product(front.where(own, 0), weight, offs - first).where(own, 0)
    return out.index_select(0, (rows - first) % x.shape[0])
