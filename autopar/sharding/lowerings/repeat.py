"""Repetition whose call states the extent of the global result."""

from __future__ import annotations

import torch

from autopar.sharding.lowerings.shard import Shard


def interleave(
    x: torch.Tensor, repeats: int, dim: int, output_size: int | None = None, *, shard: Shard
) -> torch.Tensor:
    """Every element `repeats` times; the size of a shard follows from its elements."""
    return torch.ops.aten.repeat_interleave.self_int(x, repeats, dim)
