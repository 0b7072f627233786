"""What lowerings share: the split factors of a call, and reductions over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from autopar.comm import steps

Shard = Mapping[str, tuple[int, int, int, Sequence[str]]]


def groups_of(shard: Shard, *factors: str) -> list[str]:
    """Communicators of those of the factors that are split."""
    return [g for name in factors if name in shard for g in shard[name][3]]


def share_of(shard: Shard, factors: Iterable[str]) -> float:
    """This rank's part of the extents of those of the factors that are split."""
    share = 1.0
    for name in factors:
        if name in shard:
            share *= shard[name][1] / shard[name][2]
    return share


# Lowerings that are their operator on the shard, times the shard's share of the extents.
_SCALED: set[Callable[..., Any]] = set()


def scaled(lowering: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a lowering that is its operator on the shard, times the shard's share of the extents."""
    _SCALED.add(lowering)
    return lowering


def is_scaled(lowering: Callable[..., Any] | None) -> bool:
    """Whether a lowering is its operator on the shard, times the shard's share of the extents."""
    return lowering in _SCALED


def total(x: torch.Tensor, groups: Sequence[str]) -> torch.Tensor:
    """Sum over the groups, complete on every rank; its gradient is the same on every rank."""
    for group in groups:
        x = steps.all_reduce(x, group)
    return x


def varying(x: torch.Tensor, groups: Sequence[str]) -> torch.Tensor:
    """The same value, used differently by every rank: its gradient is summed over the groups."""
    for group in groups:
        x = steps.vary(x, group)
    return x


def shared(x: torch.Tensor, groups: Sequence[str]) -> torch.Tensor:
    """Sum over the groups for use in what each rank computes of its own part."""
    return varying(total(x, groups), groups)


def largest(x: torch.Tensor, groups: Sequence[str]) -> torch.Tensor:
    """Maximum over the groups, without a gradient."""
    x = x.detach()
    for group in groups:
        x = torch.ops.autopar.all_reduce(x, "max", group)
    return x


def counted(x: torch.Tensor, groups: Sequence[str]) -> torch.Tensor:
    """Sum over the groups, without a gradient."""
    x = x.detach()
    for group in groups:
        x = torch.ops.autopar.all_reduce(x, "sum", group)
    return x
