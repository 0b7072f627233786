"""Vocabulary-split lookup and losses (Megatron-LM, arXiv:1909.08053, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from autopar.sharding.lowerings.declared import (
    Collective,
    Declared,
    LocalCall,
    all_reduces,
    declares,
    one_element,
)
from autopar.sharding.lowerings.shard import (
    Shard,
    counted,
    groups_of,
    largest,
    scaled,
    share_of,
    total,
)


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
    rows = torch.ops.aten.embedding.default(weight, local.where(here, 0), padding)
    return rows.masked_fill(~here.unsqueeze(-1), 0)


def _cross_entropy(call: LocalCall) -> Declared:
    """Along the vocabulary, per row: the peak, the normalizer, the class weight and the target's
    logit; with label smoothing also the sum of logits. The mean counts the rows of all ranks."""
    weight, target = call.operands[2], call.operands[1]
    assert target is not None
    smoothed = bool(call.arguments.get("label_smoothing"))
    collectives = []
    for axis in call.axes("v"):
        collectives.append(Collective("all_reduce", axis, math.prod(target), 4 + smoothed))
        if smoothed and weight is not None:
            collectives.append(Collective("all_reduce", axis, 1, 1))
    if call.arguments.get("reduction", 1) == 1:
        collectives += [Collective("all_reduce", axis, 1, 1) for axis in call.axes("bs")]
    return Declared(tuple(collectives))


@declares(_cross_entropy)
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
    """Cross-entropy of logits [b, v, ...] and classes [b, ...] with any dims split.

    Over split rows (all factors but v) the result is a pending sum; over a split vocabulary it is
    complete. Neither the full vocabulary nor its probabilities are ever gathered.
    """
    if "v" not in shard:
        losses = F.cross_entropy(
            logits, target, weight, None, ignore_index, None, "none", label_smoothing
        )
        scales = _scales(target, weight, ignore_index).to(losses.dtype)
    else:
        losses, scales = _split_vocabulary(
            logits, target, weight, ignore_index, label_smoothing, shard
        )
    if reduction == 0:
        return losses
    if reduction == 2:
        return losses.sum()
    rows = groups_of(shard, *(name for name in shard if name != "v"))
    return losses.sum() / counted(scales.sum(), rows)


@declares(_cross_entropy)
def token_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    shard: Shard,
) -> torch.Tensor:
    """`cross_entropy` of logits [*b, v] and classes [*b]."""
    losses = cross_entropy(
        logits.flatten(0, -2), target.flatten(), weight, reduction, ignore_index,
        label_smoothing, shard=shard,
    )  # fmt: skip
    return losses.view(target.shape) if reduction == 0 else losses


def _scales(target: torch.Tensor, weight: torch.Tensor | None, ignored: int) -> torch.Tensor:
    """What each row counts in the mean."""
    valid = target != ignored
    return valid if weight is None else weight[target.where(valid, 0)].where(valid, 0)


def _split_vocabulary(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    shard: Shard,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each row, and what it counts in the mean."""
    start, length, size, vocabulary = shard["v"]
    valid = target != ignore_index
    local = target - start
    here = (local >= 0) & (local < length) & valid
    index = local.where(here, 0)
    peak = largest(logits.amax(1), vocabulary)
    shifted = logits - peak.unsqueeze(1)
    normalizer = total(shifted.exp().sum(1), vocabulary).log()
    # what the target adds, from the rank that holds its class
    picked = shifted.gather(1, index.unsqueeze(1)).squeeze(1)
    scale = here.to(logits.dtype) if weight is None else weight[index].where(here, 0)
    scales = counted(scale, vocabulary)
    losses = scales * normalizer - total(picked.where(here, 0) * scale, vocabulary)
    if label_smoothing:
        per_class = [-1] + [1] * (logits.ndim - 2)
        every = shifted if weight is None else shifted * weight.view(per_class)
        summed = total(every.sum(1), vocabulary)
        weights = float(size) if weight is None else counted(weight.sum(), vocabulary)
        smooth = (normalizer * weights - summed).where(valid, 0)
        losses = (1 - label_smoothing) * losses + label_smoothing / size * smooth
    return losses, scales


@declares(all_reduces("bs", one_element, forward=1))
def nll_loss(
    log_probabilities: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    *,
    shard: Shard,
) -> torch.Tensor:
    """Negative log likelihood [b, v, ...], [b, ...] with rows split: a pending sum."""
    losses = F.nll_loss(log_probabilities, target, weight, None, ignore_index, None, "sum")
    count = _scales(target, weight, ignore_index).sum()
    return losses / counted(count, groups_of(shard, *shard))


def share_of_mean(op: torch._ops.OpOverload) -> Callable[..., torch.Tensor]:
    """A lowering of a mean with dims split: each rank's share of the mean, a pending sum."""

    def lowering(*args: Any, shard: Shard, **kwargs: Any) -> torch.Tensor:
        return op(*args, **kwargs) * share_of(shard, shard)

    lowering.__name__ = f"share_of_{op._opname}"
    return scaled(lowering)
