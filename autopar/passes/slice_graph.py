"""The graph of one slice of the batch, and that of what is computed from the whole batch first."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from autopar.ir.effects import Effects
from autopar.ir.graph import ModelGraph, bound_arguments, map_operands, operands, producer, shape_of
from autopar.ir.numbers import Numbers
from autopar.ir.reads import Reads
from autopar.passes.time_split import (
    NotSeparableError,
    Separation,
    State,
    Step,
    Value,
    dim_of,
    with_outer,
)
from autopar.sharding.node_rules import results
from autopar.sharding.rules.view import RESHAPES

aten = torch.ops.aten


def whole_graph(separation: Separation) -> fx.GraphModule | None:
    """What is computed once, from the whole batch: takes the tensors that the graph's buffers,
    constants and inputs are (in the order of its placeholders), returns `separation.whole`. None if
    there is nothing to compute."""
    if not separation.whole:
        return None
    graph, out = separation.graph, fx.Graph()
    wanted = [node for (node, _), _ in separation.whole]
    needed: set[fx.Node] = set(wanted)
    for node in reversed(graph.nodes):
        if node in needed:
            needed |= {*node.all_input_nodes}
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        argument = node.op == "placeholder" and results(node)
        if (argument and node.target not in graph.parameters) or node in needed:
            copies[node] = out.node_copy(node, copies.__getitem__)
    values = []
    for (node, result), _ in separation.whole:
        single = isinstance(node.meta["val"], torch.Tensor)
        item = copies[node]
        values.append(item if single else out.call_function(operator.getitem, (item, result)))
    out.output(tuple(values))
    return fx.GraphModule(graph.gm, out)


def slice_graph(separation: Separation, samples: int) -> ModelGraph:
    """The graph of a slice.

    Its inputs are the tensor inputs, sliced where they have samples, and `separation.whole`. Its
    results are in the states of those of the whole graph.

    Args:
        samples: of the slice.

    Raises:
        NotSeparableError: an operator's arguments cannot be those of a slice.
    """
    return _Writer(separation, samples).graph()


@dataclass
class _Writer:
    separation: Separation
    samples: int
    out: fx.Graph = field(default_factory=fx.Graph)
    values: dict[tuple[Value, State], fx.Node] = field(default_factory=dict)

    def graph(self) -> ModelGraph:
        separation, graph = self.separation, self.separation.graph
        placeholders = [n for n in graph.nodes if n.op == "placeholder" and results(n)]
        for node in placeholders:
            new = self.out.node_copy(node)
            state = separation.states[node, 0]
            new.meta["val"] = self._sliced(node.meta["val"], state)
            self.values[(node, 0), state] = new
        names = [str(n.target) for n in placeholders if str(n.target) in graph.inputs]
        for k, (value, state) in enumerate(separation.whole):
            node, result = value
            new = self.out.placeholder(f"whole_{k}")
            new.meta = {
                "val": self._sliced(results(node)[result], state), "autopar": node.meta["autopar"]
            }  # fmt: skip
            self.values[value, state] = new
            names.append(f"whole_{k}")
        for node in graph.compute_nodes():
            state = separation.states[node, 0]
            computed = (node, state) not in separation.steps  # from the whole batch
            if not computed and ((node, 0), state) not in self.values:
                self._call(node, state)
        outputs = [
            self._value(producer(x), separation.state(x)) if isinstance(x, fx.Node) else x
            for x in graph.output.args[0]  # type: ignore[union-attr]
        ]
        self.out.output(tuple(outputs))
        self.out.eliminate_dead_code()
        gm = fx.GraphModule(graph.gm, self.out)
        return replace(
            graph, gm=gm, inputs=tuple(names), guards=(), updates={}, reads=Reads(),
            effects=Effects(), numbers=Numbers(),
            in_spec=pytree.tree_structure((tuple(names), {})),
        )  # fmt: skip

    def _size(self, size: int) -> int:
        """A global extent as that of the slice."""
        if size % self.separation.samples:
            raise NotSeparableError(
                f"an extent of {size} does not come in {self.separation.samples} samples; pass "
                "microbatch='independent' to treat each microbatch as a batch of its own"
            )
        return size * self.samples // self.separation.samples

    def _shape(self, shape: Sequence[int], state: State) -> list[int]:
        dim = dim_of(state) if state[0] == "S" else 0 if state == "I" else None
        return [self._size(n) if d == dim else n for d, n in enumerate(shape)]

    def _sliced(self, fake: Any, state: State) -> Any:
        """A fake tensor of a slice's shape."""
        if state[0] != "S":
            return fake
        dim = dim_of(state)
        with fake.fake_mode, torch.no_grad():
            return fake.narrow(dim, 0, self._size(fake.shape[dim])).clone()

    def _value(self, value: Value, state: State) -> fx.Node:
        """A value in a state, written where it is needed first."""
        if (value, state) not in self.values:
            node, _ = value
            own = self.separation.states[value]
            if state == "P" and own == "R":
                share = self.samples / self.separation.samples
                same = self._value(value, own)
                self.values[value, state] = self._new(node, aten.mul.Scalar, (same, share))
            else:
                self._call(node, state)
        return self.values[value, state]

    def _call(self, node: fx.Node, state: State) -> None:
        """Write an operator call whose (first) result is in a state."""
        step = self.separation.steps[node, state]
        given = [
            None if n is None or need is None else self._value(producer(n), need)
            for n, need in zip(operands(node), step.inputs, strict=True)
        ]
        args, kwargs = map_operands(node, given)
        target: Any = node.target
        states = self._states(node, step, state)
        if state == "I":
            args = tuple(self.samples if x == self.separation.samples else x for x in args)
        if any(s[0] == "S" for s in states):
            shape = self._shape(shape_of(results(node)[0]), states[0])
            if str(target) in RESHAPES:
                target, args, kwargs = aten.reshape.default, (given[0], shape), {}
            else:
                args, kwargs = self._with_sizes(node, step, states[0], args, kwargs)
        new = self._new(node, target, args, kwargs)
        single = isinstance(node.meta["val"], torch.Tensor)
        for k, (whole, s) in enumerate(zip(results(node), states, strict=True)):
            item = new if single else self._new(node, operator.getitem, (new, k))
            if step.scaled:
                share = self.samples / self.separation.samples
                item = self._new(node, aten.mul.Scalar, (item, share))
            got, expected = shape_of(item.meta["val"]), tuple(self._shape(shape_of(whole), s))
            if got != expected:
                raise NotSeparableError(
                    f"{node.target} at {self.separation.graph.info(node).source} gives "
                    f"{list(got)} on a slice of {self.samples} samples and not {list(expected)}; "
                    "pass microbatch='independent' to treat each microbatch as a batch of its own"
                )
            self.values[(node, k), s] = item

    def _states(self, node: fx.Node, step: Step, state: State) -> list[State]:
        if step.strategy is None:
            return [state] * len(results(node))
        states = (spec.state(0) for spec in step.strategy.outputs)
        return ["R" if s == "V" else with_outer(s, step.outer) for s in states]

    def _with_sizes(
        self, node: fx.Node, step: Step, state: State, args: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        """Arguments of an operator that is told the shape of its result."""
        shape = self._shape(shape_of(results(node)[0]), state)
        assert isinstance(node.target, torch._ops.OpOverload)
        names = [a.name for a in node.target._schema.arguments]
        if node.target is aten.repeat.default and state[0] == "S":
            repeats, dim = list(args[1]), dim_of(state)
            if step.strategy is None:
                repeats[dim] = self._size(repeats[dim])
            return (args[0], repeats), kwargs
        at = next((i for i, n in enumerate(names) if n in ("size", "shape")), None)
        if at is None or not isinstance(bound_arguments(node).get(names[at]), list | tuple):
            return args, kwargs
        if names[at] in kwargs:
            return args, {**kwargs, names[at]: shape}
        return (*args[:at], shape, *args[at + 1 :]), kwargs

    def _new(self, node: fx.Node, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
        """A call in the place of a part of a node."""
        kwargs = kwargs or {}
        name = node.name if target is node.target else None
        new = self.out.create_node("call_function", target, tuple(args), dict(kwargs), name)
        fakes: Any = fx.map_arg((tuple(args), dict(kwargs)), lambda n: n.meta["val"])
        if target is operator.getitem:
            new.meta["val"] = fakes[0][0][fakes[0][1]]
        else:
            first = results(node)[0]
            with first.fake_mode, torch.no_grad():  # type: ignore[attr-defined]
                new.meta["val"] = target(*fakes[0], **fakes[1])
        new.meta["autopar"] = node.meta["autopar"]
        return new
