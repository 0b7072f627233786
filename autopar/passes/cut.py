"""Cuts one rank's forward program into the programs of stages, which run once per microbatch.

A stage's program is a `body`, which runs for every microbatch, and an `enter`, which runs once per
step: conversions of parameters (gathers, casts) do not depend on the microbatch, nor do the sums of
gradients over ranks, which are their transposes.

What depends on no parameter (masks, tables of positions) is computed in every stage that needs it,
and so is what depends on parameters alone. All other values that a later stage needs are sent
through every cut on the way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.fx as fx

from autopar.comm import steps
from autopar.ir.randomness import draws
from autopar.passes.apply_sharding import LocalProgram
from autopar.passes.subgraph import ancestors, subgraph

_GATHERS: frozenset[Any] = frozenset({steps.all_gather, steps.all_gather_vary})
_CONVERSIONS: frozenset[Any] = frozenset(
    {steps.vary, steps.slice_, torch.ops.aten._to_copy.default}
)


@dataclass(frozen=True)
class Crossing:
    """A value that is sent from one stage to the next.

    Args:
        shape: on each rank.
        differentiable: its gradient comes back.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    differentiable: bool

    @staticmethod
    def of(node: fx.Node) -> Crossing:
        like: Any = node.meta["global"]
        shape, grad = node.meta["local_shape"], node.meta["differentiable"]
        return Crossing(tuple(shape), like.dtype, like.device, grad)

    def empty(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class StageProgram:
    """One stage of one rank's program.

    Args:
        enter: takes the parameters, gives what enters the body in their place; None if they enter
            as they are.
        body: takes that, other arguments, and what was received; gives results, and what is sent.
        parameters: positions of the parameters among the arguments of the entire program.
        others: positions of the other arguments that the body takes.
        received: names of the values that the stage before sends to the body.
        results: positions of the results among those of the entire program; what is computed from
            data alone may be a result of several stages.
        made: names of the values that the body gives for later stages.
        sent: values that the next stage is sent, by name: made here, or passed on.
    """

    enter: fx.GraphModule | None
    body: fx.GraphModule
    parameters: tuple[int, ...]
    others: tuple[int, ...]
    received: tuple[str, ...]
    results: tuple[int, ...]
    made: tuple[str, ...]
    sent: Mapping[str, Crossing]


def cut(
    program: LocalProgram,
    parameters: int,
    firsts: Sequence[int] = (),
    *,
    gather_once: bool = True,
) -> tuple[StageProgram, ...]:
    """Cut a program into stages.

    Args:
        parameters: how many of its arguments, the first ones, are parameters.
        firsts: numbers of the model's operators at which stages begin, without the first stage's;
            in ascending order.
        gather_once: gathers of parameters run once per step, and what is gathered is kept for all
            microbatches; else every microbatch gathers.
    """
    moved = _CONVERSIONS | _GATHERS if gather_once else _CONVERSIONS
    return _Cut(program.gm, parameters, firsts, moved).stages()


class _Cut:
    def __init__(
        self,
        gm: fx.GraphModule,
        parameters: int,
        firsts: Sequence[int],
        moved: frozenset[Any],
    ) -> None:
        self.gm, self.firsts, self.moved = gm, firsts, moved
        self.nodes = list(gm.graph.nodes)
        self.arguments = [n for n in self.nodes if n.op == "placeholder"]
        self.parameters = self.arguments[:parameters]
        self.results: list[Any] = list(gm.graph.output_node().args[0])  # type: ignore[arg-type]

    @cached_property
    def entering(self) -> set[fx.Node]:
        """Conversions of parameters, and parameters."""
        entering: set[fx.Node] = set(self.parameters)
        for node in self.nodes:
            inputs = node.all_input_nodes
            if node.target in self.moved and len(inputs) == 1 and inputs[0] in entering:
                entering.add(node)
        return entering

    @cached_property
    def stage_of(self) -> dict[fx.Node, int]:
        """The stage of what depends on parameters and on other arguments; the rest is computed
        where it is needed."""
        of_parameters, of_others = set(self.parameters), set(self.arguments) - set(self.parameters)
        stages: dict[fx.Node, int] = {}
        for node in self.nodes:
            if node.op != "call_function":
                continue
            inputs = node.all_input_nodes
            seeded = any(n.op == "placeholder" and n.target == "autopar_seed" for n in inputs)
            random = seeded or draws(node)
            if any(n in of_parameters for n in inputs):
                of_parameters.add(node)
            if any(n in of_others for n in inputs) or random:
                of_others.add(node)
            placed = [stages[n] for n in inputs if n in stages]
            if node.target is operator.getitem:
                if placed:
                    stages[node] = placed[0]
            elif placed or random or (node in of_parameters and node in of_others):
                own = sum(first <= node.meta.get("number", 0) for first in self.firsts)
                stages[node] = max([own, *placed])
        return stages

    def stages(self) -> tuple[StageProgram, ...]:
        count = len(self.firsts) + 1
        results: list[list[int]] = [[] for _ in range(count)]
        for k, x in enumerate(self.results):
            for stage in self._giving(x, count):
                results[stage].append(k)
        used = [self._used(stage, results[stage]) for stage in range(count)]
        # the value of a stage that a later one takes goes through every cut between them
        last: dict[fx.Node, int] = {}
        for stage, nodes in enumerate(used):
            last |= dict.fromkeys((n for n in nodes if self.stage_of.get(n, stage) < stage), stage)
        crossing = [
            [n for n in self.nodes if n in last and self.stage_of[n] <= stage < last[n]]
            for stage in range(count)
        ]
        # what a later stage takes has sources of its own, which may come from before
        programs = []
        for stage in range(count):
            made = [n for n in crossing[stage] if self.stage_of[n] == stage]
            programs.append(
                self._program(
                    stage, results[stage], made, crossing[stage - 1] if stage else [],
                    crossing[stage],
                )
            )  # fmt: skip
        return tuple(programs)

    def _giving(self, result: Any, stages: int) -> list[int]:
        """The stages that give a result: its own, or all that read what it is computed from (each
        of these keeps the buffer that it updates)."""
        if not isinstance(result, fx.Node):
            return [0]
        if result in self.stage_of:
            return [self.stage_of[result]]
        sources = ancestors([result]).difference(self.parameters).intersection(self.arguments)
        return [s for s in range(stages) if sources & self._used(s, ())] or [0]

    def _used(self, stage: int, results: Sequence[int]) -> set[fx.Node]:
        """What the operators of a stage, and those computed everywhere, read in this stage."""
        own = [n for n, s in self.stage_of.items() if s == stage]
        return ancestors([*own, *(self.results[k] for k in results)], self._given(stage))

    def _given(self, stage: int) -> Callable[[fx.Node], bool]:
        """Whether a stage has a value without computing it in its body."""
        return lambda node: self.stage_of.get(node, stage) != stage or node in self.entering

    def _program(
        self,
        stage: int,
        results: Sequence[int],
        made: Sequence[fx.Node],
        received: Sequence[fx.Node],
        sent: Sequence[fx.Node],
    ) -> StageProgram:
        outputs = [self.results[k] for k in results]
        needed = ancestors([*outputs, *made], self._given(stage))
        entered = [n for n in self.nodes if n in needed and n in self.entering]
        taken = [n for n in received if n in needed]
        others = [k for k, n in enumerate(self.arguments) if n in needed and n not in self.entering]
        enter, parameters = self._enter(entered)
        inputs = [*entered, *(self.arguments[k] for k in others), *taken]
        body = subgraph(self.gm, inputs, needed, [*outputs, *made])
        return StageProgram(
            enter, body, parameters, tuple(others), tuple(n.name for n in taken), tuple(results),
            tuple(n.name for n in made), {n.name: Crossing.of(n) for n in sent},
        )  # fmt: skip

    def _enter(self, entered: Sequence[fx.Node]) -> tuple[fx.GraphModule | None, tuple[int, ...]]:
        needed = ancestors(entered)
        taken = [k for k, n in enumerate(self.parameters) if n in needed]
        if all(n.op == "placeholder" for n in entered):
            return None, tuple(taken)
        return subgraph(self.gm, [self.parameters[k] for k in taken], needed, entered), tuple(taken)
