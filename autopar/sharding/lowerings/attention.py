"""Attention over split queries, and with dropout that can be replayed."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from autopar.comm.random import keep_mask
from autopar.sharding.lowerings.shard import Shard


def _causal(start: int, queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """[queries, keys]: which of the keys come no later than each query, the first being `start`."""
    rows = torch.arange(start, start + queries, device=device)
    return torch.arange(keys, device=device) <= rows.unsqueeze(-1)


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    shard: Shard,
) -> torch.Tensor:
    """Causal attention of this rank's queries (q) to the keys before them; keys are not split."""
    start, length, _, _ = shard["q"]
    seen = min(start + length, key.shape[-2])  # no query of this rank attends further
    allowed = _causal(start, length, seen, query.device)
    return F.scaled_dot_product_attention(
        query,
        key.narrow(-2, 0, seen),
        value.narrow(-2, 0, seen),
        allowed,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def attention_with_dropout(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    shard: Shard,
    seed: torch.Tensor,
    stream: tuple[int, int],
) -> torch.Tensor:
    """Attention that drops probabilities by a replayable mask; the products are written out."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        start = shard["q"][0] if "q" in shard else 0
        allowed = _causal(start, scores.shape[-2], scores.shape[-1], query.device)
        scores = scores.masked_fill(~allowed, float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    keep = keep_mask(scores, list(scores.shape), dropout_p, seed, stream[0], stream[1])
    return (scores.softmax(-1) * keep * (1 / (1 - dropout_p))) @ value
