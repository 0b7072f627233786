"""The program of one rank for a recorded step: an fx graph, from a `StepPlan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.fx as fx

from autopar.ir.spec import local_shape
from autopar.optim.layout import Box, Coords, Layout
from autopar.optim.pieces import Exchange, SumOverRanks, relative
from autopar.optim.recording import FORMULAS, Formula, NumberOf, Ref, Slot
from autopar.optim.steps import LocalShape, Step, StepPlan, is_list


@dataclass(frozen=True)
class LocalProgram:
    """A step of one rank.

    Args:
        gm: takes shards of the inputs, and then the numbers; returns shards of the outputs.
        layouts: of the outputs.
        collectives: how many it runs.
    """

    gm: fx.GraphModule
    layouts: tuple[Layout, ...]
    collectives: int

    def __call__(self, inputs: Sequence[Any], numbers: Sequence[Any]) -> list[tuple[Any, Layout]]:
        with torch.no_grad():
            results = self.gm(*inputs, *numbers)
        return list(zip(results, self.layouts, strict=True))


def local_program(
    plan: StepPlan, numbers: int, mesh: tuple[int, ...], coords: Coords, device: torch.device
) -> LocalProgram:
    """The program of the rank at `coords`.

    Args:
        numbers: how many Python numbers it takes.
    """
    return _Writer(plan, mesh, coords, device).write(numbers)


class _Writer:
    def __init__(
        self, plan: StepPlan, mesh: tuple[int, ...], coords: Coords, device: torch.device
    ) -> None:
        self._plan, self._mesh, self._coords, self._device = plan, mesh, coords, device
        self._graph = fx.Graph()
        self._root = torch.nn.Module()
        self._nodes: dict[int, fx.Node | None] = {}  # per part; None: this rank has none
        self._numbers: list[fx.Node] = []
        self._items: dict[int, fx.Node] = {}
        self._formulas: dict[Formula, fx.Node] = {}
        self._collectives = 0

    def write(self, numbers: int) -> LocalProgram:
        for i, part in enumerate(self._plan.inputs):
            self._nodes[part] = self._graph.placeholder(f"x{i}")
        self._numbers = [self._graph.placeholder(f"n{i}") for i in range(numbers)]
        for (_, kind), steps in groupby(self._plan.steps, Step.order):
            if kind:
                self._message(kind, list(steps))
            else:
                for step in steps:
                    self._step(step)
        outputs = tuple(self._nodes.get(part) for part in self._plan.outputs)
        self._graph.output(outputs)
        gm = fx.GraphModule(self._root, self._graph, "OptimizerStep")
        layouts = tuple(self._plan.parts[part].layout for part in self._plan.outputs)
        return LocalProgram(gm, layouts, self._collectives)

    def _here(self, part: int) -> bool:
        return self._plan.parts[part].layout.holds(self._coords)

    def _box(self, part: int) -> Box | None:
        p = self._plan.parts[part]
        return p.layout.box(p.value.shape, self._mesh, self._coords)

    # -- operators --------------------------------------------------------------------------------

    def _step(self, step: Step) -> None:
        if step.kind == "slice":
            self._slice(step)
        elif step.lists:
            self._lists(step)
        elif all(map(self._here, (*step.makes, *step.writes))):
            self._define(step.makes, self._call(step.target, step.args, step.kwargs))
        if step.writes:
            self._written(step.writes)

    def _written(self, parts: Sequence[int]) -> None:
        """Forget numbers that were read off what an operator writes."""
        roots = {self._plan.parts[part].root for part in parts}
        stale = [p for p in self._items if self._plan.parts[p].root in roots]
        for part in stale:
            del self._items[part]
        if stale:
            self._formulas.clear()

    def _define(self, makes: Sequence[int], made: fx.Node, several: bool | None = None) -> None:
        if several is None:
            several = len(makes) > 1
        if not several:
            for part in makes:
                self._nodes[part] = made
            return
        for i, part in enumerate(makes):
            self._nodes[part] = self._graph.call_function(_item, (made, i))

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> fx.Node:
        named = {k: self._argument(v) for k, v in kwargs.items()}
        return self._graph.call_function(target, tuple(map(self._argument, args)), named)

    def _argument(self, place: Any) -> Any:
        if isinstance(place, LocalShape):
            spec = place.layout.spec
            return list(local_shape(place.shape, spec, self._mesh, self._coords))
        if isinstance(place, Formula):
            if place not in self._formulas:
                operands = tuple(map(self._argument, place.operands))
                self._formulas[place] = self._graph.call_function(FORMULAS[place.name], operands)
            return self._formulas[place]
        if isinstance(place, tuple):
            return [self._argument(x) for x in place]
        if isinstance(place, Ref):
            return self._nodes[place.number]
        if isinstance(place, NumberOf):
            if place.number not in self._items:
                x = self._nodes[place.number]
                self._items[place.number] = self._graph.call_method("item", (x,))
            return self._items[place.number]
        return self._numbers[place.number] if isinstance(place, Slot) else place

    def _lists(self, step: Step) -> None:
        """An operator on lists, at the indices whose parts this rank has."""
        results = step.makes or step.writes
        here = [i for i, part in enumerate(results) if self._here(part)]
        if not here:
            return
        count = len(results)

        def chosen(place: Any) -> Any:
            return tuple(place[i] for i in here) if is_list(place, count) else place

        kwargs = {k: chosen(v) for k, v in step.kwargs.items()}
        made = self._call(step.target, tuple(map(chosen, step.args)), kwargs)
        self._define([step.makes[i] for i in here] if step.makes else [], made, True)

    def _slice(self, step: Step) -> None:
        (source,), (made,) = step.reads, step.makes
        here, there = self._box(source), self._box(made)
        if there is None:
            return
        assert here is not None
        x = self._nodes[source]
        box = relative(there, here)
        self._nodes[made] = self._graph.call_function(step.target, (x, box))

    # -- messages ---------------------------------------------------------------------------------

    def _message(self, kind: str, steps: Sequence[Step]) -> None:
        """Conversions of one kind at one level, together."""
        if kind == "exchange":
            self._send(Exchange(
                [(p.value.shape, p.value.dtype, p.layout, self._plan.parts[s.makes[0]].layout)
                 for s in steps for p in (self._plan.parts[s.reads[0]],)],
                self._mesh, self._coords, self._device,
            ), steps)  # fmt: skip
            return
        by_dtype: dict[torch.dtype, list[Step]] = {}
        for step in steps:
            by_dtype.setdefault(self._plan.parts[step.reads[0]].value.dtype, []).append(step)
        for dtype, group in by_dtype.items():
            parts = [self._plan.parts[s.reads[0]] for s in group]
            boxes = [
                self._box(s.reads[0]) if p.layout.counted_at(self._mesh, self._coords) else None
                for s, p in zip(group, parts, strict=True)
            ]
            shapes = [p.value.shape for p in parts]
            self._send(SumOverRanks(shapes, boxes, dtype, self._device), group)

    def _send(self, module: torch.nn.Module, steps: Sequence[Step]) -> None:
        name = f"message{self._collectives}"
        self._collectives += 1
        self._root.add_module(name, module)
        args = tuple(self._nodes.get(s.reads[0]) for s in steps)
        made = self._graph.create_node("call_module", name, args, {})
        for i, step in enumerate(steps):
            if self._here(step.makes[0]):
                self._nodes[step.makes[0]] = self._graph.call_function(_item, (made, i))


def _item(values: Sequence[Any], index: int) -> Any:
    return values[index]
