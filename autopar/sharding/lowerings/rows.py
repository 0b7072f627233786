"""Rows of a tensor that ranks have parts of."""

from __future__ import annotations

import torch

from autopar.sharding.lowerings.shard import Shard


def copy_own_rows(
    x: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, *, shard: Shard
) -> torch.Tensor:
    """`index_copy` where this rank has a part of the rows along `dim`.

    A single row is written where it is, or over itself where it is another rank's: the rest of the
    rows is not touched.

    Args:
        x: [*a, own rows, *b]
        index: [n], of all rows.
        source: [*a, n, *b]
    """
    start, count = shard["rows"][:2] if "rows" in shard else (0, x.shape[dim])
    if "rows" not in shard:
        return x.index_copy(dim, index, source)
    own = index - start
    inside = (own >= 0) & (own < count)
    along = [-1 if d == dim % x.ndim else 1 for d in range(x.ndim)]
    if len(index) == 1:
        at = own.clamp(0, count - 1)
        row = torch.where(inside.view(along), source, x.index_select(dim, at))
        return x.index_copy(dim, at, row)
    # which row of the source each of these rows takes; the last place is for rows of others
    numbers = torch.arange(len(index), device=index.device)
    places = torch.where(inside, own, count)
    taken = torch.full((count + 1,), -1, device=index.device).index_copy(0, places, numbers)
    taken = taken[:count]
    rows = source.index_select(dim, taken.clamp_min(0))
    return torch.where((taken >= 0).view(along), rows, x)
