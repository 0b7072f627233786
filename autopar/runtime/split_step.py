"""Runs a step in slices of the batch: forward and backward of each, gradients accumulated.

Whoever calls the model expects its results first and calls `backward()` later. The activations of a
slice are to be gone before the next slice begins, though. So the call runs the backward of each
slice at once, with the gradients of results that `backward()` brought last time (1 for the loss at
first). Gradients are linear in these: if `backward()` brings a multiple of them, it hands out the
same multiple of the gradients; if it brings something else, the slices run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from autopar.compiled_stages import CompiledSlice
from autopar.ir.precision import without_autocast
from autopar.runtime.distribute import argument_of, gradients
from autopar.runtime.program import Program, bind, deliver, own, whole, without_gradients
from autopar.runtime.result_gradients import ResultGradients
from autopar.runtime.sharded_values import ShardedParameter
from autopar.runtime.slicing import Slicing, accumulated, extents_of

# Seeds of the slices of a step are this far apart.
_SEEDS_APART = 2**40


@dataclass(frozen=True)
class BoundStage:
    """A compiled stage that can be called."""

    enter: Program | None
    body: Program
    evaluate_enter: Callable[..., Any] | None
    evaluate: Callable[..., Any]
    parameters: tuple[int, ...]
    others: tuple[int, ...]
    received: tuple[str, ...]
    results: tuple[int, ...]
    made: tuple[str, ...]
    sent: tuple[str, ...]


def bind_stages(compiled: CompiledSlice) -> dict[int, BoundStage]:
    """Make the stages of a rank callable."""
    return {
        number: BoundStage(
            None if stage.enter is None else bind(stage.enter),
            bind(stage.body),
            stage.program.enter,
            stage.program.body,
            stage.program.parameters,
            stage.program.others,
            stage.program.received,
            stage.program.results,
            stage.program.made,
            stage.program.sent,
        )
        for number, stage in compiled.stages.items()
    }


# Gradients of results, by their positions.
Tangents = Mapping[int, torch.Tensor]


@dataclass
class SplitStep:
    """A step that runs in slices. Call it with flat tensors, as a `Program`.

    Args:
        slicing: of the batch.
        stages: by the size of a slice.
        take: this rank's part of the inputs of a slice.
        fixed: how many of the flat tensors are no inputs: parameters, buffers, constants.
        parameters: how many of them are parameters.
        takes_seed: the last flat tensor is a seed.
        draws: the graph draws random numbers of torch's generators.
        result_gradients: which results have a part in which gradients.
        expected: gradients of results with which slices run backward at once; None to wait.
    """

    slicing: Slicing
    stages: Mapping[int, Mapping[int, BoundStage]]
    take: Callable[[int, Sequence[torch.Tensor]], list[torch.Tensor]]
    fixed: int
    parameters: int
    takes_seed: bool
    draws: bool
    result_gradients: ResultGradients
    carried: Mapping[int, int] = field(default_factory=dict)
    expected: Tangents | None = None

    def train(self, *flat: torch.Tensor) -> tuple[Any, ...]:
        """The results of the batch; their backward hands out gradients."""
        results: tuple[Any, ...] = _Run.apply(self, *flat)
        return results

    def evaluate(self, *flat: torch.Tensor) -> tuple[Any, ...]:
        """The results of the batch, without gradients."""
        with without_autocast(), torch.no_grad():
            run = _Slices(self, [argument_of(x) for x in flat], training=False)
            for number, _ in enumerate(self.slicing.sizes):
                run.forward(number)
            return run.results()

    def differentiable(self) -> list[bool]:
        """Whether each result carries a gradient."""
        flags: dict[int, bool] = {}
        for stage in next(iter(self.stages.values())).values():
            of_results = zip(stage.results, stage.body.step.results, strict=False)
            flags |= {k: r.differentiable for k, r in of_results}
        return [flags[k] for k in range(len(self.slicing.results))]


class _Slices:
    """One pass over the slices of a batch.

    Args:
        flat: tensors on this rank.
    """

    def __init__(self, step: SplitStep, flat: Sequence[torch.Tensor], *, training: bool) -> None:
        self.step, self.training = step, training
        fixed = flat[: step.fixed]
        seed = flat[-1] if step.takes_seed else None
        inputs = flat[step.fixed : len(flat) - step.takes_seed]
        self.fixed, self.seed = list(fixed), seed
        self.sliced = step.slicing.slices(fixed[step.parameters :], inputs)
        self.random = torch.initial_seed() if step.draws else 0
        self.entered: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.parts: list[list[Any]] = [[] for _ in step.slicing.results]
        self.saved: dict[tuple[int, int], list[Any]] = {}
        self.totals: dict[tuple[int, int], list[torch.Tensor | None]] = {}
        self.counts: dict[tuple[int, int], int] = {}

    def forward(self, number: int, stage: int = 0) -> None:
        """Run a stage for a slice."""
        size = self.step.slicing.sizes[number]
        bound = self.step.stages[size][stage]
        arguments = [*self._entered(size, stage), *self._others(number, size, bound)]
        with self._draws(number):
            if not self.training:
                outputs: Sequence[Any] = bound.evaluate(*arguments)
            else:
                outputs = bound.body.run(bound.body.forward, arguments)
        count = len(bound.results)
        for k, part in zip(bound.results, outputs[:count], strict=True):
            self.parts[k].append(part)
        for position, result in self.step.carried.items():
            self.fixed[position] = self.parts[result][-1]
        if self.training:
            self.saved[stage, number] = list(outputs[count + len(bound.made) :])

    def backward(self, number: int, tangents: Tangents, stage: int = 0) -> None:
        """Run a stage's backward for a slice, and add up the gradients.

        Args:
            tangents: of the slice's parts of results.
        """
        size = self.step.slicing.sizes[number]
        bound = self.step.stages[size][stage]
        saved = self.saved.pop((stage, number))
        if bound.body.backward is None:
            return
        arguments = [*saved, *bound.body.tangents([tangents.get(k) for k in bound.results])]
        del saved
        given = list(bound.body.run(bound.body.backward, arguments))
        key = size, stage
        count = len(self.entered[key])
        before = self.counts.get(key, 0)
        self.totals[key] = accumulated(self.totals.get(key), given[:count], before)
        self.counts[key] = before + 1

    def extents(self) -> dict[int, list[int]]:
        """Of the parts of results along the dim that is sliced."""
        states = self.step.slicing.results
        return {k: extents_of(parts, states[k]) for k, parts in enumerate(self.parts)}

    def results(self) -> tuple[Any, ...]:
        """Of the batch."""
        return tuple(self.step.slicing.combine(k, parts) for k, parts in enumerate(self.parts))

    def gradients(self) -> list[torch.Tensor | None]:
        """Of this rank's parameters, over all slices."""
        grads: list[torch.Tensor | None] = [None] * self.step.parameters
        for (size, stage), totals in self.totals.items():
            bound = self.step.stages[size][stage]
            entered = self.entered[size, stage]
            totals = [
                g if g is None else g.to(x.dtype) for g, x in zip(totals, entered, strict=True)
            ]
            if bound.enter is not None and bound.enter.backward is not None:
                arguments = bound.enter.tangents(totals)
                totals = list(bound.enter.run(bound.enter.backward, arguments))
            for k, g in zip(bound.parameters, totals, strict=False):
                known = grads[k]
                grads[k] = g if known is None or g is None else known + g
        return grads

    def _entered(self, size: int, stage: int) -> list[torch.Tensor]:
        key = size, stage
        if key not in self.entered:
            bound = self.step.stages[size][stage]
            parameters = [self.fixed[k] for k in bound.parameters]
            if bound.enter is None:
                self.entered[key] = parameters
            elif self.training:
                given = bound.enter.run(bound.enter.forward, list(parameters))
                self.entered[key] = list(given[: len(bound.enter.step.results)])
            else:
                assert bound.evaluate_enter is not None
                self.entered[key] = list(bound.evaluate_enter(*parameters))
        return self.entered[key]

    def _others(self, number: int, size: int, bound: BoundStage) -> Iterator[torch.Tensor]:
        """What the body takes besides parameters."""
        own: list[torch.Tensor] | None = None
        for k in bound.others:
            if k < self.step.fixed:
                yield self.fixed[k]
                continue
            if own is None:
                own = self.step.take(size, self.sliced[number])
            if k - self.step.fixed < len(own):
                yield own[k - self.step.fixed]
            else:
                assert self.seed is not None
                yield (self.seed + number * _SEEDS_APART) % 2**62

    @contextmanager
    def _draws(self, number: int) -> Iterator[None]:
        """Slices draw other random numbers each, and the same when they run again."""
        if not self.step.draws:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed((self.random + number * _SEEDS_APART) % 2**62)
            yield


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: SplitStep, *flat: torch.Tensor) -> tuple[Any, ...]:
        local = [argument_of(x) for x in flat]
        run = _Slices(step, local, training=True)
        ctx.grads = _run(run, step.expected, {})
        ctx.step, ctx.expected = step, step.expected
        ctx.random, ctx.extents = run.random, run.extents()
        ctx.parameters = [x if isinstance(x, ShardedParameter) else None for x in flat]
        ctx.save_for_backward(*(x.detach() for x in local))
        ctx.set_materialize_grads(False)
        results = tuple(map(own, run.results()))
        constant = (
            x
            for x, differentiable in zip(results, step.differentiable(), strict=True)
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
        with torch.no_grad():
            if factor is None:
                run = _Slices(step, list(ctx.saved_tensors), training=True)
                run.random = ctx.random
                local = _run(run, came, ctx.extents)
            elif factor is not True:
                local = [None if g is None else g * factor for g in local]
        scalars = all(g.ndim == 0 for g in came.values())
        step.expected = {k: g.detach().clone() for k, g in came.items()} if scalars else None
        used = step.result_gradients.used(tuple(g is not None for g in grads))
        local = [g if k in used else None for k, g in enumerate(local)]
        parameters = ctx.parameters[: len(local)]
        handed = gradients(parameters, local, taken=[g.data_ptr() for g in came.values()])
        handed += [None] * (len(ctx.parameters) - len(local))
        if torch.is_grad_enabled():  # create_graph=True
            return None, *without_gradients(handed)
        deliver(ctx.parameters, handed, [node for node, _ in ctx.next_functions])
        return None, *handed


def _run(
    run: _Slices, tangents: Tangents | None, extents: Mapping[int, Sequence[int]]
) -> list[torch.Tensor | None] | None:
    """Run all slices, and return the gradients of parameters.

    Args:
        tangents: of the batch's results; None to leave the backward out.
        extents: of the parts of results.
    """
    slicing = run.step.slicing
    for number, _ in enumerate(slicing.sizes):
        run.forward(number)
        if tangents is None:
            run.saved.clear()
            continue
        parts = {k: slicing.tangents(k, g, extents.get(k, ()))[number] for k, g in tangents.items()}
        run.backward(number, {k: part for k, part in parts.items() if part is not None})
    return None if tangents is None else run.gradients()


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
    if not b or any(x * b != y * a for x, y in numbers):
        return None
    return first / reference
