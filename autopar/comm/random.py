"""Random masks that are a function of (step seed, stream, shard): replayable, and equal on ranks
that hold the same shard, independent on ranks that hold different ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# A prime near 2**61 keeps the mixed seed inside a signed 64-bit integer.
_MODULUS = (1 << 61) - 1


def mix_seed(seed: int, stream: int, shard: int) -> int:
    """Distinct generator seeds for distinct (step, random op, shard)."""
    value = seed % _MODULUS
    for part in (stream + 1, shard + 1):
        value = (value * 6364136223846793005 + part * 1442695040888963407) % _MODULUS
    return value


@torch.library.custom_op("autopar::keep_mask", mutates_args=())
def keep_mask(
    like: torch.Tensor, shape: Sequence[int], p: float, seed: torch.Tensor, stream: int, shard: int
) -> torch.Tensor:
    """Boolean mask of `shape` that is True with probability 1 - p, on the device of `like`.

    Args:
        seed: int64 scalar on the CPU, drawn anew every step.
        stream: which random op of the graph.
        shard: which shard of the global tensor this rank holds.
    """
    generator = torch.Generator(device=like.device)
    generator.manual_seed(mix_seed(int(seed), stream, shard))
    draw = torch.rand(list(shape), generator=generator, device=like.device, dtype=torch.float32)
    return draw >= p


@keep_mask.register_fake
def _(
    like: torch.Tensor, shape: Sequence[int], p: float, seed: torch.Tensor, stream: int, shard: int
) -> torch.Tensor:
    return like.new_empty(list(shape), dtype=torch.bool)
