"""Embedding lookups and losses: the ops at the two ends of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autopar.sharding import lowerings
from autopar.sharding.rule import Row


def _plain_targets(arguments: Mapping[str, Any]) -> bool:
    """Class indices [b] for logits [b, v], without weights or smoothing."""
    return (
        len(arguments["self"]) == 2
        and len(arguments["target"]) == 1
        and arguments.get("weight") is None
        and not arguments.get("label_smoothing")
    )


ROWS: dict[str, Row | tuple[Row, ...]] = {
    "aten.embedding.default": (
        Row(
            "[v] e, *b -> *b e", when=lambda a: bool(a.get("scale_grad_by_freq") or a.get("sparse"))
        ),
        Row("v! e, *b -> *b e", lowering=lowerings.embedding, linear=((0,),)),
    ),
    "aten.cross_entropy_loss.default": (
        Row(
            "b v=, b -> b",
            lowering=lowerings.cross_entropy,
            when=lambda a: _plain_targets(a) and a.get("reduction", 1) == 0,
        ),
        Row("b! v=, b -> ", lowering=lowerings.cross_entropy, when=_plain_targets),
    ),
    "aten.mse_loss.default": (
        Row("*d, *d -> *d", when=lambda a: a.get("reduction", 1) == 0),
        Row("*d, *d -> ", when=lambda a: a.get("reduction", 1) == 2),
        Row("*d!, *d! -> ", lowering=lowerings.mse_loss),
    ),
}
