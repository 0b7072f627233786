"""The pass that turns a plan into each rank's program: local shapes, explicit conversions.

The result is an ordinary PyTorch graph. Every conversion is a differentiable step from
`autopar.comm.steps`; autograd of the graph is the distributed backward.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from autopar.cluster.cluster import ClusterInfo
from autopar.comm.steps import STEPS, SUMMED
from autopar.errors import PlanError
from autopar.ir.deferred_results import deferred_results
from autopar.ir.graph import (
    ModelGraph,
    bound_arguments,
    map_operands,
    operands,
    producer,
    shape_of,
)
from autopar.ir.spec import ShardingSpec, local_range, local_shape
from autopar.plan import ShardingPlan
from autopar.profiler.profile import requires_grad_map
from autopar.sharding.conversion.converter import LayoutConverter, Step, converter_for
from autopar.sharding.node_rules import call_of, is_floating, results, rule_of, strategy_by_name
from autopar.sharding.rule import OpRule, Strategy
from autopar.sharding.rules.view import RESHAPES


def step_call(
    step: Step, shape: Sequence[int], mesh: Sequence[int], coords: Sequence[int], group: str
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function of a conversion step on one rank, and its arguments after the value."""

    def gathered_extent() -> int:
        return local_range(shape[step.dim], step.target.dims[step.dim], mesh, coords)[1]

    rest: tuple[int, ...] = ()
    if step.kind in ("all_gather", "all_gather_vary"):
        rest = (step.dim, gathered_extent())
    elif step.kind in ("slice", "reduce_scatter"):
        rest = (step.dim,)
    elif step.kind == "all_to_all":
        rest = (step.dim, gathered_extent(), step.to_dim)
    return STEPS[step.kind], (*rest, group)


@dataclass(frozen=True)
class LocalProgram:
    """The program of one rank.

    Args:
        gm: takes parameters, buffers and inputs (local, in the model graph's order) and, if
            `takes_seed`, an int64 scalar; returns mutated buffers and results.
        input_specs: layout in which each tensor input enters.
        takes_seed: random ops draw from a seed that is the last argument.
        deferred: layouts of the results that the caller gathers when it reads them, by position
            among all that the program returns.
        result_specs: layouts of all that are tensors, by position.
    """

    gm: fx.GraphModule
    input_specs: tuple[ShardingSpec, ...]
    takes_seed: bool
    deferred: Mapping[int, ShardingSpec] = field(default_factory=dict)
    result_specs: Mapping[int, ShardingSpec] = field(default_factory=dict)


@dataclass
class _Rank:
    """Where this program runs."""

    mesh: tuple[int, ...]
    coords: tuple[int, ...]
    groups: Sequence[str]
    converter: LayoutConverter


def apply_sharding(
    graph: ModelGraph,
    plan: ShardingPlan,
    *,
    coords: Sequence[int],
    groups: Sequence[str],
    input_specs: Sequence[ShardingSpec] | None = None,
    output_specs: Sequence[ShardingSpec] | None = None,
    trainable: frozenset[str] | None = None,
    whole_sizes: frozenset[int] = frozenset(),
) -> LocalProgram:
    """The program of the rank at `coords`.

    Args:
        groups: names of this rank's communicators, one per mesh axis.
        input_specs: layouts in which the caller holds the inputs; as the plan splits them if None.
        output_specs: layouts in which the caller wants the results; if None, replicated or
            deferred.
        trainable: placeholder names that carry gradients; all parameters if None.
        whole_sizes: dims of these sizes stay whole in conversions, too.

    Raises:
        PlanError: the plan names an operator or a strategy that the graph does not have.
    """
    converter = converter_for(ClusterInfo.from_dict(plan.cluster), whole_sizes=whole_sizes)
    rank = _Rank(plan.mesh, tuple(coords), groups, converter)
    grads = requires_grad_map(graph, set(graph.parameters) if trainable is None else set(trainable))
    return _Rewriter(graph, plan, rank, grads).run(input_specs, output_specs)


@dataclass
class _Rewriter:
    graph: ModelGraph
    plan: ShardingPlan
    rank: _Rank
    grads: Mapping[fx.Node, bool]
    out: fx.Graph = field(default_factory=fx.Graph)
    # (node, result) -> layout of its value, and the value in every layout it was converted to
    layout: dict[tuple[fx.Node, int], ShardingSpec] = field(default_factory=dict)
    values: dict[tuple[fx.Node, int, ShardingSpec], fx.Node] = field(default_factory=dict)
    seed: fx.Node | None = None
    streams: int = 0  # of random operators, numbered
    number: int = -1  # of the operator that is written

    def run(
        self,
        input_specs: Sequence[ShardingSpec] | None,
        output_specs: Sequence[ShardingSpec] | None,
    ) -> LocalProgram:
        # not the flags among the inputs, which are specialized
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder" and results(n)]
        tensor_inputs = [n for n in self.graph.inputs if n is not None]
        held = dict(zip(tensor_inputs, input_specs, strict=True)) if input_specs else {}
        for node in placeholders:
            argument = self.out.placeholder(node.name)
            spec = held.get(str(node.target)) or self._placeholder_spec(node)
            value = self._cast(node, argument)
            self._define(node, 0, spec, value)
            argument.meta["local_shape"] = value.meta["local_shape"]
        # the seed comes last, whether or not some op turns out to draw from it
        self.seed = self.out.placeholder("autopar_seed")
        for node in placeholders:
            self._share(node, 0)
        for number, node in enumerate(self.graph.compute_nodes()):
            self.number = number
            self._call(node)
        deferred, given = self._outputs(output_specs)
        takes_seed = bool(self.seed.users)
        if not takes_seed:
            self.out.erase_node(self.seed)
        gm = fx.GraphModule(torch.nn.Module(), self.out, "LocalProgram")
        specs = tuple(
            held.get(name) or self._placeholder_spec(self.graph.placeholders[name])
            for name in tensor_inputs
        )
        return LocalProgram(gm, specs, takes_seed, deferred, given)

    def _cast(self, node: fx.Node, argument: fx.Node) -> fx.Node:
        """An argument in the dtype of the program, cast before anything is gathered."""
        dtype = node.meta["val"].dtype
        if self.graph.storage_dtype(str(node.target)) == dtype:
            return argument
        cast = self.out.call_function(
            torch.ops.aten._to_copy.default, (argument,), {"dtype": dtype}
        )
        cast.meta["autopar"] = node.meta["autopar"]
        return cast

    # -- plan look-ups --------------------------------------------------------------------------

    def _choice(self, decision: str) -> str:
        try:
            return self.plan.choices[decision]
        except KeyError:
            raise PlanError(
                f"the plan decides nothing for {decision}; plan this model again"
            ) from None

    def _placeholder_spec(self, node: fx.Node) -> ShardingSpec:
        text = self._choice(node.name).removesuffix(" reshard")
        return ShardingSpec(()) if text == "scalar" else ShardingSpec.parse(text)

    def _strategy(self, node: fx.Node) -> Strategy:
        try:
            return strategy_by_name(node, self.rank.mesh, self._choice(node.name))
        except ValueError as error:
            raise PlanError(f"{node.name} ({node.target}): {error}") from error

    # -- values ---------------------------------------------------------------------------------

    def _define(self, node: fx.Node, result: int, spec: ShardingSpec, value: fx.Node) -> None:
        self._describe(value, node, result, spec)
        self.layout[node, result] = spec
        self.values[node, result, spec] = value

    def _describe(self, value: fx.Node, node: fx.Node, result: int, spec: ShardingSpec) -> None:
        """Note what the node of a value holds: its layout, its shape on this rank, the global
        tensor, whether it carries a gradient, and by which operator it is needed first."""
        fake = results(node)[result]
        value.meta |= {
            "spec": spec,
            "local_shape": local_shape(shape_of(fake), spec, self.rank.mesh, self.rank.coords),
            "global": fake,
            "differentiable": self.grads[node] and is_floating(fake),
            "number": self.number,
        }

    def _share(self, node: fx.Node, result: int) -> None:
        """Convert a value with several users once, to the layout they share."""
        text = self.plan.choices.get(f"{node.name}#{result}")
        if text is not None:
            spec = ShardingSpec(()) if text == "scalar" else ShardingSpec.parse(text)
            self._converted(node, result, spec)
            self.layout[node, result] = spec

    def _value(self, operand: fx.Node, spec: ShardingSpec) -> fx.Node:
        node, result = producer(operand)
        return self._converted(node, result, spec)

    def _converted(self, node: fx.Node, result: int, target: ShardingSpec) -> fx.Node:
        grad = self.grads[node]
        source = self.layout[node, result]
        if not grad:  # without a gradient, V and R are the same thing
            source, target = source.data(), target.data()
        key = (node, result, target)
        if key in self.values:
            return self.values[key]
        fake = results(node)[result]
        shape, itemsize = shape_of(fake), fake.element_size()
        value = self.values[node, result, source]
        sums = self.graph.sum_dtype(node, result)
        try:
            path = self.rank.converter.path(
                shape, itemsize, source, target, grad=grad, grad_itemsize=sums.itemsize
            )
        except ValueError as error:
            raise PlanError(f"{node.name}: {error}") from error
        for step in path:
            known = self.values.get((node, result, step.target))
            if known is not None:
                value = known
                continue
            function, rest = step_call(
                step, shape, self.rank.mesh, self.rank.coords, self.rank.groups[step.axis]
            )
            # gradients of parameters are summed so by a pass, which rounds no sum
            rounded = step.kind in SUMMED and node.op != "placeholder" and sums != fake.dtype
            value = self.out.call_function(
                function, (value, *rest), {"sum_dtype": sums} if rounded else {}
            )
            self._describe(value, node, result, step.target)
            value.meta["autopar"] = node.meta["autopar"]
            self.values[node, result, step.target] = value
        return value

    # -- operators ------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> None:
        strategy = self._strategy(node)
        rule, _ = rule_of(node)
        values = [
            None if operand is None or spec is None else self._value(operand, spec)
            for operand, spec in zip(operands(node), strategy.inputs, strict=True)
        ]
        if node.target is torch.ops.aten.as_strided.default:
            values[0] = self._laid_out(operands(node)[0], values[0])
        args, kwargs = map_operands(node, values)
        target: Any = node.target
        if strategy.lowered:
            target = rule.lowering
            kwargs = {**kwargs, **self._lowering_arguments(node, rule, strategy)}
        elif str(target) in RESHAPES:
            # a shard's strides may differ from the global tensor's: let the view copy if it must
            shape = local_shape(
                shape_of(results(node)[0]), strategy.outputs[0], self.rank.mesh, self.rank.coords
            )
            target, args, kwargs = torch.ops.aten.reshape.default, (values[0], list(shape)), {}
        else:
            args, kwargs = self._localize_sizes(node, strategy, args, kwargs)
        new = self.out.call_function(target, args, kwargs)
        new.meta |= {"autopar": node.meta["autopar"], "number": self.number}
        outs = results(node)
        if isinstance(node.meta["val"], torch.Tensor):
            self._define(node, 0, strategy.outputs[0], new)
        else:
            used = {producer(u)[1] for u in node.users if u.target is operator.getitem}
            for result in sorted(used):
                item = self.out.call_function(operator.getitem, (new, result))
                item.meta["autopar"] = node.meta["autopar"]
                self._define(node, result, strategy.outputs[result], item)
        for result in range(len(outs)):
            if (node, result) in self.layout:
                self._share(node, result)

    def _laid_out(self, operand: fx.Node | None, value: fx.Node | None) -> fx.Node | None:
        """The value with the strides it was captured with: conversions make their own."""
        assert operand is not None
        strides = operand.meta["val"].stride()
        order = sorted(range(len(strides)), key=lambda d: -strides[d])
        ordered = self.out.call_function(torch.ops.aten.permute.default, (value, order))
        dense = self.out.call_function(torch.ops.aten.contiguous.default, (ordered,))
        back = [order.index(d) for d in range(len(order))]
        return self.out.call_function(torch.ops.aten.permute.default, (dense, back))

    def _localize_sizes(
        self, node: fx.Node, strategy: Strategy, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Ops that are told their result's shape are told the local one."""
        assert isinstance(node.target, torch._ops.OpOverload)
        names = [a.name for a in node.target._schema.arguments]
        at = next((i for i, n in enumerate(names) if n in ("size", "shape")), None)
        if at is None or not operands(node) or not strategy.splits:
            return args, kwargs
        shape = local_shape(
            shape_of(results(node)[0]), strategy.outputs[0], self.rank.mesh, self.rank.coords
        )
        if names[at] in kwargs:
            return args, {**kwargs, names[at]: list(shape)}
        target = bound_arguments(node).get(names[at])
        if not isinstance(target, list | tuple) or at >= len(args):
            return args, kwargs
        return (*args[:at], list(shape), *args[at + 1 :]), kwargs

    def _lowering_arguments(
        self, node: fx.Node, rule: OpRule, strategy: Strategy
    ) -> dict[str, Any]:
        mesh, coords, groups = self.rank.mesh, self.rank.coords, self.rank.groups
        shard = {}
        for name, axes in strategy.splits.items():
            size = rule.factors[name].size
            start, length = local_range(size, axes, mesh, coords)
            # tuples and numbers only: a graph's arguments print as Python
            shard[name] = (start, length, size, tuple(groups[a] for a in axes))
        arguments: dict[str, Any] = {"shard": shard}
        assert rule.lowering is not None
        if "shapes" in inspect.signature(rule.lowering).parameters:
            arguments["shapes"] = call_of(node).inputs
        if rule.always:
            number = 0
            for axes in strategy.splits.values():
                for axis in axes:
                    number = number * mesh[axis] + coords[axis]
            assert self.seed is not None
            arguments |= {"seed": self.seed, "stream": (self.streams, number)}
            self.streams += 1
        return arguments

    def _outputs(
        self, output_specs: Sequence[ShardingSpec] | None
    ) -> tuple[dict[int, ShardingSpec], dict[int, ShardingSpec]]:
        """Return the results; the layouts of deferred ones, and of all."""
        flat: list[Any] = []
        buffers = len(self.graph.mutations)
        donated = {position: name for name, position in self.graph.donated.items()}
        waiting = deferred_results(self.graph) if output_specs is None else frozenset()
        deferred: dict[int, ShardingSpec] = {}
        given: dict[int, ShardingSpec] = {}
        remaining = iter(output_specs or ())  # of tensors alone
        numbers = {node: number for number, node in enumerate(self.graph.compute_nodes())}
        for i, value in enumerate(self.graph.output.args[0]):  # type: ignore[arg-type]
            if not isinstance(value, fx.Node):
                flat.append(value)
                continue
            spec = ShardingSpec.replicated(value.meta["val"].ndim)
            if i in donated:
                spec = self._placeholder_spec(self.graph.placeholders[donated[i]])
            elif output_specs is not None and i >= buffers:
                spec = next(remaining)
            elif i in waiting:
                spec = deferred[i] = self._most_split(*producer(value))
            given[i] = spec
            self.number = numbers.get(producer(value)[0], -1)  # a stage converts its results
            flat.append(self._value(value, spec))
        self.out.output(tuple(flat))
        return deferred, given

    def _most_split(self, node: fx.Node, result: int) -> ShardingSpec:
        """Of the layouts that a value is in, without sums that are due, the most split one."""
        complete = [
            spec
            for n, k, spec in self.values
            if (n, k) == (node, result) and not spec.partial and not spec.varying
        ]
        complete = complete or [ShardingSpec(self.layout[node, result].dims)]
        return max(complete, key=lambda spec: sum(map(len, spec.dims)))
