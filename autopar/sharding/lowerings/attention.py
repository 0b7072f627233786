"""Attention over a split sequence, and with dropout that can be replayed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from autopar.comm.groups import find_group
from autopar.comm.random import keep_mask
from autopar.comm.spans import (
    Span,
    Spans,
    collect,
    length_of,
    moved_elements,
    regroup,
    spread,
    zigzag,
)
from autopar.ir.spec import chunk, local_range
from autopar.sharding.lowerings.declared import Collective, Declared, LocalCall, declares
from autopar.sharding.lowerings.ring_attention import Ring, ring_attention
from autopar.sharding.lowerings.shard import Shard
from autopar.sharding.rule import Shape

# Of a factor, per mesh axis that splits it: ranks, and which of them.
_Ranks = Sequence[tuple[int, int]]

# Passes over the queries per further block: its results are merged, its gradients added.
_PASSES = 7


@dataclass(frozen=True)
class _Heads:
    """Which query heads a rank gets for its part of the sequence, and which key heads it needs.

    Args:
        group: query heads that share a key head.
        queries, keys: spans of heads of every rank.
        query_lengths, key_lengths: of the sequence, on every rank.
    """

    group: int
    queries: tuple[Span, ...]
    keys: tuple[Span, ...]
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]

    @staticmethod
    def of(query: Shape, key: Shape, queries: int, keys: int, ranks: int) -> _Heads:
        """Heads of operands of these shapes by torch.chunk's rule; of the keys as few as these
        need.

        Args:
            queries, keys: of all ranks together.
        """
        own = tuple(chunk(query[-3], ranks, r) for r in range(ranks))
        group = query[-3] // key[-3]
        shared = tuple(
            (start // group, (start + n - 1) // group + 1 - start // group) for start, n in own
        )
        lengths = [tuple(chunk(n, ranks, r)[1] for r in range(ranks)) for n in (queries, keys)]
        return _Heads(group, own, shared, lengths[0], lengths[1])

    def alike(self, rank: int) -> list[int]:
        """For each of a rank's query heads, which of its key heads it attends to."""
        start, n = self.queries[rank]
        first, _ = self.keys[rank]
        group = self.group
        return [(start + i) // group - first for i in range(n)]


@dataclass(frozen=True)
class _Layout:
    """Where queries and keys are.

    Args:
        factor: whose outermost axis the queries are balanced along ("ring" or "q"), or "".
        queries: spans of the ranks along it, as shards and as computed with.
        keys: spans of the ranks on the ring, likewise.
    """

    factor: str
    queries: tuple[list[Spans], list[Spans]]
    keys: tuple[list[Spans], list[Spans]]

    @staticmethod
    def of(queries: int, keys: int, ranks: Mapping[str, _Ranks], causal: bool) -> _Layout:
        """Of as many queries and keys in all."""
        factor = next((f for f in ("ring", "q") if ranks.get(f)), "")
        ring, inner = ranks.get("ring", ()), ranks.get("q", ())
        split = [*ring, *inner]
        sizes, own = [n for n, _ in split], [i for _, i in split]

        def held(rank: int) -> Spans:
            return (local_range(queries, range(len(split)), sizes, [rank, *own[1:]]),)

        shards = [held(r) for r in range(sizes[0] if factor else 1)]
        of_keys: list[Spans] = [((0, keys),)]
        if ring:
            of_keys = [(chunk(keys, ring[0][0], r),) for r in range(ring[0][0])]
        if not causal or not factor:
            return _Layout(factor, (shards, shards), (of_keys, of_keys))
        balanced = zigzag(of_keys) if ring else of_keys
        return _Layout(factor, (shards, zigzag(shards)), (of_keys, balanced))


def _lengths(shapes: Sequence[Shape | None]) -> tuple[int, int]:
    """Of all queries and all keys."""
    query, key = shapes[0], shapes[1]
    assert query is not None and key is not None
    return query[-2], key[-2]


def _heads(
    query: Shape, key: Shape, queries: int, keys: int, ranks: Mapping[str, _Ranks]
) -> _Heads | None:
    """How heads are exchanged, by local shapes of the operands; None if they are not."""
    if "exchange" not in ranks:
        return None
    outer = [*ranks.get("ring", ()), *ranks.get("q", ())]
    ring = ranks.get("ring", ())
    return _Heads.of(query, key, _part(queries, outer), _part(keys, ring), ranks["exchange"][0][0])


def _part(size: int, ranks: _Ranks) -> int:
    """Of a dim of that size, on this rank."""
    return local_range(size, range(len(ranks)), [n for n, _ in ranks], [i for _, i in ranks])[1]


def _of_own_heads(
    heads: _Heads, rank: int, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys and values for a rank's query heads, and the mask of these."""
    index = heads.alike(rank)
    share = len(index) // key.shape[-3]
    if index != [i // share for i in range(len(index))]:  # not the same number for each
        key, value = (torch.cat([x.narrow(-3, i, 1) for i in index], -3) for x in (key, value))
    if mask is not None and mask.ndim > 2 and mask.shape[-3] > 1:
        mask = mask.narrow(-3, *heads.queries[rank])
    return key, value, mask


def _balanced(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    layout: _Layout, groups: Mapping[str, Sequence[str]], causal: bool, scale: float,
) -> torch.Tensor:  # fmt: skip
    ring = groups["ring"][0] if "ring" in groups else None
    along = groups[layout.factor][0] if layout.factor else None
    held, wanted = layout.queries
    if along is not None and held != wanted:
        query = regroup(query, -2, held, wanted, along)
    if ring is not None and layout.keys[0] != layout.keys[1]:
        key, value = (regroup(x, -2, *layout.keys, ring) for x in (key, value))
    me = 0 if along is None else find_group(along).index
    out = ring_attention(
        query, key, value, mask, Ring(wanted[me], tuple(layout.keys[1]), ring, causal, scale)
    )
    return regroup(out, -2, wanted, held, along) if along is not None and held != wanted else out


def _declared(call: LocalCall) -> Declared:
    """The moves of queries, keys, values and results, and the blocks that travel."""
    ranks = {
        name: [(call.mesh[a], call.coords[a]) for a in axes] for name, axes in call.splits.items()
    }
    axis = {name: axes[0] for name, axes in call.splits.items()}
    query, key, value = (_shape(call, k) for k in range(3))
    queries, keys = _lengths([call.arguments[n] for n in ("query", "key")])
    moves: list[Collective] = []
    saved = 0
    heads = _heads(query, key, queries, keys, ranks)
    if heads is not None:
        me = ranks["exchange"][0][1]
        operands = (
            (query, heads.queries, heads.query_lengths),
            (key, heads.keys, heads.key_lengths),
            (value, heads.keys, heads.key_lengths),
            ((*query[:-1], value[-1]), heads.queries, heads.query_lengths),
        )
        for shape, spans, lengths in operands:
            rest = math.prod(shape[:-3]) * shape[-1]
            sent = rest * shape[-2] * length_of(tuple(spans))
            received = rest * sum(lengths) * spans[me][1]
            moves.append(Collective("exchange", axis["exchange"], max(sent, received), 1, 1))
        query = (*query[:-3], heads.queries[me][1], sum(heads.query_lengths), query[-1])
        own_keys = heads.keys[me][1]
        index = heads.alike(me)
        if index != [i // (len(index) // own_keys) for i in range(len(index))]:
            own_keys = len(index)
        saved -= math.prod(key) + math.prod(value)
        key, value = ((*s[:-3], own_keys, sum(heads.key_lengths), s[-1]) for s in (key, value))
        saved += math.prod(key) + math.prod(value)
    if call.arguments.get("is_causal") or "ring" in ranks:
        layout = _Layout.of(queries, keys, ranks, bool(call.arguments.get("is_causal")))
        moves += _balancing(layout, ranks, axis, query, key, value)
    if moves:  # the result as it was computed, beside the one that is returned
        saved += math.prod(call.results[0])
    if "ring" not in ranks:
        return Declared(tuple(moves), saved=saved)
    size, me = ranks["ring"][0]
    per_key = (math.prod(key) // key[-2]) + (math.prod(value) // value[-2])
    elements = [per_key * length_of(spans) for spans in layout.keys[1]]
    for step in range(size):
        most = max(elements[(me - step) % size], elements[(me - step - 1) % size])
        travels = int(step < size - 1)
        moves.append(Collective("exchange", axis["ring"], most, travels, travels, beside=True))
        moves.append(Collective("exchange", axis["ring"], most, 0, 1, wide=True, beside=True))
    return Declared(tuple(moves), _PASSES * (size - 1), saved=saved)


def _shape(call: LocalCall, operand: int) -> Shape:
    shape = call.operands[operand]
    assert shape is not None
    return shape


def _balancing(
    layout: _Layout, ranks: Mapping[str, _Ranks], axis: Mapping[str, int],
    query: Shape, key: Shape, value: Shape,
) -> Iterator[Collective]:  # fmt: skip
    """Moves between shards and what is computed with."""
    if layout.factor and layout.queries[0] != layout.queries[1]:
        _, me = ranks[layout.factor][0]
        lead = math.prod(query[:-2])
        for width in (query[-1], value[-1]):
            elements = moved_elements(*layout.queries, me, lead * width)
            yield Collective("exchange", axis[layout.factor], elements, 1, 1)
    if "ring" in ranks and layout.keys[0] != layout.keys[1]:
        _, me = ranks["ring"][0]
        for shape in (key, value):
            rest = math.prod(shape) // shape[-2]
            elements = moved_elements(*layout.keys, me, rest)
            yield Collective("exchange", axis["ring"], elements, 1, 1)


@declares(_declared)
def split_attention(
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
    shapes: Sequence[Shape | None],
) -> torch.Tensor:
    """Attention with the sequence split: queries alone (q), keys on a ring (ring), or, in exchange
    for a part of the heads, both (exchange; Jacobs et al. 2023, "DeepSpeed Ulysses").

    Causal work is balanced: each rank computes with the first and the last of the halves of the
    shards that two ranks hold, and hands the results back.
    """
    groups = {name: part[3] for name, part in shard.items()}
    ranks = {
        name: [(g.size, g.index) for g in map(find_group, names)] for name, names in groups.items()
    }
    queries, keys = _lengths(shapes)
    heads = _heads(query.shape, key.shape, queries, keys, ranks)
    if heads is not None:
        (group,) = groups["exchange"]
        query = spread(query, -3, heads.queries, -2, heads.query_lengths, group)
        key, value = (spread(x, -3, heads.keys, -2, heads.key_lengths, group) for x in (key, value))
        key, value, attn_mask = _of_own_heads(heads, ranks["exchange"][0][1], key, value, attn_mask)
    if is_causal or "ring" in shard:
        layout = _Layout.of(queries, keys, ranks, is_causal)
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        out = _balanced(query, key, value, attn_mask, layout, groups, is_causal, factor)
    else:
        grouped = query.ndim > 2 and key.shape[-3] not in (1, query.shape[-3])
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask, scale=scale, enable_gqa=enable_gqa or grouped
        )
    if heads is not None:
        out = collect(out, -3, heads.queries, -2, heads.query_lengths, groups["exchange"][0])
    return out


def _causal(start: int, queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """[queries, keys]: which of the keys come no later than each query, the first being `start`."""
    rows = torch.arange(start, start + queries, device=device)
    return torch.arange(keys, device=device) <= rows.unsqueeze(-1)


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
    stream: tuple[int, int],
) -> torch.Tensor:
    """Attention that drops probabilities by a replayable mask; the products are written out."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        start = shard["q"][0] if "q" in shard else 0
        allowed = _causal(start, scores.shape[-2], scores.shape[-1], query.device)
        scores = scores.masked_fill(~allowed, float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    keep = keep_mask(scores, list(scores.shape), dropout_p, seed, stream[0], stream[1])
    # as torch does: a query that sees no key has a result of zeros
    softmax = torch.softmax if attn_mask is None else torch.ops.aten._safe_softmax
    # a mask may be float32 beside queries of fewer bits
    weights = softmax(scores, -1).to(value.dtype)
    return (weights * keep * (1 / (1 - dropout_p))) @ value
