"""Regions of a program that run in slices of one factor, one slice after another.

A region begins with an operator whose result is to be sliced along a dim, and goes on as long as
operators carry the slices, by the states of `time_split`: what mixes slices ends it. What it takes
from before is whole, and sliced where an operator takes slices. An operator within its range that
depends on no slice is either computed before it, or, if only slices of it are needed, in slices
too; communication is always computed before it. AutoChunk (arXiv:2401.10652) finds such regions by
tracing dims; here the sharding rules do.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from autopar.ir.graph import ModelGraph, operands, producer
from autopar.ir.randomness import draws
from autopar.passes.time_split import (
    Analysis,
    NotSeparableError,
    Separation,
    State,
    Step,
    Value,
    outer_of,
)
from autopar.sharding.node_rules import is_floating, results, rule_of
from autopar.sharding.rules.view import RESHAPES

# In which a dim comes where its single elements cannot be told apart.
PIECES = (64, 32, 16, 8, 4, 2)


def as_model_graph(gm: fx.GraphModule, inputs: Sequence[str] | None = None) -> ModelGraph:
    """A program whose placeholders are all inputs.

    Args:
        inputs: names of the placeholders; of all if None.
    """
    names = inputs or [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]
    spec = pytree.tree_structure((tuple(names), {}))
    return ModelGraph(gm, {}, {}, tuple(names), (), spec, pytree.tree_structure(()))


def may_split(node: fx.Node) -> bool:
    """Whether a node may be part of a region: a pure operator with a rule, that draws nothing and
    is no step of communication."""
    target = node.target
    if node.op != "call_function":
        return False
    if target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int)
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable or draws(node):
        return False
    values = results(node)
    return bool(values) and (str(target) in RESHAPES or rule_of(node)[1])


# How operators carry slices, by operator and number of pieces.
Ways = dict[tuple[fx.Node, int], list[tuple[Step, list[State]]]]


@dataclass
class RegionStates(Analysis):
    """The states of values in a region, operator by operator.

    Args:
        graph: of the region, or of a program that it is a part of.
        samples: pieces that the factor comes in; a slice has one or more of them.
        known: ways that were worked out before.
    """

    known: Ways = field(default_factory=dict)

    def enter(self, node: fx.Node) -> None:
        """Note what exists before the region. It is at hand as a whole and in slices."""
        for k, _ in enumerate(results(node)):
            self.states[node, k] = "R"
            self.from_whole.add((node, k))
        self.of_data.add(node)

    def begin(self, node: fx.Node, dim: int) -> bool:
        """Begin with an operator whose first result is sliced; False if it cannot be."""
        for step, outputs in self.ways(node):
            if outputs[0] != f"S{dim}":
                continue
            pairs = zip(operands(node), step.inputs, strict=True)
            if all(
                operand is None
                or need is None
                or self.states[producer(operand)] == need
                or self.can(producer(operand), need)
                for operand, need in pairs
            ):
                self.define(node, step, outputs)
                return True
        return False

    def carry(self, node: fx.Node) -> bool:
        """Go on with the next operator; False if it mixes slices."""
        have = [None if n is None else self.states[producer(n)] for n in operands(node)]
        if all(state in (None, "R") for state in have):
            self.define(node, Step(None, tuple(have)), ["R"] * len(results(node)))
            return True
        found = self.best(node)
        if found is not None:
            self.define(node, *found)
        return found is not None

    def ways(self, node: fx.Node) -> Iterator[tuple[Step, list[State]]]:
        states = [self.states.get(producer(n), "") for n in operands(node) if n is not None]
        if str(node.target) in RESHAPES or any("/" in state for state in states):
            yield from super().ways(node)
            return
        key = node, self.samples
        if key not in self.known:
            self.known[key] = list(super().ways(node))
        yield from self.known[key]


@dataclass(frozen=True)
class Region:
    """Operators of a program, one after another, that may run in slices.

    Args:
        nodes: of its range; calls and the `getitem`s of their results.
        dim: of the first result of its first operator, that is sliced.
        pieces: that the factor comes in.
        before: nodes of its range that are computed once, before the slices.
        given: states of the values that are used after it.
    """

    nodes: tuple[fx.Node, ...]
    dim: int
    pieces: int
    before: frozenset[fx.Node]
    given: dict[Value, State]


@dataclass
class Growth:
    """A region that grows operator by operator.

    Args:
        program: with fake tensors of local shapes as values.
        known: of `RegionStates`.
    """

    program: ModelGraph
    order: Sequence[fx.Node]
    start: int
    dim: int
    pieces: int
    known: Ways = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.states = RegionStates(self.program, {}, self.pieces, frozenset(), known=self.known)
        self.end = self.start
        self.apart: set[fx.Node] = set()
        first = self.order[self.start]
        self._enter(first)
        self.began = may_split(first) and first.target is not operator.getitem
        self.began = self.began and self.states.begin(first, self.dim)

    def _enter(self, node: fx.Node) -> None:
        for n in node.all_input_nodes:
            source, _ = producer(n)
            if (source, 0) not in self.states.states and results(source):
                self.states.enter(source)

    def advance(self) -> bool:
        """Take in the next node; False if the region ends before it."""
        if not self.began or self.end + 1 >= len(self.order):
            return False
        node = self.order[self.end + 1]
        if not may_split(node):
            if not self._stands_apart(node):
                return False
            self.apart.add(node)
            self._enter(node)
            self.states.enter(node)
        elif node.target is not operator.getitem:
            self._enter(node)
            if not self.states.carry(node):
                return False
        self.end += 1
        return True

    def _stands_apart(self, node: fx.Node) -> bool:
        """Whether a node that cannot be sliced can be computed before the slices."""
        if node.op != "call_function" or not results(node) or draws(node):
            return False
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            return False
        states = self.states.states
        return all(states.get(producer(n), "R") == "R" for n in node.all_input_nodes)

    def region(self) -> Region | None:
        """The region as it is, if what is used afterwards is slices, sums or whole values."""
        nodes = self.order[self.start : self.end + 1]
        inside, states = set(nodes), self.states.states
        steps: dict[fx.Node, list[Step]] = {}
        for (node, state), step in self.states.steps.items():
            if state != "R":
                steps.setdefault(node, []).append(step)
        before = set(self.apart)  # calls
        given: dict[Value, State] = {}
        for node in reversed(nodes):
            if any(user not in inside for user in node.users):
                value = producer(node)
                if not isinstance(node.meta["val"], torch.Tensor):
                    return None  # its results are taken apart outside
                state = states[value]
                if state == "R":
                    before.add(value[0])
                elif outer_of(state) > 1 or not _combines(value, state):
                    return None
                else:
                    given[value] = state
            if node.target is operator.getitem:
                continue
            if node in before:
                taken = node.all_input_nodes
            else:
                taken = [
                    n
                    for step in steps.get(node, ())
                    for n, need in zip(operands(node), step.inputs, strict=True)
                    if n is not None and need in ("R", "P") and states[producer(n)] == "R"
                ]
            before |= {source for n in taken if (source := producer(n)[0]) in inside}
        if nodes[0] in before or not given:
            return None
        kept = frozenset(n for n in nodes if producer(n)[0] in before)
        return Region(tuple(nodes), self.dim, self.pieces, kept, given)


def _combines(value: Value, state: State) -> bool:
    """Whether slices of a value are put together, or its sums added up, without rounding."""
    node, result = value
    return state != "P" or is_floating(results(node)[result])


def separate_region(region: Region) -> tuple[Separation, list[fx.Node]]:
    """How a region splits, as a graph of its own, and the nodes of the program that this graph
    takes, in order.

    Raises:
        NotSeparableError: it does not split.
    """
    out = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inner = [n for n in region.nodes if n not in region.before]
    inside = set(inner)
    entries = list(dict.fromkeys(x for n in inner for x in n.all_input_nodes if x not in inside))
    for k, node in enumerate(entries):
        new = copies[node] = out.placeholder(f"entry_{k}")
        new.meta = {"autopar": inner[0].meta["autopar"], **node.meta}
    for node in inner:
        copies[node] = out.node_copy(node, copies.__getitem__)
    given = [
        copies[n] for n in inner
        if producer(n) in region.given and isinstance(n.meta["val"], torch.Tensor)
    ]  # fmt: skip
    out.output(tuple(given))
    graph = as_model_graph(fx.GraphModule(torch.nn.Module(), out))
    states = RegionStates(graph, {}, region.pieces, frozenset())
    for node in graph.nodes:
        if node.op == "placeholder":
            states.enter(node)
    calls = list(graph.compute_nodes())
    done = states.begin(calls[0], region.dim) and all(map(states.carry, calls[1:]))
    if not done:
        raise NotSeparableError(f"{calls[0]} does not split into {region.pieces} pieces")
    for node in given:
        states.need(producer(node), states.states[producer(node)])
    separation = Separation(graph, region.pieces, states.states, states.steps, states.whole)
    return separation, entries
