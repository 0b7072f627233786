"""Local implementations of ops whose split needs more than local execution.

Each takes the op's own arguments with local tensors, and `shard`: for every split factor
`(start, length, size, groups)`: this rank's part of the factor, its whole extent, and the names of
the communicators it is split over, outermost first. Random ops also get `seed` (an int64 scalar
tensor) and `site` (op number, shard number).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from autopar.runtime import collectives
from autopar.runtime.random import keep_mask

Shard = Mapping[str, tuple[int, int, int, Sequence[str]]]


def _groups(shard: Shard, *factors: str) -> list[str]:
    return [g for name in factors if name in shard for g in shard[name][3]]


def _reduce(x: torch.Tensor, groups: Sequence[str]) -> torch.Tensor:
    for group in groups:
        x = collectives.reduce(x, group)
    return x


def _vary(x: torch.Tensor, groups: Sequence[str]) -> torch.Tensor:
    for group in groups:
        x = collectives.vary(x, group)
    return x


def embedding(
    weight: torch.Tensor,
    indices: torch.Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    shard: Shard,
) -> torch.Tensor:
    """Vocabulary-split lookup: rows held elsewhere contribute zero to a pending sum."""
    start, length, _, _ = shard["v"]
    local = indices - start
    here = (local >= 0) & (local < length)
    padding = padding_idx - start if start <= padding_idx < start + length else -1
    found = torch.ops.aten.embedding.default(weight, local.where(here, 0), padding)
    return found.masked_fill(~here.unsqueeze(-1), 0)


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    shard: Shard,
) -> torch.Tensor:
    """Cross-entropy with the rows and/or the vocabulary split; logits [b, v], target [b].

    Over split rows the result is a pending sum; over a split vocabulary it is complete. The full
    vocabulary is never gathered (Megatron-LM, arXiv:1909.08053, section 3).
    """
    valid = target != ignore_index
    vocabulary = _groups(shard, "v")
    if vocabulary:
        start, length, _, _ = shard["v"]
        peak = logits.detach().amax(-1)
        for group in vocabulary:
            peak = collectives.all_reduce(peak, "max", group)
        total = _reduce((logits - peak.unsqueeze(-1)).exp().sum(-1), vocabulary)
        local = target - start
        here = (local >= 0) & (local < length) & valid
        picked = logits.gather(-1, local.where(here, 0).unsqueeze(-1)).squeeze(-1)
        picked = _reduce(picked.masked_fill(~here, 0), vocabulary)
        losses = (total.log() + peak - picked).masked_fill(~valid, 0)
    else:
        losses = F.cross_entropy(logits, target, reduction="none", ignore_index=ignore_index)
    if reduction == 0:
        return losses
    if reduction == 2:
        return losses.sum()
    count = valid.sum()
    for group in _groups(shard, "b"):
        count = collectives.all_reduce(count, "sum", group)
    return losses.sum() / count


def batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    training: bool,
    momentum: float,
    eps: float,
    *,
    shard: Shard,
) -> tuple[torch.Tensor, ...]:
    """Batch normalization with the batch split: statistics of the whole batch on every rank."""
    groups = _groups(shard, "n")
    if not training or not groups:
        return torch.ops.aten._native_batch_norm_legit_functional.default(
            x, weight, bias, running_mean, running_var, training, momentum, eps
        )
    dims = [0, *range(2, x.ndim)]
    count = shard["n"][2] * math.prod(x.shape[2:])
    shape = [1, -1] + [1] * (x.ndim - 2)
    mean = _reduce(x.sum(dims), groups) / count
    centered = x - _vary(mean, groups).view(shape)
    var = _reduce(centered.square().sum(dims), groups) / count
    rstd = (var + eps).rsqrt()
    out = centered * _vary(rstd, groups).view(shape)
    if weight is not None:
        out = out * weight.view(shape)
    if bias is not None:
        out = out + bias.view(shape)
    unbiased = var.detach() * (count / max(count - 1, 1))
    new_mean = running_mean.lerp(mean.detach().to(running_mean.dtype), momentum)
    new_var = running_var.lerp(unbiased.to(running_var.dtype), momentum)
    return out, mean.detach(), rstd.detach(), new_mean, new_var


def mean(
    x: torch.Tensor,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
    *,
    shard: Shard,
) -> torch.Tensor:
    """Mean with reduced dims split: each rank's share of the mean, a pending sum."""
    scale = math.prod(length / size for n, (_, length, size, _) in shard.items() if n[0] == "r")
    dims = list(range(x.ndim)) if dim is None else list(dim)
    return torch.ops.aten.mean.dim(x, dims, keepdim, dtype=dtype) * scale


def mse_loss(
    x: torch.Tensor, target: torch.Tensor, reduction: int = 1, *, shard: Shard
) -> torch.Tensor:
    """Mean squared error with dims split: each rank's share of the mean, a pending sum."""
    assert reduction == 1
    scale = math.prod(length / size for _, length, size, _ in shard.values())
    return F.mse_loss(x, target) * scale


def dropout(
    x: torch.Tensor,
    p: float,
    train: bool | None = True,
    *,
    shard: Shard,
    seed: torch.Tensor,
    site: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`native_dropout` whose mask is a function of the step's seed."""
    if not train or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    keep = keep_mask(x, list(x.shape), p, seed, site[0], site[1])
    scale = 0.0 if p == 1 else 1 / (1 - p)
    return x * keep * scale, keep


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
    site: tuple[int, int],
) -> torch.Tensor:
    """Attention that drops probabilities by a replayable mask; the products are written out."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        rows, columns = scores.shape[-2:]
        allowed = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    keep = keep_mask(scores, list(scores.shape), dropout_p, seed, site[0], site[1])
    return (scores.softmax(-1) * keep * (1 / (1 - dropout_p))) @ value
