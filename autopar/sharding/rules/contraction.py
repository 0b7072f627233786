"""Matrix products, attention and convolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autopar.sharding import lowerings
from autopar.sharding.rule import Row


def _has_dropout(arguments: Mapping[str, Any]) -> bool:
    return bool(arguments.get("dropout_p"))


_SDPA = "*b [q] [d], *b [k] [d], *b [k] [e], *b [q] [k] -> *b [q] [e]"

ROWS: dict[str, Row | tuple[Row, ...]] = {
    "aten.mm.default": Row("m k, k n -> m n", linear=((0,), (1,))),
    "aten.bmm.default": Row("b m k, b k n -> b m n", linear=((0,), (1,))),
    "aten.addmm.default": Row("+n, m k, k n -> m n", linear=((1,), (2,))),
    "aten.baddbmm.default": Row("+b m n, b m k, b k n -> b m n", linear=((1,), (2,))),
    "aten.linear.default": Row("*b k, n k, +n -> *b n", linear=((0,), (1,))),
    "aten.scaled_dot_product_attention.default": (
        Row(_SDPA, lowering=lowerings.attention_with_dropout, always=True, when=_has_dropout),
        Row(_SDPA, when=lambda a: bool(a.get("is_causal"))),
        # without a causal offset, queries are independent of each other
        Row(_SDPA.replace("[q]", "q")),
    ),
    "aten.conv2d.default": (
        Row(
            "n c [h] [w], o c [x] [y], +o -> n o [i] [j]",
            linear=((0,), (1,)),
            when=lambda a: a.get("groups", 1) == 1,
        ),
        Row("n [c] [h] [w], [o] [g] [x] [y], [o] -> n [p] [i] [j]"),
    ),
    "aten.conv1d.default": (
        Row(
            "n c [w], o c [x], +o -> n o [j]",
            linear=((0,), (1,)),
            when=lambda a: a.get("groups", 1) == 1,
        ),
        Row("n [c] [w], [o] [g] [x], [o] -> n [p] [j]"),
    ),
}
