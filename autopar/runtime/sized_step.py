"""Two compiled steps for inputs of different sizes as one step for many sizes.

They have to differ in integers alone, which become inputs of their common program.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.ir.graph import ModelGraph
from autopar.ir.guards import same_value
from autopar.ir.size_formulas import Shapes, SizeFormulas, input_shapes
from autopar.ir.sized_graph import NotAlikeError, SizedGraph, SizePair, merged
from autopar.runtime.batch import BatchLayout
from autopar.runtime.bound_step import BoundStep
from autopar.runtime.program import Boxed, Program, boxed

_EMPTY = fx.symbolic_trace(lambda: ())


@dataclass(frozen=True)
class _Size:
    """An integer that depends on sizes of inputs."""

    pair: SizePair


@dataclass(frozen=True)
class _SizedProgram:
    """Two graphs as one that can be called for given sizes."""

    graph: SizedGraph
    run: Boxed

    @staticmethod
    def of(first: fx.GraphModule | None, second: fx.GraphModule | None) -> _SizedProgram:
        """An empty one of no graphs.

        Raises:
            NotAlikeError: the graphs differ in more than integers.
        """
        if first is None and second is None:
            first = second = _EMPTY
        if first is None or second is None:
            raise NotAlikeError("one of them is missing")
        graph = SizedGraph.of(first, second)
        return _SizedProgram(graph, boxed(graph.gm))

    def at(self, sizes: Mapping[SizePair, int]) -> Boxed:
        """The program with its sizes given."""
        rest = [sizes[pair] for pair in self.graph.sizes]

        def call(arguments: list[Any]) -> Sequence[Any]:
            arguments += rest
            return self.run(arguments)

        return call


class SizedStep:
    """The common program of two steps.

    Args:
        first, second: compiled for inputs of other sizes.

    Raises:
        NotAlikeError: the steps differ in more than sizes.
    """

    def __init__(self, first: BoundStep, second: BoundStep) -> None:
        self.first, self.second = first, second
        one, two = first.compiled, second.compiled
        assert one.lowered is not None and two.lowered is not None
        _check_alike(one.graph, two.graph)
        self._forward = _SizedProgram.of(one.lowered.forward, two.lowered.forward)
        self._backward = _SizedProgram.of(one.lowered.backward, two.lowered.backward)
        self._evaluate = _SizedProgram.of(one.local.gm, two.local.gm)
        self._guards = [
            _SizedProgram.of(a.program, b.program)
            for a, b in zip(one.graph.guards, two.graph.guards, strict=True)
        ]
        self._described = merged(_described(first), _described(second), _Size)
        programs = (self._forward, self._backward, self._evaluate, *self._guards)
        self._pairs = {pair for p in programs for pair in p.graph.sizes}
        self._pairs |= {x.pair for x in leaves_of(self._described) if isinstance(x, _Size)}

    def at(self, formulas: SizeFormulas, shapes: Shapes, layout: BatchLayout) -> BoundStep | None:
        """The step for other sizes; None if they have to be compiled.

        Args:
            formulas: of the model's sizes.
            shapes: of the tensor inputs, over all ranks.
            layout: of the batch.
        """
        first, second = (input_shapes(s.compiled.graph) for s in (self.first, self.second))
        sizes = formulas.values(self._pairs, first, second, shapes)
        compiled = self.second.compiled
        # uneven shards have operators of their own
        if sizes is None or not self._splits_evenly((first, second, shapes)):
            return None
        assert compiled.lowered is not None
        tangents, whole = _with_sizes(self._described, sizes)
        with FakeTensorMode():
            results = tuple(
                r
                if r.tangent is None
                else replace(
                    r,
                    tangent=torch.empty_strided(
                        *laid_out, dtype=r.tangent.dtype, device=r.tangent.device
                    ),
                )
                for r, laid_out in zip(compiled.lowered.results, tangents, strict=True)
            )
        lowered = replace(compiled.lowered, results=results)
        guards = tuple(
            guard if guard.program is None else replace(guard, program=program.graph.at(sizes))
            for guard, program in zip(compiled.graph.guards, self._guards, strict=True)
        )
        assert isinstance(self.second.train, Program)
        train = replace(
            self.second.train,
            step=lowered,
            forward=self._forward.at(sizes),
            backward=None if lowered.backward is None else self._backward.at(sizes),
        )
        evaluate = self._evaluate.at(sizes)
        return replace(
            self.second,
            compiled=replace(
                compiled, graph=replace(compiled.graph, guards=guards), lowered=lowered
            ),
            train=train,
            evaluate=lambda *flat: evaluate(list(flat)),
            layout=layout,
            whole_results={k: replace(self.second.whole_results[k], **v) for k, v in whole.items()},
        )

    def _splits_evenly(self, shapes: Sequence[Shapes]) -> bool:
        """Whether all sizes of the dims that vary divide by the numbers of their parts."""
        compiled = self.second.compiled
        for spec, same_input in zip(
            compiled.local.input_specs, zip(*shapes, strict=True), strict=True
        ):
            for axes, sizes in zip(spec.dims, zip(*same_input, strict=True), strict=True):
                parts = prod(compiled.plan.mesh[axis] for axis in axes)
                if len(set(sizes)) > 1 and any(size % parts for size in sizes):
                    return False
        return True


def _check_alike(first: ModelGraph, second: ModelGraph) -> None:
    """Refuse graphs that do more or other than each other besides their operators."""
    if first.effects != second.effects or first.out_spec != second.out_spec:
        raise NotAlikeError("results or side effects")
    if first.updates or second.updates:
        raise NotAlikeError("parameters that the forward writes")
    if (first.mutations, first.inputs) != (second.mutations, second.inputs):
        raise NotAlikeError("buffers or inputs")
    if [*first.parameters.values()] != [*second.parameters.values()]:
        raise NotAlikeError("parameters")
    if [*first.buffers.values()] != [*second.buffers.values()]:
        raise NotAlikeError("buffers")
    if first.numbers != second.numbers:
        raise NotAlikeError("numbers that vary")
    constants = zip(first.constants.items(), second.constants.items(), strict=False)
    if len(first.constants) != len(second.constants) or any(
        a is not b and name not in second.numbers.tensors for (_, a), (name, b) in constants
    ):
        raise NotAlikeError("constants")
    if len(first.guards) != len(second.guards):
        raise NotAlikeError("decisions of Python")
    for a, b in zip(first.guards, second.guards, strict=True):
        if (a.kind, a.source, a.sources) != (b.kind, b.source, b.sources):
            raise NotAlikeError(f"{a} and {b}")
        if not same_value(a.value, b.value):
            raise NotAlikeError(f"{a} and {b}")


def _described(step: BoundStep) -> Any:
    """Shapes and strides of the gradients of results, and of results that the caller gathers."""
    assert step.compiled.lowered is not None
    tangents = [
        None if r.tangent is None else (tuple(r.tangent.shape), r.tangent.stride())
        for r in step.compiled.lowered.results
    ]
    whole = {
        k: {"shape": tuple(w.shape), "stride": tuple(w.stride)}
        for k, w in step.whole_results.items()
    }
    return tangents, whole


def leaves_of(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from leaves_of(item)
    else:
        yield value


def _with_sizes(value: Any, sizes: Mapping[SizePair, int]) -> Any:
    if isinstance(value, Mapping):
        return {k: _with_sizes(v, sizes) for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [_with_sizes(v, sizes) for v in value]
        return tuple(items) if isinstance(value, tuple) else items
    return sizes[value.pair] if isinstance(value, _Size) else value
