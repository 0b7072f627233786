"""Runs a step in slices of the batch: forward and backward of each, gradients accumulated.

Whoever calls the model expects its results first and calls `backward()` later. The activations of a
slice are to be gone before the next slice begins, though. So the call runs the backward of each
slice at once, with the gradients of results that `backward()` brought last time (1 for the loss at
first). Gradients are linear in these: if `backward()` brings a multiple of them, it hands out the
same multiple of the gradients; if it brings something else, the slices run again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from autopar.errors import EngineError
from autopar.ir.precision import without_autocast
from autopar.runtime.distribute import argument_of, gradients
from autopar.runtime.program import deliver, own, whole, without_gradients
from autopar.runtime.sharded_values import ShardedParameter
from autopar.runtime.slice_pass import SlicePass
from autopar.runtime.split_step import SplitStep, Tangents

log = logging.getLogger(__name__)


def train(step: SplitStep, *flat: torch.Tensor) -> tuple[Any, ...]:
    """The results of the batch; their backward hands out gradients. Takes flat tensors, as a
    `Program`.

    Raises:
        EngineError: the pipeline's schedule has no backwards.
    """
    if step.pipeline is not None and not step.pipeline.schedule.trains:
        raise EngineError(
            f"schedule {step.pipeline.schedule.name!r} only evaluates; train with another one "
            "(1f1b), or call the model under torch.no_grad()"
        )
    results: tuple[Any, ...] = _Run.apply(step, *flat)
    return results


def evaluate(step: SplitStep, *flat: torch.Tensor) -> tuple[Any, ...]:
    """The results of the batch, without gradients."""
    with without_autocast(), torch.no_grad():
        run = SlicePass(step, [argument_of(x) for x in flat], training=False)
        run.run()
        return run.results()


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: SplitStep, *flat: torch.Tensor) -> tuple[Any, ...]:
        local = [argument_of(x) for x in flat]
        run = SlicePass(step, local, training=True, tangents=step.expected)
        ctx.grads = run.run()
        ctx.step, ctx.expected = step, step.expected
        ctx.random, ctx.extents = run.random, run.extents()
        ctx.parameters = [x if isinstance(x, ShardedParameter) else None for x in flat]
        ctx.save_for_backward(*(x.detach() for x in local))
        ctx.set_materialize_grads(False)
        results = tuple(map(own, run.results()))
        constant = (
            x
            for x, differentiable in zip(results, step.differentiable, strict=True)
            if isinstance(x, torch.Tensor) and not differentiable
        )
        ctx.mark_non_differentiable(*constant)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        step: SplitStep = ctx.step
        came: dict[int, Any] = {k: whole(g) for k, g in enumerate(grads) if g is not None}
        local, ctx.grads = ctx.grads, None  # what is handed out may be written
        factor = None if local is None else _multiple(came, ctx.expected)
        if isinstance(factor, torch.Tensor) and not _finite(local, factor):
            factor = None  # what overflowed with the old scale may not with the new one
        with torch.no_grad():
            if factor is None:
                flat = list(ctx.saved_tensors)
                local = SlicePass(
                    step, flat, training=True, tangents=came, extents=ctx.extents,
                    random=ctx.random,
                ).run()  # fmt: skip
            elif factor is not True:
                local = [None if g is None else g * factor for g in local]
        scalars = all(g.ndim == 0 for g in came.values())
        if not scalars:
            _tell_of_loss()
        step.expected = {k: _usable(g) for k, g in came.items()} if scalars else None
        used = step.result_gradients.used(tuple(g is not None for g in grads))
        local = [g if k in used else None for k, g in enumerate(local)]
        parameters = ctx.parameters[: len(local)]
        handed = gradients(parameters, local, taken=[g.data_ptr() for g in came.values()])
        handed += [None] * (len(ctx.parameters) - len(local))
        if torch.is_grad_enabled():  # create_graph=True
            return None, *without_gradients(handed)
        deliver(ctx.parameters, handed, [node for node, _ in ctx.next_functions])
        return None, *handed


def _finite(grads: Sequence[torch.Tensor | None], factor: torch.Tensor) -> bool:
    """Whether gradients can be scaled. On GPUs, where asking waits for the device, only those of
    half precision are asked."""
    asked = [g for g in grads if g is not None]
    if factor.device.type != "cpu":
        asked = [g for g in asked if g.dtype is torch.float16]
    return all(bool(g.isfinite().all()) for g in asked)


def _usable(grad: torch.Tensor) -> torch.Tensor:
    """A gradient to expect: 1 in the place of one that others are no multiples of."""
    usable = grad.isfinite() & (grad != 0)
    return torch.where(usable, grad, torch.ones_like(grad))


@cache  # once a run
def _tell_of_loss() -> None:
    level = logging.DEBUG if dist.is_initialized() and dist.get_rank() else logging.WARNING
    log.log(
        level,
        "the loss is computed outside of the model, from results of the whole batch: every step "
        "runs its microbatches forward twice. Pass auto_engine(..., loss_fn=) and call "
        "engine(x, target=y), or return the loss from the model",
    )


def _multiple(came: Tangents, expected: Tangents) -> torch.Tensor | bool | None:
    """By what gradients of results are a multiple of others; True for 1, None if they are not."""
    if came.keys() != expected.keys() or any(g.ndim for g in came.values()):
        return None
    pairs = [(came[k], expected[k]) for k in came]
    first, reference = pairs[0]
    if len(pairs) == 1 and first.device.type != "cpu":  # without waiting for the device
        return first / reference
    numbers = [(float(a), float(b)) for a, b in pairs]
    if all(a == b for a, b in numbers):
        return True
    a, b = numbers[0]
    if any(x * b != y * a for x, y in numbers):
        return None
    return first / reference
