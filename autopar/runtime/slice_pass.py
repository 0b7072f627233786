"""One pass over the slices of a batch: forward and backward of each, gradients accumulated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from autopar.passes.cut import Crossing, StageProgram
from autopar.runtime.pipeline_runtime import StageCalls, Values
from autopar.runtime.program import Boxed
from autopar.runtime.slicing import accumulated, extents_of
from autopar.runtime.split_step import SplitStep, Tangents

# Seeds of the slices of a step are this far apart.
_SEEDS_APART = 2**40


class SlicePass:
    """One pass over the slices of a batch.

    Args:
        flat: tensors on this rank.
        training: by the forward graphs that a backward may follow.
        tangents: gradients of the batch's results; None to leave the backward out.
        extents: of the parts of results along the dim that is sliced.
        random: the seed of an earlier pass, whose draws this one repeats.
    """

    def __init__(
        self,
        step: SplitStep,
        flat: Sequence[torch.Tensor],
        *,
        training: bool,
        tangents: Tangents | None = None,
        extents: Mapping[int, Sequence[int]] | None = None,
        random: int | None = None,
    ) -> None:
        self.step, self.training, self.tangents = step, training, tangents
        self.given_extents = extents or {}
        self.fixed = list(flat[: step.fixed])
        self.seed = flat[-1] if step.takes_seed else None
        inputs = flat[step.fixed : len(flat) - step.takes_seed]
        self.random = torch.initial_seed() if random is None else random
        with self._draws(-1):
            self.sliced = step.slicing.slices(self.fixed[step.parameters :], inputs)
        self.entered: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.handed_on: dict[tuple[int, int], torch.Tensor] = {}  # buffers, by stage and position
        # by result and by number of the slice
        self.parts: list[dict[int, Any]] = [{} for _ in step.slicing.results]
        self.saved: dict[tuple[int, int], list[Any]] = {}
        self.kept: dict[tuple[int, int], list[Any]] = {}  # between the two parts of a backward
        self.totals: dict[tuple[int, int], list[torch.Tensor | None]] = {}
        self.counts: Counter[tuple[int, int]] = Counter()

    def run(self) -> list[torch.Tensor | None] | None:
        """Run all slices, and return the gradients of this rank's parameters."""
        pipeline, step = self.step.pipeline, self.step
        if pipeline is None:
            for number, _ in enumerate(step.slicing.sizes):
                self.forward(0, number, {})
                if self.tangents is not None:
                    self.backward(0, number, {}, True)
            return None if self.tangents is None else self.gradients()
        stored = self.fixed[: step.parameters]
        step.parameters_of_stages.borrow(self.fixed, pipeline)
        calls = {
            stage: StageCalls(
                partial(self.forward, stage), partial(self.backward, stage),
                partial(self.weights, stage),
            )
            for stage in pipeline.own
        }  # fmt: skip
        pipeline.run(calls, step.crossing, backward=self.tangents is not None)
        if self.tangents is None:
            return None
        return step.parameters_of_stages.hand_back(self.gradients(), stored, pipeline)

    def forward(self, stage: int, number: int, received: Values) -> dict[str, torch.Tensor]:
        """Run a stage for a slice; what the next stage is sent."""
        size = self.step.slicing.sizes[number]
        bound = self.step.stages[size][stage]
        program = bound.program
        arguments = [*self._entered(size, stage), *self._others(stage, number, program)]
        arguments += [received[name] for name in program.received]
        with self._draws(stage * len(self.step.slicing.sizes) + number):
            if not self.training:
                outputs: Sequence[Any] = program.body(*arguments)
            else:
                outputs = bound.body.run(bound.body.forward, arguments)
        count = len(program.results)
        for k, part in zip(program.results, outputs[:count], strict=True):
            self.parts[k][number] = part
            if k in self.step.carried:
                self.handed_on[stage, self.step.carried[k]] = part
        made = dict(zip(program.made, outputs[count:], strict=False))
        if self.tangents is not None:
            self.saved[stage, number] = list(outputs[count + len(made) :])
        values = {**received, **made}
        return {name: values[name].contiguous() for name in program.sent}

    def backward(
        self, stage: int, number: int, gradients: Values, weights: bool
    ) -> dict[str, torch.Tensor]:
        """Run a stage's backward for a slice; the gradients of what it received.

        Args:
            gradients: of what it sent.
            weights: with the gradients of parameters, which are added up; else `weights` follows.
        """
        assert self.tangents is not None
        size = self.step.slicing.sizes[number]
        bound, slicing = self.step.stages[size][stage], self.step.slicing
        program, key = bound.program, (stage, number)
        saved = self.saved.pop(key)
        given: list[Any] = []
        received = self.step.crossing(stage, number) if stage else {}
        if bound.body.backward is not None:
            of_results: list[Any] = []
            for k in program.results:
                grad = self.tangents.get(k)
                parts = slicing.tangents(k, grad, self.given_extents.get(k, ()))
                of_results.append(parts[number])
            of_results += [gradients.get(name) for name in program.made]
            arguments = [*saved, *bound.body.tangents(of_results)]
            del saved, of_results
            if bound.body.weights is None:
                given = self._added(size, stage, bound.body.backward, arguments)
            else:
                given = list(bound.body.run(bound.body.backward, arguments))
        own: dict[str, torch.Tensor | None] = {}
        if bound.body.weights is not None:
            count = len(program.received)
            own = dict(zip(program.received, given[:count], strict=True))
            self.kept[key] = given[count:]
            if weights:
                self.weights(stage, number)
        elif given:
            entered = len(self.entered[size, stage])
            own = dict(zip(program.received, given[entered + len(program.others) :], strict=False))
            self._add(size, stage, given[:entered])
        return {
            name: _sum_of(own.get(name), gradients.get(name), crossing)
            for name, crossing in received.items()
            if crossing.differentiable
        }

    def weights(self, stage: int, number: int) -> None:
        """Run the part of a stage's backward that can wait."""
        size = self.step.slicing.sizes[number]
        body = self.step.stages[size][stage].body
        kept = self.kept.pop((stage, number), None)
        if body.weights is not None and kept is not None:
            given = self._added(size, stage, body.weights, kept)
            self._add(size, stage, given[: len(self.entered[size, stage])])

    def _added(self, size: int, stage: int, graph: Boxed, arguments: list[Any]) -> list[Any]:
        """What a graph gives, without the gradients that it adds to those of earlier slices."""
        bound, key = self.step.stages[size][stage], self._summed(size, stage)
        totals, first = self.totals.get(key), self.step.stages[key[0]][stage].adding
        # those of the first slice are products as well, which share memory with nothing
        if bound.adding and first and totals and {*bound.adding.totals} <= {*first.totals}:
            graph = bound.adding.run
            arguments += [totals[k] for k in bound.adding.totals]
        return list(bound.body.run(graph, arguments))

    def _summed(self, size: int, stage: int) -> tuple[int, int]:
        """Whose totals the gradients of a slice are added to: those of slices of another size, if
        both take the parameters as they are."""
        bound = self.step.stages[size][stage]
        for other, number in self.totals:
            known = self.step.stages[other][number]
            alike = known.program.parameters == bound.program.parameters
            if number == stage and alike and known.enter is None and bound.enter is None:
                return other, stage
        return size, stage

    def _add(self, size: int, stage: int, given: list[torch.Tensor | None]) -> None:
        key = self._summed(size, stage)
        self.totals[key] = accumulated(self.totals.get(key), given, self.counts[key])
        self.counts[key] += 1

    def extents(self) -> dict[int, list[int]]:
        """Of the parts of results along the dim that is sliced."""
        states, count = self.step.slicing.results, len(self.step.slicing.sizes)
        return {
            k: extents_of([parts[number] for number in range(count)], states[k])
            for k, parts in enumerate(self.parts)
            if len(parts) == count
        }

    def results(self) -> tuple[Any, ...]:
        """Of the batch, on every rank; late ones only where they were computed."""
        step, count = self.step, len(self.step.slicing.sizes)
        results: list[Any] = []
        for k, parts in enumerate(self.parts):
            if k in step.plain:
                results.append(step.plain[k])
                continue
            if len(parts) == count:
                result = step.slicing.combine(k, [parts[number] for number in range(count)])
            else:
                result = step.results_like[k].empty()
            if step.pipeline is not None and k not in step.late:
                result = step.pipeline.broadcast(result.contiguous(), step.stage_of_result[k])
            results.append(result)
        return tuple(results)

    def gradients(self) -> list[torch.Tensor | None]:
        """Of this rank's parameters, over all slices."""
        grads: list[torch.Tensor | None] = [None] * self.step.parameters
        while self.totals:
            (size, stage), totals = self.totals.popitem()
            bound = self.step.stages[size][stage]
            entered = self.entered[size, stage]
            totals = [
                g if g is None else g.to(x.dtype) for g, x in zip(totals, entered, strict=True)
            ]
            if bound.enter is not None and bound.enter.backward is not None:
                arguments = bound.enter.tangents(totals)
                totals = list(bound.enter.run(bound.enter.backward, arguments))
            for k, g in zip(bound.program.parameters, totals, strict=False):
                known = grads[k]
                # never in place: two parameters may have one gradient
                grads[k] = known if g is None else g if known is None else known + g
        return grads

    def _entered(self, size: int, stage: int) -> list[torch.Tensor]:
        key = size, stage
        if key not in self.entered:
            bound = self.step.stages[size][stage]
            parameters = [self.fixed[k] for k in bound.program.parameters]
            if bound.enter is None:
                self.entered[key] = parameters
            elif self.training:
                given = bound.enter.run(bound.enter.forward, list(parameters))
                self.entered[key] = list(given[: len(bound.enter.step.results)])
            else:
                assert bound.program.enter is not None
                self.entered[key] = list(bound.program.enter(*parameters))
        return self.entered[key]

    def _others(self, stage: int, number: int, program: StageProgram) -> Iterator[torch.Tensor]:
        """What the body takes besides parameters."""
        own: list[torch.Tensor] | None = None
        for k in program.others:
            if k < self.step.fixed:
                yield self.handed_on.get((stage, k), self.fixed[k])
                continue
            if own is None:
                own = self.step.take(self.step.slicing.sizes[number], self.sliced[number])
            if k - self.step.fixed < len(own):
                yield own[k - self.step.fixed]
            else:
                assert self.seed is not None
                yield (self.seed + number * _SEEDS_APART) % 2**62

    @contextmanager
    def _draws(self, place: int) -> Iterator[None]:
        """Slices and stages draw other random numbers each, and the same when they run again.

        Args:
            place: a number of the slice and stage; -1 before the first.
        """
        if not self.step.draws:
            yield
            return
        device = self.step.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed((self.random + place * _SEEDS_APART) % 2**62)
            yield


def _sum_of(
    own: torch.Tensor | None, passed_on: torch.Tensor | None, crossing: Crossing
) -> torch.Tensor:
    """The gradient of a value that a stage uses, passes on, or both."""
    if own is None or passed_on is None:
        known = passed_on if own is None else own
        return crossing.empty().zero_() if known is None else known.contiguous()
    return own + passed_on
