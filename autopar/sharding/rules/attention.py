"""Attention: split over batch, heads (grouped-query heads with their keys) and queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autopar.sharding.lowerings import attention
from autopar.sharding.rule import Row


def _has_dropout(arguments: Mapping[str, Any]) -> bool:
    return bool(arguments.get("dropout_p"))


# keys and values are whole where queries are split: they are gathered
_SDPA = "*b q [d], *b [k] [d], *b [k] [e], *b q [k] -> *b q [e]"

ROWS: dict[str, Row | tuple[Row, ...]] = {
    "aten.scaled_dot_product_attention.default": (
        Row(_SDPA, lowering=attention.attention_with_dropout, always=True, when=_has_dropout),
        Row(
            _SDPA.replace(" q ", " q! "),
            lowering=attention.causal_attention,
            when=lambda a: bool(a.get("is_causal")),
        ),
        Row(_SDPA),
    ),
}
