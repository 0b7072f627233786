"""Attention of a few queries to keys that ranks have parts of, as of a token to a cache.

Each rank weights its own values, by what the softmax sums over all ranks (split keys, "flash
decoding"; Dao et al. 2023). Its result is a term of the sum over the ranks.
"""

from __future__ import annotations

import math

import torch

from autopar.operators.attention_blocks import accumulated
from autopar.sharding.lowerings.declared import Collective, Declared, LocalCall, declares
from autopar.sharding.lowerings.shard import Shard, groups_of, largest, shared


def _declared(call: LocalCall) -> Declared:
    rows = math.prod(call.first[:-1])
    moves = []
    for axis in call.splits.get("keys", ()):
        moves.append(Collective("all_reduce", axis, rows, 1, 0, wide=True))
        moves.append(Collective("all_reduce", axis, rows, 1, 1, wide=True))
    return Declared(tuple(moves))


@declares(_declared)
def split_keys(
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
    """Attention with the keys split, of as few queries that their scores may be written out.

    Args:
        query: [*b, q, d]
        key: [*b, own keys, d]
        value: [*b, own keys, e]
        attn_mask: broadcast to [*b, q, own keys]

    Returns:
        [*b, q, e], partial.
    """
    groups, high = groups_of(shard, "keys"), accumulated(query.dtype)
    if query.ndim > 2 and key.shape[-3] not in (1, query.shape[-3]):
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(repeats, -3) for x in (key, value))
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query.to(high) * factor) @ key.to(high).transpose(-2, -1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    top = largest(scores.amax(-1, keepdim=True), groups)
    top = top.masked_fill(top == float("-inf"), 0.0)  # no rank has a key that is seen
    weights = (scores - top).exp()
    own = weights.sum(-1, keepdim=True)
    seen = shared(own, groups)
    seen = seen.masked_fill(seen == 0, 1.0)
    return ((weights @ value.to(high)) / seen).to(query.dtype)
