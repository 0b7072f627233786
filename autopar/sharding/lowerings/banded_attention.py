"""Attention in a band around each query, over a split sequence.

A rank fetches the keys and values that the windows of its queries reach into and that its
neighbors hold (the halo), and nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from autopar.comm.fetch import Fetch
from autopar.comm.groups import find_group
from autopar.comm.spans import Span, chunks
from autopar.ir.spec import local_range
from autopar.operators.banded_attention import Band, in_band
from autopar.sharding.lowerings import attention
from autopar.sharding.lowerings.declared import Collective, Declared, LocalCall, declared, declares
from autopar.sharding.lowerings.shard import Shard
from autopar.sharding.rule import Shape

# Passes over the queries: keys and values are joined with what was fetched, and cut apart again.
_PASSES = 4


def _wanted(
    queries: int, keys: int, band: Band, halo: Sequence[tuple[int, int]],
    inner: Sequence[tuple[int, int]],
) -> tuple[list[Span], list[Span]]:  # fmt: skip
    """Per rank along the halo's axis, its queries and the keys that they see.

    Args:
        halo: (ranks, this rank) of the axis that splits queries and keys; empty if there is none.
        inner: of the axes that split the queries alone.
    """
    split = [*halo, *inner]
    sizes, own = [n for n, _ in split], [i for _, i in split]
    spans = []
    for rank in range(halo[0][0] if halo else 1):
        coords = [rank, *own[1:]] if halo else own
        spans.append(local_range(queries, range(len(split)), sizes, coords))
    return spans, [band.keys(span, keys) for span in spans]


def _fetch(
    queries: int, keys: int, band: Band, halo: tuple[int, int],
    inner: Sequence[tuple[int, int]], group: str,
) -> Fetch:  # fmt: skip
    """The exchange of keys along the halo's axis, which all its groups make if one must: programs
    of ranks have the same operators."""
    held = chunks(keys, halo[0])

    def fetch(coords: Sequence[int], moves: bool | None = None) -> Fetch:
        at = [(n, i) for (n, _), i in zip(inner, coords, strict=True)]
        return Fetch(held, _wanted(queries, keys, band, [halo], at)[1], halo[1], group, moves)

    moves = any(fetch(c).moves for c in itertools.product(*(range(n) for n, _ in inner)))
    return fetch([i for _, i in inner], moves)


def _lengths(shapes: Sequence[Shape | None]) -> tuple[int, int]:
    query, key = shapes[0], shapes[1]
    assert query is not None and key is not None
    return query[-2], key[-2]


def _band(before: int | None, after: int | None) -> Band:
    return Band(None if before is None else -before, after)


def _declared(call: LocalCall) -> Declared:
    """The exchange of keys and values with the ranks that windows reach."""
    axes = call.splits.get("halo", ())
    if not axes:
        return Declared()
    ranks: Mapping[str, list[tuple[int, int]]] = {
        name: [(call.mesh[a], call.coords[a]) for a in own] for name, own in call.splits.items()
    }
    queries, keys = _lengths([call.arguments[n] for n in ("query", "key")])
    band = _band(call.arguments.get("before"), call.arguments.get("after"))
    fetch = _fetch(queries, keys, band, ranks["halo"][0], ranks.get("q", ()), "")
    per_row = 0
    for shape in call.operands[1:3]:
        assert shape is not None
        per_row += math.prod(shape) // shape[-2]
    elements = fetch.elements(per_row)
    if not elements:
        return Declared(passes=_PASSES)
    return Declared((Collective("exchange", axes[0], elements, 1, 1),), _PASSES)


@declares(_declared)
def split_banded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    before: int | None,
    after: int | None,
    key_mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    shard: Shard,
    shapes: Sequence[Shape | None],
) -> torch.Tensor:
    """Attention in a band with queries and keys split (halo), and queries alone (q)."""
    groups = {name: part[3] for name, part in shard.items()}
    ranks = {
        name: [(g.size, g.index) for g in map(find_group, groups.get(name, ()))]
        for name in ("halo", "q")
    }
    queries, keys = _lengths(shapes)
    band = _band(before, after)
    own, wanted = _wanted(queries, keys, band, ranks["halo"], ranks["q"])
    me = 0
    if ranks["halo"]:
        _, me = halo = ranks["halo"][0]
        key, value = _fetch(queries, keys, band, halo, ranks["q"], groups["halo"][0])(key, value)
    else:
        key, value = (x.narrow(-2, *wanted[0]) for x in (key, value))
    if key_mask is not None:
        key_mask = key_mask.narrow(-1, *wanted[me])
    return in_band(query, key, value, key_mask, band.moved(own[me][0] - wanted[me][0]), scale)


def _declared_causal(call: LocalCall) -> Declared:
    causal = replace(call, arguments={**call.arguments, "is_causal": True})
    return declared(attention.split_attention, causal)


@declares(_declared_causal)
def split_causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    before: int | None,
    after: int | None,
    key_mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    shard: Shard,
    shapes: Sequence[Shape | None],
) -> torch.Tensor:
    """The same where a query sees all keys up to it, of as many: as causal attention is split, with
    the mask of the keys."""
    return attention.split_attention(
        query, key, value, key_mask, 0.0, True, scale=scale, enable_gqa=enable_gqa, shard=shard,
        shapes=shapes,
    )  # fmt: skip
