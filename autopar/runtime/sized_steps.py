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
from typing import Any

import torch.fx as fx

from autopar.comm.ranks import Ranks
from autopar.errors import CaptureError
from autopar.ir.graph import ModelGraph
from autopar.ir.size_formulas import (
    Shapes,
    SizeFormulas,
    input_shapes,
    show_sizes,
    varying_dims,
)
from autopar.ir.sized_graph import NotAlikeError
from autopar.runtime.batch import BatchLayout
from autopar.runtime.bound_step import BoundStep
from autopar.runtime.call import Call
from autopar.runtime.sized_step import SizedStep, leaves_of

log = logging.getLogger(__name__)

_KEPT = 256  # steps for single sizes, which share their programs
_CAPTURES = 4  # with symbols, of the same dims


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
        for sized in self._of_kind(kind, compiled, shapes):
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

    def _of_kind(
        self, kind: Any, compiled: Sequence[BoundStep], new: Shapes
    ) -> Iterable[SizedStep]:
        """Those that there are, then new ones of two compiled steps; of these that may serve."""
        alike = self._alike.setdefault(kind, [])
        yield from [sized for sized in alike if _may_serve(sized.first, sized.second, new)]
        pairs = ((a, b) for k, b in enumerate(compiled) for a in compiled[:k])
        for first, second in reversed(list(pairs)):
            name = first.number, second.number
            if name in self._tried or not _may_serve(first, second, new):
                continue
            self._tried.add(name)
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
        new, graph = layout.whole_shapes(), sized.second.compiled.graph
        varying = varying_dims(graph, [*shapes, new])
        name = kind, tuple((k, *dims) for k, dims in varying.items())
        known = self._formulas.setdefault(name, [])
        yield from [f for f in known if f is not None]
        if len(known) >= _CAPTURES:
            return
        found = None
        try:
            symbolic = self._trace(call, layout, varying)
            if _gives_alike(symbolic, graph):
                found = SizeFormulas.of(symbolic)
        except CaptureError as error:
            log.info("sizes of inputs stay constants of programs: %s", error)
        known.append(found)
        if found is not None:
            yield found


def _gives_alike(symbolic: ModelGraph, graph: ModelGraph) -> bool:
    """Whether what a model returns and keeps besides tensors is the same for all sizes."""
    plain = [
        [x for x in leaves_of(g.output.args[0]) if not isinstance(x, fx.Node)]
        for g in (symbolic, graph)
    ]
    return (
        repr(plain[0]) == repr(plain[1])
        and repr(symbolic.effects) == repr(graph.effects)
        and symbolic.out_spec == graph.out_spec
    )


def _may_serve(first: BoundStep, second: BoundStep, new: Shapes) -> bool:
    known = [input_shapes(step.compiled.graph) for step in (first, second)]
    return show_sizes(known[0], known[1], new)


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
