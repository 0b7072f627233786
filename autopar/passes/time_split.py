"""Which values of a graph split over time: into slices of the batch, processed one after another.

A time split is a mesh axis on which nothing can be communicated. Along it a value is in one of
three states: the same for every slice (R), slices of one dim (S), or a sum of what the slices give
(P). The sharding rules say how each operator carries them. Values of inputs alone that need the
whole batch (the count of valid labels) are computed from it, before the first slice; and so is
noise, of which a slice could not draw its part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from autopar.errors import PlanError
from autopar.ir.graph import ModelGraph, operands, producer, shape_of
from autopar.ir.randomness import draws
from autopar.passes.separable_form import separable_form
from autopar.sharding.lowerings.shard import is_scaled
from autopar.sharding.node_rules import is_floating, results, rule_of
from autopar.sharding.rule import OpRule, Strategy
from autopar.sharding.rules.view import RESHAPES
from autopar.sharding.strategies import strategies

# A result of an operator call or a placeholder: the node, and which of its results.
Value = tuple[fx.Node, int]

# State of a value: "R", "P", or "S0", "S1", ... for the dim that is sliced; "S0/5" for a dim whose
# outer part, of extent 5, is not (it was merged with the dim of samples); "I" of numbers of samples
# that count from the first of the slice.
State = str


def dim_of(state: State) -> int:
    """The dim that is sliced."""
    return int(state[1:].partition("/")[0])


def outer_of(state: State) -> int:
    """The extent of the outer part of that dim, which is not sliced."""
    return int(state.partition("/")[2] or 1)


# Made for any shape; the operands say only what dtype and device.
_FILLS = frozenset(
    getattr(getattr(torch.ops.aten, name), overload)
    for name, overload in (
        *((name, "default") for name in ("zeros", "ones", "full")),
        ("empty", "memory_format"),
        *((name, "default") for name in ("new_zeros", "new_ones", "new_full", "new_empty")),
    )
)


class NotSeparableError(PlanError):
    """The batch cannot be split exactly: an operator mixes its samples."""


def even_sizes(samples: int, count: int) -> tuple[int, ...]:
    """Sizes of `count` slices of a batch, which differ by one at most; larger ones first."""
    size, rest = divmod(samples, count)
    return (size + 1,) * rest + (size,) * (count - rest)


def with_outer(state: State, outer: int) -> State:
    """A state whose sliced dim, if there is one, has such an outer part."""
    return f"{state}/{outer}" if state[0] == "S" and outer > 1 else state


@dataclass(frozen=True)
class Step:
    """How an operator carries one state of its results.

    Args:
        strategy: of its rule; None where it is made for a slice's size (`zeros`).
        inputs: state of each operand; None where it is absent.
        scaled: the result is multiplied by the slice's share of the batch.
        outer: extent of the outer part of sliced dims, see `State`.
    """

    strategy: Strategy | None
    inputs: tuple[State | None, ...]
    scaled: bool = False
    outer: int = 1


@dataclass(frozen=True)
class Separation:
    """How a graph splits into slices of its batch.

    Args:
        graph: with the counts of losses written out.
        samples: of the batch.
        states: of every value, by default.
        steps: by operator and the state of its results: first as by default, then as users of
            slices need them.
        whole: values that are computed from the whole batch, in the states that are asked for.
    """

    graph: ModelGraph
    samples: int
    states: Mapping[Value, State]
    steps: Mapping[tuple[fx.Node, State], Step]
    whole: Mapping[tuple[Value, State], None]

    def state(self, value: fx.Node) -> State:
        """Of a result of the graph."""
        return self.states[producer(value)]


def separate(
    graph: ModelGraph, dims: Mapping[str, int], samples: int, trainable: frozenset[str]
) -> Separation:
    """Find out how a graph splits over its batch.

    Args:
        dims: by placeholder name, the dim of an input that holds samples.
        samples: of the batch.
        trainable: placeholder names of what requires grad.

    Raises:
        NotSeparableError: naming the operator that mixes samples, its source line and the remedy.
    """
    return Analysis(separable_form(graph, dims), dims, samples, trainable).run()


@dataclass
class Analysis:
    """Finds the states of values, operator by operator.

    Args:
        graph, dims, samples, trainable: as of `separate`.

    Attributes:
        of_data: nodes computed from inputs, buffers and constants alone.
        from_whole: values of these that are computed from the whole batch.
    """

    graph: ModelGraph
    dims: Mapping[str, int]
    samples: int
    trainable: frozenset[str]
    states: dict[Value, State] = field(default_factory=dict)
    steps: dict[tuple[fx.Node, State], Step] = field(default_factory=dict)
    whole: dict[tuple[Value, State], None] = field(default_factory=dict)
    of_data: set[fx.Node] = field(default_factory=set)
    from_whole: set[Value] = field(default_factory=set)

    def run(self) -> Separation:
        for name, node in self.graph.placeholders.items():
            if results(node):
                self.states[node, 0] = f"S{self.dims[name]}" if name in self.dims else "R"
            if name not in self.graph.parameters and name not in self.trainable:
                self.of_data.add(node)
        for node in self.graph.compute_nodes():
            if all(producer(n)[0] in self.of_data for n in operands(node) if n is not None):
                self.of_data.add(node)
            self._call(node)
        for x in self.graph.output.args[0]:  # type: ignore[union-attr]
            if isinstance(x, fx.Node):
                state = self.states[producer(x)]
                if outer_of(state) > 1:
                    raise NotSeparableError(
                        f"a result of shape {list(shape_of(x.meta['val']))} has samples in a dim "
                        "that is merged with one before it: return it before it is flattened, or "
                        "pass microbatch='independent' to treat each microbatch as a batch of its "
                        "own"
                    )
                self.need(producer(x), state)
        return Separation(self.graph, self.samples, self.states, self.steps, self.whole)

    def _call(self, node: fx.Node) -> None:
        have = [None if n is None else self.states[producer(n)] for n in operands(node)]
        if draws(node) and node in self.of_data:
            self._compute_from_whole(node)
            return
        if draws(node) and all(state in (None, "R") for state in have):
            raise NotSeparableError(self._refusal(node, "what all samples share, and draws for it"))
        if all(state in (None, "R") for state in have):
            self.define(node, Step(None, tuple(have)), ["R"] * len(results(node)))
            return
        found = self.best(node)
        if found is None or (node in self.of_data and "P" in found[1]):
            if node not in self.of_data:
                sums = "sums over the batch, of which it needs the total"
                mixed = sums if "P" in have else "samples, which it mixes"
                if not rule_of(node)[1]:
                    mixed = "samples, and has no rule of how it treats them"
                raise NotSeparableError(self._refusal(node, mixed))
            self._compute_from_whole(node)
            return
        self.define(node, *found)

    def _compute_from_whole(self, node: fx.Node) -> None:
        for k, _ in enumerate(results(node)):
            self.states[node, k] = "R"
            self.from_whole.add((node, k))

    def define(self, node: fx.Node, step: Step, outputs: list[State]) -> None:
        for k, output in enumerate(outputs):
            self.states[node, k] = output
            self.steps[node, output] = step
        for operand, state in zip(operands(node), step.inputs, strict=True):
            if operand is not None and state is not None:
                self.need(producer(operand), state)

    def best(self, node: fx.Node) -> tuple[Step, list[State]] | None:
        """The step that takes the operands as they are, or with the least that is made for it."""
        best: tuple[int, Step, list[State]] | None = None
        for step, outputs in self.ways(node):
            cost = 0
            for operand, state in zip(operands(node), step.inputs, strict=True):
                if operand is not None and state is not None:
                    value = producer(operand)
                    if self.states[value] != state:
                        if not self.can(value, state):
                            break
                        cost += 1
            else:
                if best is None or cost < best[0]:
                    best = cost, step, outputs
        return None if best is None else best[1:]

    def ways(self, node: fx.Node) -> Iterator[tuple[Step, list[State]]]:
        """How an operator may carry slices."""
        if _picks_of_each_sample(node):
            own = ["S0", "I", *["S0"] * len(operands(node)[2:])]
            yield Step(None, tuple(own)), ["S0"]
        if str(node.target) in RESHAPES:
            yield from self._reshaped(node)
            return
        inner = {s for n in operands(node) if n is not None
                 if "/" in (s := self.states.get(producer(n), ""))}  # fmt: skip
        rule, _ = rule_of(node)
        # over time, sums of integers are exact, too
        for strategy in strategies(rule, (self.samples,), any_order=False)[1:]:
            if not _keeps_sums(node, strategy):
                continue
            scaled = _scales(rule, strategy)
            if _communicates(rule, strategy) and not scaled:
                continue
            inputs = tuple(None if s is None else _of(s.state(0)) for s in strategy.inputs)
            outputs = [_of(s.state(0)) for s in strategy.outputs]
            if not inner:
                yield Step(strategy, inputs, scaled), outputs
            elif len(inner) == 1 and not scaled:
                # rows are independent of each other, whichever of them a slice has
                outer = outer_of(next(iter(inner)))
                takes = (None if s is None else with_outer(s, outer) for s in inputs)
                step = Step(strategy, tuple(takes), outer=outer)
                yield step, [with_outer(s, outer) for s in outputs]

    def _reshaped(self, node: fx.Node) -> Iterator[tuple[Step, list[State]]]:
        """A reshape keeps the order of elements: samples are the factor between those before and
        those behind them."""
        operand = operands(node)[0]
        assert operand is not None
        state = self.states[producer(operand)]
        if state == "P":
            yield Step(None, ("P",)), ["P"]
        elif state == "R":
            for dim in range(len(shape_of(results(node)[0]))):
                yield from self._made_in_slices(node, dim)
        else:
            source, target = shape_of(operand.meta["val"]), shape_of(results(node)[0])
            new = _moved(source, state, target, self.samples)
            if new is not None:
                yield Step(None, (state,)), [new]

    def _made_in_slices(self, node: fx.Node, dim: int) -> Iterator[tuple[Step, list[State]]]:
        """A reshape whose result is to be sliced, of an operand that can be."""
        operand = operands(node)[0]
        assert operand is not None
        source, target = shape_of(operand.meta["val"]), shape_of(results(node)[0])
        if target[dim] % self.samples == 0:
            before = _moved(target, f"S{dim}", source, self.samples)
            if before is not None:
                yield Step(None, (before,)), [f"S{dim}"]

    # -- values in another state than their own ---------------------------------------------------

    def can(self, value: Value, state: State) -> bool:
        """Whether a value that is the same for every slice can be had as slices, or as a sum."""
        node, result = value
        if self.states[value] != "R":
            return False
        if state == "P":  # each slice has its share of it
            return is_floating(results(node)[result])
        if state == "I":
            return _numbers_samples(node, self.samples)
        made = self._sliced_step(value, state) is not None
        return made or (node in self.of_data and outer_of(state) == 1)

    def _sliced_step(self, value: Value, state: State) -> Step | None:
        """How to make the slices of a value that is the same for every slice."""
        node, result = value
        if (node, state) in self.steps:
            return self.steps[node, state]
        if state == "I":
            return Step(None, ())
        if node.op == "placeholder" or value in self.from_whole:
            return None
        if node.target in _FILLS or _repeats(node, dim_of(state), self.samples):
            # of the operand of a fill, only the dtype counts
            have = (None if n is None else self.states[producer(n)] for n in operands(node))
            return Step(None, tuple(have))
        for step, outputs in self.ways(node):
            pairs = zip(operands(node), step.inputs, strict=True)
            if outputs[result] == state and all(
                operand is None
                or need is None
                or need == self.states[producer(operand)]
                or self.can(producer(operand), need)
                for operand, need in pairs
            ):
                return step
        return None

    def need(self, value: Value, state: State) -> None:
        """Note what makes a value in a state that is not its own."""
        if state == "P":  # a share of what it is by itself
            state = self.states[value]
        if value in self.from_whole:
            self.whole[value, state] = None
            return
        if self.states[value] == state:
            return
        step = self._sliced_step(value, state)
        if step is None:
            self.whole[value, state] = None
            return
        node, _ = value
        if (node, state) not in self.steps:
            self.steps[node, state] = step
            for operand, need in zip(operands(node), step.inputs, strict=True):
                if operand is not None and need is not None:
                    self.need(producer(operand), need)

    def _refusal(self, node: fx.Node, taken: str) -> str:
        info = self.graph.info(node)
        shapes = ", ".join(
            "-" if n is None else str(list(shape_of(n.meta["val"]))) for n in operands(node)
        )
        return (
            f"{node.target} at {info.source} (module {info.module or 'the model'}) takes "
            f"{taken}: on operands of shapes {shapes} it does not give the same for "
            f"the batch of {self.samples} in slices. Move it out of the model, or pass "
            "microbatch='independent' to treat each microbatch as a batch of its own"
            f"{self._other_remedy(node)}"
        )

    def _other_remedy(self, node: fx.Node) -> str:
        """Where an input without samples may have the size of the batch by chance."""
        inputs = [
            str(n.target)
            for n in (producer(x)[0] for x in operands(node) if x is not None)
            if str(n.target) in self.dims
        ]
        if not inputs:
            return ""
        return (
            f". If {' or '.join(inputs)} has no samples and the size of the batch by chance, pass "
            f"batch_dim={{{inputs[0]!r}: None}}"
        )


def _repeats(node: fx.Node, dim: int, samples: int) -> bool:
    """Whether a dim of the result is copies of the operand, one or more per sample."""
    if node.target is not torch.ops.aten.repeat.default:
        return False
    repeats: Any = node.args[1]
    return repeats[dim] % samples == 0


def _picks_of_each_sample(node: fx.Node) -> bool:
    """Whether it is `x[arange(len(x)), index, ...]`, for operands of one index per sample."""
    if node.target is not torch.ops.aten.index.Tensor:
        return False
    x, *indices = operands(node)
    if x is None or not indices or any(n is None for n in indices):
        return False
    samples = shape_of(x.meta["val"])[:1]
    same = all(n is not None and shape_of(n.meta["val"]) == samples for n in indices)
    return same and indices[0] is not None and _numbers_samples(indices[0], *samples)


def _numbers_samples(node: fx.Node, samples: int) -> bool:
    """Whether a value is 0, 1, ... for every sample."""
    arange = torch.ops.aten.arange
    if node.target is arange.default:
        return bool(node.args[0] == samples)
    return node.target in (arange.start, arange.start_step) and node.args[:3] in (
        (0, samples),
        (0, samples, 1),
    )


def _moved(
    source: Sequence[int], state: State, target: Sequence[int], samples: int
) -> State | None:
    """Where the samples of a tensor are after a reshape; None if no dim has them as a factor."""
    dim = dim_of(state)
    before = math.prod(source[:dim]) * outer_of(state)
    for at, size in enumerate(target):
        outer, rest = divmod(before, math.prod(target[:at]))
        if not rest and outer and size % (outer * samples) == 0 and size > 1:
            return f"S{at}" if outer == 1 else f"S{at}/{outer}"
    return None


def _keeps_sums(node: fx.Node, strategy: Strategy) -> bool:
    """Whether pending sums are what they are said to be: of numbers that are not rounded."""
    made = zip(results(node), strategy.outputs, strict=True)
    whole = [t for t, spec in made if spec.partial and not is_floating(t)]
    taken = [
        n.meta["val"]
        for n, spec in zip(operands(node), strategy.inputs, strict=True)
        if n is not None and spec is not None and spec.partial
    ]
    rounds = any(is_floating(t) or t.dtype is torch.bool for t in taken)
    return not whole or not (rounds or any(t.dtype is torch.bool for t in whole))


def _communicates(rule: OpRule, strategy: Strategy) -> bool:
    """Whether the split is one that the operator itself cannot carry out on a slice."""
    return strategy.lowered and any(rule.factors[name].lowered for name in strategy.splits)


def _scales(rule: OpRule, strategy: Strategy) -> bool:
    return _communicates(rule, strategy) and is_scaled(rule.lowering)


def _of(state: str) -> State:
    """A state on a mesh axis, over time: what differs in its gradients alone is the same value."""
    return "R" if state == "V" else state
