"""Calls of losses."""

from __future__ import annotations

from typing import Any

import torch

from autopar.testing.rules.draw import Arguments, Draw, sampler
from autopar.testing.rules.rows import at_times, calls, integer, normal
from autopar.tracer import token_loss  # noqa: F401  (it defines the loss of tokens)

_REDUCTION = integer(0, 2)


def _classes(draw: Draw, ignored: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [b, v, space] and classes [b, space], some of them ignored but not all."""
    batch, classes, space = draw.size(), draw.size(2), draw.shape(0, 2)
    if draw.chance(50):
        space = []
    target = draw.integers([batch, *space], 0, classes)
    target = target.masked_fill(draw.booleans(target.shape, 0.2), ignored)
    target.view(-1)[0] = 0
    return draw.normal(batch, classes, *space), target


def _class_arguments(draw: Draw) -> tuple[list[Any], dict[str, Any]]:
    reduction = draw.integer(0, 2)
    ignored = draw.choice([-100, -100, 1])
    logits, target = _classes(draw, ignored)
    weight = draw.uniform([logits.shape[1]]) if draw.chance(30) else None
    if reduction == 1 and ignored == -100 and weight is None and draw.chance():
        return [logits, target], {}
    return [logits, target, weight, reduction, ignored], {}


@sampler("aten.cross_entropy_loss.default", fixed=("weight",))
def _cross_entropy(draw: Draw) -> Arguments:
    args, kwargs = _class_arguments(draw)
    if draw.chance(10):  # probabilities for targets
        return (args[0], draw.normal(*args[0].shape).softmax(1)), {}
    if len(args) > 2 and draw.chance(30):
        kwargs["label_smoothing"] = 0.1
    return tuple(args), kwargs


@sampler("autopar.token_cross_entropy.default", fixed=("weight",))
def _token_cross_entropy(draw: Draw) -> Arguments:
    args, kwargs = _class_arguments(draw)
    if args[0].ndim > 2:  # classes last
        args = [args[0].movedim(1, -1).contiguous(), *args[1:]]
    elif draw.chance(50):
        lead = args[0].shape[0]
        args = [args[0].unsqueeze(0).expand(2, -1, -1).clone(), args[1].expand(2, lead).clone(),
                *args[2:]]  # fmt: skip
    if len(args) > 2 and draw.chance(30):
        kwargs["label_smoothing"] = 0.1
    return tuple(args), kwargs


@sampler("aten.nll_loss_nd.default", fixed=("weight",))
def _nll(draw: Draw) -> Arguments:
    args, kwargs = _class_arguments(draw)
    return (args[0].log_softmax(1), *args[1:]), kwargs


@sampler("aten.nll_loss.default", fixed=("weight",))
def _nll_rows(draw: Draw) -> Arguments:
    classes = draw.size(2)
    target = draw.integers([draw.size()], 0, classes)
    return (draw.normal(len(target), classes), target, None, draw.integer(0, 2)), {}


@sampler("aten.nll_loss2d.default", fixed=("weight",))
def _nll_images(draw: Draw) -> Arguments:
    classes, target = draw.size(2), draw.integers(draw.shape(3, 3), 0, 3)
    classes = max(classes, 3)
    shape = [target.shape[0], classes, *target.shape[1:]]
    return (draw.normal(*shape), target, None, draw.integer(0, 2)), {}


calls(
    "mse_loss.default l1_loss.default smooth_l1_loss.default huber_loss.default",
    (0, 4), normal, normal, at_times(50, _REDUCTION),
)  # fmt: skip


@sampler("aten.kl_div.default")
def _kl_div(draw: Draw) -> Arguments:
    shape = draw.shape(1, 3)
    a, b = draw.normal(*shape).log_softmax(-1), draw.normal(*shape).softmax(-1)
    if draw.chance():
        return (a, b.log(), draw.integer(0, 2)), {"log_target": True}
    return (a, b, draw.integer(0, 2)), {}


def _weights(draw: Draw, shape: list[int]) -> torch.Tensor | None:
    return draw.uniform(shape) if draw.chance(30) else None


calls(
    "binary_cross_entropy.default",
    (0, 3), Draw.uniform, Draw.uniform, _weights, _REDUCTION, fixed=("target", "weight"),
)  # fmt: skip
calls(
    "binary_cross_entropy_with_logits.default", (0, 3), normal, Draw.uniform,
    lambda draw, shape: _weights(draw, draw.broadcast(shape)),
    lambda draw, shape: _weights(draw, shape[-1:]) if shape else None,
    _REDUCTION, fixed=("target", "weight", "pos_weight"),
)  # fmt: skip


@sampler("aten.ctc_loss.Tensor")
def _ctc(draw: Draw) -> Arguments:
    batch, classes = draw.size(), draw.size(3)
    probabilities = draw.normal(8, batch, classes).log_softmax(-1)
    targets = draw.integers([batch, 3], 1, classes)
    lengths = torch.full([batch], 8), torch.full([batch], 3)
    if draw.chance(25):
        targets = targets.flatten()
    return (probabilities, targets, *lengths, 0, draw.integer(0, 2)), {}
