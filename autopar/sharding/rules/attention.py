"""Attention: split over batch, heads (grouped-query heads with their keys), queries and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autopar.sharding.lowerings import attention
from autopar.sharding.rule import Row


def _has_dropout(arguments: Mapping[str, Any]) -> bool:
    return bool(arguments.get("dropout_p"))


# if queries are split, keys and values are not: every rank needs all of them
_SDPA = "*b q [d], *b [k] [d], *b [k] e, *b q [k] -> *b q e"
_VALUES: tuple[tuple[int, ...], ...] = ((2,),)
_SCORES_REPEATED = ("e",)

ROWS: dict[str, Row | tuple[Row, ...]] = {
    "aten.scaled_dot_product_attention.default": (
        Row(
            _SDPA.replace(" e", " [e]"),  # one mask for all of the values
            lowering=attention.attention_with_dropout,
            always=True,
            when=_has_dropout,
        ),
        Row(
            _SDPA.replace(" q ", " q:lowered "),
            linear=_VALUES,
            lowering=attention.causal_attention,
            half=_SCORES_REPEATED,
            when=lambda a: bool(a.get("is_causal")),
        ),
        Row(_SDPA, linear=_VALUES, half=_SCORES_REPEATED),
    )
}
