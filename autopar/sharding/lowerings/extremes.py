"""Maxima, minima, and what is true of any or of all, over split dims: complete on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autopar.sharding.lowerings.declared import (
    Declared,
    LocalCall,
    all_reduces,
    declares,
    first_result,
)
from autopar.sharding.lowerings.shard import Shard, counted, groups_of, largest, total

Dims = int | Sequence[int] | None


def _reduced(x: torch.Tensor, dim: Dims, shard: Shard) -> tuple[list[int], list[str]]:
    """Dims that are reduced, and the groups over which they (r0, r1, ...) are split."""
    listed = [dim] if isinstance(dim, int) else list(dim or ())
    groups = groups_of(shard, *(name for name in shard if name[0] == "r"))
    return listed or list(range(x.ndim)), groups


def _extremum(call: LocalCall) -> Declared:
    """The extremum; of floats also how often it occurs, and the sum that carries its gradient."""
    forward = 3 if call.floating else 1
    return all_reduces("r", first_result, forward=forward)(call)


@declares(_extremum)
def amax(x: torch.Tensor, dim: Dims = None, keepdim: bool = False, *, shard: Shard) -> torch.Tensor:
    """Largest value; its gradient is shared evenly by all elements that have it, wherever held."""
    dims, groups = _reduced(x, dim, shard)
    if not x.dtype.is_floating_point:
        return largest(x.amax(dims, keepdim=keepdim), groups)
    top = x == largest(x.amax(dims, keepdim=True), groups)
    ties = counted(top.to(x.dtype).sum(dims, keepdim=keepdim), groups)
    return total(x.where(top, 0).sum(dims, keepdim=keepdim), groups) / ties


@declares(_extremum)
def amin(x: torch.Tensor, dim: Dims = None, keepdim: bool = False, *, shard: Shard) -> torch.Tensor:
    """Smallest value, as `amax`."""
    if not x.dtype.is_floating_point:  # unsigned ones have no negatives
        return ~amax(~x, dim, keepdim, shard=shard)
    return -amax(-x, dim, keepdim, shard=shard)


@declares(all_reduces("r", first_result, forward=1))
def any_of(
    x: torch.Tensor, dim: Dims = None, keepdim: bool = False, *, shard: Shard
) -> torch.Tensor:
    """Whether any element is true."""
    dims, groups = _reduced(x, dim, shard)
    return largest((x != 0).any(dims, keepdim=keepdim).to(torch.uint8), groups) != 0


@declares(all_reduces("r", first_result, forward=1))
def all_of(
    x: torch.Tensor, dim: Dims = None, keepdim: bool = False, *, shard: Shard
) -> torch.Tensor:
    """Whether all elements are true."""
    return ~any_of(x == 0, dim, keepdim, shard=shard)
