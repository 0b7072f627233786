"""Random ops: masks and draws are functions of the step's seed, and equal on replicas."""

from __future__ import annotations

import torch

from autopar.comm.random import keep_mask
from autopar.sharding.lowerings.shard import Shard

Stream = tuple[int, int]


def native_dropout(
    x: torch.Tensor,
    p: float,
    train: bool | None = True,
    *,
    shard: Shard,
    seed: torch.Tensor,
    stream: Stream,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`native_dropout`; also returns the mask of kept elements."""
    if not train or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    keep = keep_mask(x, list(x.shape), p, seed, stream[0], stream[1])
    scale = 0.0 if p == 1 else 1 / (1 - p)
    return x * keep * scale, keep


def dropout(
    x: torch.Tensor, p: float, train: bool, *, shard: Shard, seed: torch.Tensor, stream: Stream
) -> torch.Tensor:
    """`dropout`."""
    return native_dropout(x, p, train, shard=shard, seed=seed, stream=stream)[0]


def bernoulli(
    x: torch.Tensor, p: float, *, shard: Shard, seed: torch.Tensor, stream: Stream
) -> torch.Tensor:
    """`bernoulli.p`: ones with probability p, in the shape and dtype of x."""
    return keep_mask(x, list(x.shape), 1 - p, seed, stream[0], stream[1]).to(x.dtype)
