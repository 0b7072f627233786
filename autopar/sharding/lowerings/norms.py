"""Normalizations and softmax whose normalized dims are split: every rank gets global statistics.

Each rank sums over its shard, and the sums are all-reduced. The result is varying: every rank uses
it for its own shard, so gradients of the statistics are all-reduced too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from autopar.sharding.lowerings.declared import (
    Declared,
    LocalCall,
    all_reduces,
    declares,
    first_result,
    statistics_over,
)
from autopar.sharding.lowerings.shard import (
    Shard,
    groups_of,
    largest,
    scaled,
    share_of,
    shared,
    total,
)

Optional = torch.Tensor | None


def _centered(
    x: torch.Tensor, dims: list[int], shard: Shard, factors: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, x minus its mean, and (biased) variance over `dims` of all ranks; dims are kept."""
    groups = groups_of(shard, *factors)
    count = math.prod(x.shape[d] for d in dims) / share_of(shard, factors)
    mean = shared(x.sum(dims, keepdim=True), groups) / count
    centered = x - mean
    return mean, centered, shared(centered.square().sum(dims, keepdim=True), groups) / count


# Passes over the operand, forward and backward, of a normalization that is written out.
_PASSES = 12


def _affine(x: torch.Tensor, weight: Optional, bias: Optional) -> torch.Tensor:
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


def _affine_by_channel(x: torch.Tensor, weight: Optional, bias: Optional) -> torch.Tensor:
    """Of x [n, c, ...] with weight and bias [c]."""
    shape = [-1] + [1] * (x.ndim - 2)
    weight, bias = (None if t is None else t.view(shape) for t in (weight, bias))
    return _affine(x, weight, bias)


def _normalized(shape: Sequence[int]) -> tuple[list[int], list[str]]:
    """The normalized dims, counted from the end, and their factors."""
    return list(range(-len(shape), 0)), [f"h{i}" for i in range(len(shape))]


@declares(all_reduces("h", statistics_over("h"), forward=2, backward=2, passes=_PASSES))
def layer_norm(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: Optional = None,
    bias: Optional = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
    *,
    shard: Shard,
) -> torch.Tensor:
    """Layer normalization; the normalized dims are the factors h0, h1, ..."""
    dims, factors = _normalized(normalized_shape)
    _, centered, variance = _centered(x, dims, shard, factors)
    return _affine(centered * (variance + eps).rsqrt(), weight, bias)


@declares(all_reduces("h", statistics_over("h"), forward=1, backward=1, passes=_PASSES))
def rms_norm(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: Optional = None,
    eps: float | None = None,
    *,
    shard: Shard,
) -> torch.Tensor:
    """Root-mean-square normalization; the normalized dims are the factors h0, h1, ..."""
    dims, factors = _normalized(normalized_shape)
    count = math.prod(x.shape[d] for d in dims) / share_of(shard, factors)
    mean = shared(x.square().sum(dims, keepdim=True), groups_of(shard, *factors)) / count
    return _affine(
        x * (mean + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt(), weight, None
    )


def _groups(call: LocalCall) -> int:
    """Groups of channels of all samples on this rank."""
    parts = math.prod(call.mesh[a] for a in call.axes("c"))
    return call.first[0] * int(call.arguments["num_groups"]) // parts


@declares(all_reduces("s", _groups, forward=2, backward=2, passes=_PASSES))
def group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: Optional = None,
    bias: Optional = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
    *,
    shard: Shard,
) -> torch.Tensor:
    """Group normalization with groups of channels (c) or the space (s0, s1, ...) split."""
    local = round(num_groups * share_of(shard, ["c"]))
    space = [name for name in shard if name.startswith("s")]
    if not space:
        return F.group_norm(x, local, weight, bias, eps)
    grouped = x.unflatten(1, (local, -1))
    _, centered, variance = _centered(grouped, list(range(2, grouped.ndim)), shard, space)
    return _affine_by_channel((centered * (variance + eps).rsqrt()).flatten(1, 2), weight, bias)


_batch_statistics = all_reduces("ns", statistics_over("ns"), forward=2, backward=2)


def _in_training(call: LocalCall) -> Declared:
    return _batch_statistics(call) if call.arguments["training"] else Declared()


@declares(_in_training)
def batch_norm(
    x: torch.Tensor,
    weight: Optional,
    bias: Optional,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    training: bool,
    momentum: float,
    eps: float,
    *,
    shard: Shard,
) -> tuple[torch.Tensor, ...]:
    """Batch normalization with batch (n) and space (s0, ...) split: statistics of the global
    batch on every rank; returns (result, mean, rstd, new running mean, new running variance)."""
    if not training or not _batch_factors(shard):
        return torch.ops.aten._native_batch_norm_legit_functional.default(
            x, weight, bias, running_mean, running_var, training, momentum, eps
        )
    out, mean, var, count = _batch_norm(x, weight, bias, eps, shard)
    unbiased = var * (count / max(count - 1, 1))
    new_mean = running_mean.lerp(mean.to(running_mean.dtype), momentum)
    new_var = running_var.lerp(unbiased.to(running_var.dtype), momentum)
    return out, mean, (var + eps).rsqrt(), new_mean, new_var


@declares(_batch_statistics)
def batch_norm_without_running(
    x: torch.Tensor,
    weight: Optional,
    bias: Optional,
    training: bool,
    momentum: float,
    eps: float,
    *,
    shard: Shard,
) -> tuple[torch.Tensor, ...]:
    """As `batch_norm`, without running statistics; returns (result, mean, rstd)."""
    out, mean, var, _ = _batch_norm(x, weight, bias, eps, shard)
    return out, mean, (var + eps).rsqrt()


def _batch_factors(shard: Shard) -> list[str]:
    return [name for name in shard if name != "c"]


def _batch_norm(
    x: torch.Tensor, weight: Optional, bias: Optional, eps: float, shard: Shard
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Result, mean and variance (without gradients), and the number of values per channel."""
    dims = [0, *range(2, x.ndim)]
    factors = _batch_factors(shard)
    mean, centered, variance = _centered(x, dims, shard, factors)
    out = _affine_by_channel(centered * (variance + eps).rsqrt(), weight, bias)
    count = round(math.prod(x.shape[d] for d in dims) / share_of(shard, factors))
    return out, mean.detach().flatten(), variance.detach().flatten(), count


@declares(all_reduces("s", statistics_over("s"), forward=2, backward=1, passes=_PASSES))
def softmax(
    x: torch.Tensor, dim: int, dtype: torch.dtype | None = None, *, shard: Shard
) -> torch.Tensor:
    """Softmax over the split dim s."""
    return log_softmax(x, dim, dtype, shard=shard).exp()


@declares(all_reduces("s", statistics_over("s"), forward=2, backward=1, passes=_PASSES))
def log_softmax(
    x: torch.Tensor, dim: int, dtype: torch.dtype | None = None, *, shard: Shard
) -> torch.Tensor:
    """Logarithm of softmax over the split dim s."""
    groups = groups_of(shard, "s")
    x = x if dtype is None else x.to(dtype)
    peak = largest(x.amax(dim, keepdim=True), groups)
    shifted = x - peak
    return shifted - shared(shifted.exp().sum(dim, keepdim=True), groups).log()


def _reduced(shard: Shard) -> list[str]:
    return [name for name in shard if name[0] == "r"]


@scaled
def mean(
    x: torch.Tensor,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
    *,
    shard: Shard,
) -> torch.Tensor:
    """Mean with reduced dims (r0, r1, ...) split: each rank's share of it, a pending sum."""
    share = share_of(shard, _reduced(shard))
    return torch.ops.aten.mean.dim(x, list(dim or range(x.ndim)), keepdim, dtype=dtype) * share


@scaled
def mean_of_all(x: torch.Tensor, dtype: torch.dtype | None = None, *, shard: Shard) -> torch.Tensor:
    """Mean of all values: each rank's share of it, a pending sum."""
    return mean(x, None, False, dtype, shard=shard)


def pool_to_one(x: torch.Tensor, output_size: Sequence[int], *, shard: Shard) -> torch.Tensor:
    """Adaptive average pooling to one value per channel: a mean over the space."""
    return mean(x, list(range(-len(output_size), 0)), True, shard=shard)


@declares(all_reduces("r", first_result, forward=1))
def vector_norm(
    x: torch.Tensor,
    ord: float = 2,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    shard: Shard,
) -> torch.Tensor:
    """Euclidean norm with reduced dims (r0, ...) split; complete on every rank."""
    x = x if dtype is None else x.to(dtype)
    squares = x.square().sum(list(dim or range(x.ndim)), keepdim=keepdim)
    squares = total(squares, groups_of(shard, *_reduced(shard)))
    none = squares == 0  # there the root has no derivative, and the norm uses 0
    return squares.masked_fill(none, 1).sqrt().masked_fill(none, 0)
