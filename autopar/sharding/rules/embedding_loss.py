"""Embedding lookups and losses: the ops at the two ends of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from autopar.sharding.lowerings import losses
from autopar.sharding.rule import OpRule, Row
from autopar.sharding.rules.call import Call

aten = torch.ops.aten

_MEAN = 1  # torch.nn.functional's reduction enum: none, mean, sum


def _reduction(arguments: Mapping[str, Any]) -> int:
    return arguments.get("reduction", _MEAN)


def _elementwise_loss(op: torch._ops.OpOverload) -> tuple[Row, ...]:
    """A loss per element, or its sum, or its mean (of which each rank makes its share)."""
    return (
        Row("*d, *d, *d, *d -> *d", when=lambda a: _reduction(a) == 0),
        Row("*d, *d, *d, *d -> ", when=lambda a: _reduction(a) == 2),
        # weights may broadcast, but a mean over what is broadcast is the same share
        Row(
            "*d:lowered, *d, *d, *d -> ",
            lowering=losses.share_of_mean(op),
            when=lambda a: _reduction(a) == _MEAN,
        ),
    )


def _by_class(
    call: Call,
    lowering: Callable[..., Any],
    vocabulary: str,
    word: str = "",
    linear: tuple[tuple[int, ...], ...] = (),
) -> OpRule | None:
    """Logits [b, v, space], classes [b, space], weights [v]; `word` stands behind v."""
    logits, target = call.operand(0), call.operand(1)
    if len(logits) < 2 or len(target) != len(logits) - 1:
        return None  # one row, or probabilities for targets
    of_rows = ":lowered" if _reduction(call.arguments) == _MEAN else ""
    rows = ["b", *(f"s{i}" for i in range(len(logits) - 2))]
    b, *space = (row + of_rows for row in rows)
    out = " ".join(rows) if _reduction(call.arguments) == 0 else ""
    classes = " ".join([b, vocabulary + word, *space])
    notation = f"{classes}, {' '.join(rows)}, {vocabulary} -> {out}"
    return call.bind(notation, linear=linear, lowering=lowering)


def _nll(call: Call) -> OpRule | None:
    return _by_class(call, losses.nll_loss, "[v]", linear=((0,),))


def _ctc(out: str, word: str = "") -> str:
    """Log probabilities [time, batch, class], targets, and a length of each per sequence."""
    return f"[t] b{word} [c], b [s], b, b -> {out}"


def _of_tokens(of_rows: str, out: str) -> str:
    """Logits, classes and weights of them."""
    return f"*b{of_rows} v:complete, *b, v -> {out}"


ROWS: dict[str, Row | tuple[Row, ...]] = {
    "aten.embedding.default": (
        Row(
            "[v] e, *[b] -> *[b] e",
            linear=((0,),),
            when=lambda a: bool(a.get("scale_grad_by_freq") or a.get("sparse")),
        ),
        Row("v:lowered e, *b -> *b e", lowering=losses.embedding, linear=((0,),)),
    ),
    "aten.one_hot.default": Row("*b -> *b [v]"),
    **{
        str(op): _elementwise_loss(op)
        for op in (
            aten.mse_loss.default,
            aten.l1_loss.default,
            aten.smooth_l1_loss.default,
            aten.huber_loss.default,
            aten.binary_cross_entropy.default,
            aten.binary_cross_entropy_with_logits.default,
            aten.kl_div.default,
        )
    },
    "autopar.token_cross_entropy.default": (
        Row(
            _of_tokens("", "*b"),
            lowering=losses.token_cross_entropy,
            when=lambda a: _reduction(a) == 0,
        ),
        Row(
            _of_tokens("", ""),
            lowering=losses.token_cross_entropy,
            when=lambda a: _reduction(a) == 2,
        ),
        Row(_of_tokens(":lowered", ""), lowering=losses.token_cross_entropy),
    ),
    "aten.ctc_loss.Tensor": (
        # targets one after the other, without padding, lie anywhere
        Row("[t] *[b] [c], [s], *[b], *[b] -> ...", when=lambda a: len(a["targets"]) == 1),
        Row(_ctc("b"), when=lambda a: _reduction(a) == 0),
        Row(_ctc(""), when=lambda a: _reduction(a) == 2),
        Row(_ctc("", ":lowered"), lowering=losses.share_of_mean(aten.ctc_loss.Tensor)),
    ),
}

DERIVED: dict[str, Callable[[Call], OpRule | None]] = {
    "aten.cross_entropy_loss.default": lambda call: _by_class(
        call, losses.cross_entropy, "v", ":complete"
    ),
    "aten.nll_loss_nd.default": _nll,
    "aten.nll_loss.default": _nll,
    "aten.nll_loss2d.default": _nll,
}
