"""Normalizations and softmax: over what they do not normalize, and over what they do."""

from __future__ import annotations

from collections.abc import Callable

from autopar.sharding.lowerings import norms
from autopar.sharding.rule import OpRule, Row
from autopar.sharding.rules.call import Call

# (result, mean, rstd, running mean, running variance) of the global batch
_BATCH_NORM = "n:complete c *s:complete, c, c, c, c -> n c *s, c, c, c, c"

ROWS: dict[str, Row | tuple[Row, ...]] = {
    "aten._native_batch_norm_legit_functional.default": (
        Row(_BATCH_NORM, lowering=norms.batch_norm, when=lambda a: a["training"]),
        # with the running statistics there is nothing to reduce, and mean and rstd are empty
        Row(_BATCH_NORM.replace("*s, c, c,", "*s, [y], [z],"), lowering=norms.batch_norm),
    ),
    "aten._native_batch_norm_legit.no_stats": Row(
        "n:complete c *s:complete, c, c -> n c *s, c, c", lowering=norms.batch_norm_without_running
    ),
    # as captured in eval mode
    "aten.batch_norm.default": (
        Row("n c *s, c, c, c, c -> n c *s", when=lambda a: not a["training"]),
        Row("[n] c *[s], c, c, c, c -> [n] c *[s]"),
    ),
    "aten._native_batch_norm_legit_no_training.default": Row(
        "n:complete c *s:complete, c, c, c, c -> n c *s, [y], [z]"
    ),
}


def _normalized(call: Call) -> tuple[str, str]:
    """The normalized dims h0, h1, ..., with and without the word."""
    names = [f"h{i}" for i in range(len(call.arguments["normalized_shape"]))]
    return " ".join(f"{name}:lowered" for name in names), " ".join(names)


def _layer_norm(call: Call) -> OpRule:
    normalized, h = _normalized(call)
    return call.bind(f"*b {normalized}, {h}, {h} -> *b {h}", lowering=norms.layer_norm)


def _rms_norm(call: Call) -> OpRule:
    normalized, h = _normalized(call)
    return call.bind(f"*b {normalized}, {h} -> *b {h}", lowering=norms.rms_norm)


def _group_norm(call: Call) -> OpRule:
    """Split between groups of channels, or over the space."""
    shape = call.operand(0)
    space = [f"s{i}" for i in range(len(shape) - 2)]
    normalized = " ".join(f"{s}:lowered" for s in space)
    notation = f"n c:lowered {normalized}, c, c -> n c {' '.join(space)}"
    rule = call.bind(notation, lowering=norms.group_norm)
    return rule.by_groups("c", call.arguments["num_groups"])


def _over_dim(lowering: Callable) -> Callable[[Call], OpRule]:
    """Same shape in and out, normalized over one dim."""

    def bind(call: Call) -> OpRule:
        ndim = len(call.outputs[0])
        dim = call.arguments["dim"] % max(ndim, 1)
        names = " ".join("s:lowered" if d == dim else f"d{d}" for d in range(ndim))
        return call.bind(f"{names} -> {names}", lowering=lowering)

    return bind


def _weight_norm(call: Call) -> OpRule:
    """v is normalized over every dim but one; g holds the norms along that one."""
    ndim, dim = len(call.outputs[0]), call.arguments.get("dim", 0)
    v = " ".join("k" if d == dim % ndim else f"[d{d}]" for d in range(ndim))
    return call.bind(f"{v}, {v} -> {v}", linear=((1,),))


DERIVED: dict[str, Callable[[Call], OpRule | None]] = {
    "aten.layer_norm.default": _layer_norm,
    "aten.rms_norm.default": _rms_norm,
    "aten.group_norm.default": _group_norm,
    "aten.softmax.int": _over_dim(norms.softmax),
    "aten.log_softmax.int": _over_dim(norms.log_softmax),
    "aten._weight_norm.default": _weight_norm,
}
