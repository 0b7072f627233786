"""Attention: split over batch, heads (grouped-query heads with their keys), queries and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from autopar.sharding.lowerings import attention, banded_attention
from autopar.sharding.lowerings.split_keys import split_keys
from autopar.sharding.rule import Row


def _has_dropout(arguments: Mapping[str, Any]) -> bool:
    return bool(arguments.get("dropout_p"))


def _shares_keys(arguments: Mapping[str, Any]) -> bool:
    return bool(arguments.get("enable_gqa"))


def _shares_mask(arguments: Mapping[str, Any]) -> bool:
    """Whether all queries have the same mask."""
    mask = arguments.get("attn_mask")
    return mask is not None and len(mask) > 1 and mask[-2] == 1


def _is_causal(arguments: Mapping[str, Any]) -> bool:
    return bool(arguments.get("is_causal"))


def _has_few_queries(arguments: Mapping[str, Any]) -> bool:
    """Whether scores are small beside the keys, as those of a token to a cache."""
    query, key = arguments["query"], arguments["key"]
    few = query[-2] <= _FEW and query[-2] * _FEW <= key[-2]
    return few and not _is_causal(arguments) and not _has_dropout(arguments)


# If queries are split (q), keys and values are not: every rank needs all of them. On a ring they
# are, and travel. Where heads share keys there may be fewer than ranks, so that no conversion can
# exchange a part of the sequence for a part of them: the lowering does that (exchange).
_SDPA = "*b q [d], *b [k] [d], *b [k] e, *b q [k] -> *b q e"
_RING = "*b ring:axis|q [d], *b ring [d], *b ring e, *b ring|q [k] -> *b ring|q e"
_EXCHANGE = (
    "*b ring:axis|q|exchange:axis [d], *b ring|exchange [d], *b ring|exchange e, *b ring|q [k] "
    "-> *b ring|q|exchange e"
)  # fmt: skip
# Queries of a token that share keys are at most so many, and so many times fewer than keys.
_FEW = 8
_SPLIT_KEYS = "*b q [d], *b keys:lowered [d], *b keys e, *b q keys -> *b q e"
_HEADS = {"exchange": (0, -3)}
_VALUES: tuple[tuple[int, ...], ...] = ((2,),)
_SCORES_REPEATED = ("e",)


def _row(notation: str, **options: Any) -> Row:
    return Row(
        notation, linear=_VALUES, lowering=attention.split_attention, half=_SCORES_REPEATED,
        moves=_HEADS if "exchange" in notation else {}, **options,
    )  # fmt: skip


def _sees_all_before(arguments: Mapping[str, Any]) -> bool:
    """Whether a query sees the keys up to it, of as many as there are queries."""
    bounds = arguments.get("before"), arguments.get("after")
    return bounds == (None, 0) and arguments["query"][-2] == arguments["key"][-2]


def _lowered(notation: str) -> str:
    """The same, with a lowering for split queries."""
    return notation.replace("|q", "|q:lowered", 1)


def _of_any_query(notation: str) -> str:
    """The same, with a mask that is of all queries, and of which every rank has all keys."""
    return notation.replace("ring|q [k]", "[o] [k]")


ROWS: dict[str, Row | tuple[Row, ...]] = {
    "aten.scaled_dot_product_attention.default": (
        Row(
            _SDPA.replace(" e", " [e]"),  # one mask for all of the values
            lowering=attention.attention_with_dropout,
            always=True,
            when=_has_dropout,
        ),
        Row(
            _SPLIT_KEYS.replace("*b q keys", "*b [o] keys"),
            linear=_VALUES,
            half=_SCORES_REPEATED,
            lowering=split_keys,
            when=lambda a: _has_few_queries(a) and _shares_mask(a),
        ),
        Row(
            _SPLIT_KEYS,
            linear=_VALUES,
            half=_SCORES_REPEATED,
            lowering=split_keys,
            when=_has_few_queries,
        ),
        _row(_lowered(_EXCHANGE), when=lambda a: _is_causal(a) and _shares_keys(a)),
        _row(_lowered(_RING), when=_is_causal),
        _row(_of_any_query(_EXCHANGE), when=lambda a: _shares_mask(a) and _shares_keys(a)),
        _row(_of_any_query(_RING), when=_shares_mask),
        _row(_EXCHANGE, when=_shares_keys),
        _row(_RING),
    ),
    "autopar.banded_attention.default": (
        replace(
            _row(_of_any_query(_lowered(_EXCHANGE))),
            lowering=banded_attention.split_causal_attention,
            when=lambda a: _sees_all_before(a) and _shares_keys(a),
        ),
        replace(
            _row(_of_any_query(_lowered(_RING))),
            lowering=banded_attention.split_causal_attention,
            when=_sees_all_before,
        ),
        replace(
            _row(_of_any_query(_lowered(_RING)).replace("ring", "halo")),
            lowering=banded_attention.split_banded_attention,
        ),
    ),
}
