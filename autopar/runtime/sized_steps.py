"""Steps for inputs of further sizes, without another capture.

Two compiled steps of a model, for inputs that differ in some sizes, differ in integers alone where
sizes decide nothing else. Their common program takes these integers as inputs. What they are for
other sizes follows from a capture with symbols for the sizes that vary (`size_formulas.py`), which
also says for which sizes the model's own code does the same. Other sizes are compiled.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.comm.ranks import Ranks
from autopar.errors import CaptureError
from autopar.ir.graph import ModelGraph
from autopar.ir.guards import same_value
from autopar.ir.size_formulas import Shapes, SizeFormulas, input_shapes, varying_dims
from autopar.ir.sized_graph import NotAlikeError, SizedGraph, SizePair, merged
from autopar.runtime.batch import BatchLayout
from autopar.runtime.bound_step import BoundStep
from autopar.runtime.call import Call
from autopar.runtime.program import Boxed, Program, boxed

log = logging.getLogger(__name__)

_KEPT = 256  # steps for single sizes, which share their programs
_CAPTURES = 4  # with symbols, of the same dims


@dataclass(frozen=True)
class _Size:
    """An integer that depends on sizes of inputs."""

    pair: SizePair


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
        self._forward = SizedGraph.of(one.lowered.forward, two.lowered.forward)
        self._backward = None
        if one.lowered.backward is not None and two.lowered.backward is not None:
            self._backward = SizedGraph.of(one.lowered.backward, two.lowered.backward)
        self._evaluate = SizedGraph.of(one.local.gm, two.local.gm)
        self._guards = [
            None if a.program is None or b.program is None else SizedGraph.of(a.program, b.program)
            for a, b in zip(one.graph.guards, two.graph.guards, strict=True)
        ]
        self._described = merged(_described(first), _described(second), _Size)
        graphs = (self._forward, self._backward, self._evaluate, *self._guards)
        self._pairs = {pair for g in graphs if g is not None for pair in g.sizes}
        self._pairs |= {x.pair for x in _leaves(self._described) if isinstance(x, _Size)}
        self._run_forward, self._run_evaluate = boxed(self._forward.gm), boxed(self._evaluate.gm)
        self._run_backward = None if self._backward is None else boxed(self._backward.gm)

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
            guard if graph is None else replace(guard, program=graph.at(sizes))
            for guard, graph in zip(compiled.graph.guards, self._guards, strict=True)
        )
        train = Program(
            lowered,
            _with(self._run_forward, self._forward, sizes),
            None if self._backward is None or self._run_backward is None
            else _with(self._run_backward, self._backward, sizes),
            self.second.train.gradients if isinstance(self.second.train, Program) else None,
        )  # fmt: skip
        return replace(
            self.second,
            compiled=replace(
                compiled, graph=replace(compiled.graph, guards=guards), lowered=lowered
            ),
            train=train,
            evaluate=_unboxed(_with(self._run_evaluate, self._evaluate, sizes)),
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


class SizedSteps:
    """Of one model, by what else but sizes a step depends on.

    Args:
        trace: captures the model for a call, with symbols for the given dims of the given inputs.
        ranks: of the run; their programs may differ.
    """

    def __init__(
        self,
        trace: Callable[[Call, BatchLayout, Mapping[int, Collection[int]]], ModelGraph],
        ranks: Ranks,
    ) -> None:
        self._trace, self._ranks = trace, ranks
        self._alike: dict[Any, list[SizedStep]] = {}
        self._formulas: dict[Any, list[SizeFormulas | None]] = {}
        self._tried: set[tuple[int, int]] = set()
        self._steps: OrderedDict[Any, list[BoundStep]] = OrderedDict()

    def known(self, key: Any) -> list[BoundStep]:
        """Steps for a call of this key."""
        return self._steps.get(key, [])

    def find(
        self, key: Any, kind: Any, call: Call, layout: BatchLayout, compiled: Sequence[BoundStep]
    ) -> BoundStep | None:
        """A step for a call of new sizes; None if it has to be compiled.

        Args:
            kind: the key without sizes.
            compiled: steps of this kind that serve the model as it is.
        """
        shapes = layout.whole_shapes()
        serving = {step.number for step in compiled}
        for sized in self._of_kind(kind, compiled):
            if sized.second.number not in serving:
                continue
            for formulas in self._formulas_for(kind, sized, call, layout):
                step = sized.at(formulas, shapes, layout)
                if self._ranks.all(step is not None) and step is not None:
                    self._steps.setdefault(key, []).append(step)
                    while len(self._steps) > _KEPT:
                        self._steps.popitem(last=False)
                    return step
        return None

    def _of_kind(self, kind: Any, compiled: Sequence[BoundStep]) -> Iterable[SizedStep]:
        """Those that there are, then new ones of the last compiled step with each before it."""
        alike = self._alike.setdefault(kind, [])
        yield from list(alike)
        second = compiled[-1]
        for first in reversed(compiled[:-1]):
            if (first.number, second.number) in self._tried:
                continue
            self._tried.add((first.number, second.number))
            sized = _common(first, second)
            if self._ranks.all(sized is not None) and sized is not None:
                log.info("sizes of inputs have become inputs of a program")
                alike.append(sized)
                yield sized

    def _formulas_for(
        self, kind: Any, sized: SizedStep, call: Call, layout: BatchLayout
    ) -> Iterator[SizeFormulas]:
        """Of the sizes that vary: those that are known, then those of a new capture, as the model's
        Python may take another way for these sizes."""
        shapes = [input_shapes(s.compiled.graph) for s in (sized.first, sized.second)]
        new = layout.whole_shapes()
        varying = varying_dims(sized.second.compiled.graph, [*shapes, new])
        name = kind, tuple((k, *dims) for k, dims in varying.items())
        known = self._formulas.setdefault(name, [])
        yield from [f for f in known if f is not None]
        # sizes 0 and 1 have no symbols
        if len(known) >= _CAPTURES or not varying or min(map(min, filter(None, new))) < 2:
            return
        found = None
        try:
            symbolic = self._trace(call, layout, varying)
            if _gives_alike(symbolic, sized.second.compiled.graph):
                found = SizeFormulas.of(symbolic)
        except CaptureError as error:
            log.info("sizes of inputs stay constants of programs: %s", error)
        known.append(found)
        if found is not None:
            yield found


def _gives_alike(symbolic: ModelGraph, graph: ModelGraph) -> bool:
    """Whether what a model returns and keeps besides tensors is the same for all sizes."""
    plain = [
        [x for x in _leaves(g.output.args[0]) if not isinstance(x, fx.Node)]
        for g in (symbolic, graph)
    ]
    return (
        repr(plain[0]) == repr(plain[1])
        and repr(symbolic.effects) == repr(graph.effects)
        and symbolic.out_spec == graph.out_spec
    )


def _common(first: BoundStep, second: BoundStep) -> SizedStep | None:
    """Both as one, if they differ in sizes alone."""
    if any(s.compiled.lowered is None or s.compiles for s in (first, second)):
        return None
    if any(s.compiled.memory is not None for s in (first, second)):
        return None  # a schedule for one size may be over the budget for another
    try:
        return SizedStep(first, second)
    except NotAlikeError as error:
        log.debug("programs for other sizes differ in more: %s", error)
        return None


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


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _with_sizes(value: Any, sizes: Mapping[SizePair, int]) -> Any:
    if isinstance(value, Mapping):
        return {k: _with_sizes(v, sizes) for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [_with_sizes(v, sizes) for v in value]
        return tuple(items) if isinstance(value, tuple) else items
    return sizes[value.pair] if isinstance(value, _Size) else value


def _with(run: Boxed, graph: SizedGraph, sizes: Mapping[SizePair, int]) -> Boxed:
    """A graph with its sizes given."""
    rest = [sizes[pair] for pair in graph.sizes]

    def call(arguments: list[Any]) -> Sequence[Any]:
        arguments += rest
        return run(arguments)

    return call


def _unboxed(run: Boxed) -> Callable[..., Any]:
    return lambda *flat: run(list(flat))
