"""Normalizations, softmax and dropout."""

from __future__ import annotations

from autopar.sharding import lowerings
from autopar.sharding.rule import Row

_DROPOUT = Row("*d -> *d, *d", lowering=lowerings.dropout, always=True)

ROWS: dict[str, Row | tuple[Row, ...]] = {
    "aten.layer_norm.default": (
        Row("*b [h], [h], [h] -> *b [h]", when=lambda a: len(a["normalized_shape"]) == 1),
    ),
    "aten.rms_norm.default": (
        Row("*b [h], [h] -> *b [h]", when=lambda a: len(a["normalized_shape"]) == 1),
    ),
    "aten.group_norm.default": Row("n [c] *[s], [c], [c] -> n [c] *[s]"),
    # training: (out, mean, rstd, running mean, running var); the last four are whole-batch
    "aten._native_batch_norm_legit_functional.default": (
        Row(
            "n= c *[s], c, c, c, c -> n c *[s], c, c, c, c",
            lowering=lowerings.batch_norm,
            when=lambda a: a["training"],
        ),
        Row("n= c *[s], c, c, c, c -> n c *[s], [y], [z], c, c", lowering=lowerings.batch_norm),
    ),
    "aten.batch_norm.default": Row(  # as captured in eval mode
        "n c *s, c, c, c, c -> n c *s"
    ),
    "aten._native_batch_norm_legit_no_training.default": Row(
        "n= c *[s], c, c, c, c -> n c *[s], [y], [z]"
    ),
    "aten.softmax.int": (Row("*b [s] -> *b [s]", when=lambda a: a["dim"] == -1),),
    "aten.native_dropout.default": _DROPOUT,
}
