"""Candidates of decisions, with what each costs: layouts of parameters, inputs and shared values,
and strategies of operators. What is equal is made once, and known by an integer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch.fx as fx

from autopar.ir.graph import ModelGraph, operands, shape_of
from autopar.ir.repeats import has_index, pattern
from autopar.ir.spec import ShardingSpec, fills_every_rank
from autopar.planner.axis_groups import Groups
from autopar.planner.decisions import Candidate, Decision, FixedLayouts, Workload
from autopar.planner.op_costs import OpCosts
from autopar.sharding.node_rules import call_of, results, strategies_of
from autopar.sharding.rule import Strategy


class CandidateTable:
    """Candidates for the nodes of a graph.

    Args:
        grads: whether a value has a gradient.
        costs: of the graph's operators on a cluster.
        any_order, orders, groups: as of `SearchSpace`.

    Attributes:
        calls: the operators, as rules see them.
    """

    def __init__(
        self,
        graph: ModelGraph,
        workload: Workload,
        fixed: FixedLayouts,
        grads: Mapping[fx.Node, bool],
        costs: OpCosts,
        *,
        any_order: bool,
        orders: frozenset[tuple[int, ...]],
        groups: Groups,
    ) -> None:
        self.graph, self.workload, self.fixed = graph, workload, fixed
        self.grads, self.costs = grads, costs
        self.profile, self.saved = costs.profile, costs.saved
        self.any_order, self.orders, self.groups = any_order, orders, groups
        self.cluster, self.mesh = costs.cluster, costs.cluster.mesh
        self.calls = {n: call_of(n) for n in graph.nodes if n in costs.profile}
        self._classes: dict[Hashable, int] = {}
        self._class_of_call: dict[fx.Node, int] = {}
        self._strategies_of: dict[int, list[Strategy]] = {}
        self._operators: dict[Hashable, Decision] = {}
        self._parameters: dict[Hashable, Decision] = {}
        self._shared: dict[Hashable, tuple[int, tuple[Candidate, ...]]] = {}
        self._gradients: dict[Hashable, np.ndarray] = {}

    def class_of(self, *key: Hashable) -> int:
        """An integer for a key, equal for equal keys."""
        return self._classes.setdefault(key, len(self._classes))

    def _splits(self, shape: tuple[int, ...]) -> list[ShardingSpec]:
        """Every placement of a stored tensor: each axis splits one dim or none. The axes of a dim
        are in ascending order: DTensor's placements cannot express another."""
        specs = [ShardingSpec.replicated(len(shape))]
        for group in self.groups:
            specs += [
                ShardingSpec(tuple((*a, *group) if e == d else a for e, a in enumerate(s.dims)))
                for s in specs
                for d in range(len(shape))
            ]
        return [
            s
            for s in specs
            if all(fills_every_rank(n, a, self.mesh) for n, a in zip(shape, s.dims, strict=True))
            and self.fixed.allows(shape, s)
        ]

    def placeholder(self, node: fx.Node, input_names: Sequence[str]) -> Decision:
        """The decision on a parameter, an input or a buffer."""
        name = str(node.target)
        shape, itemsize = shape_of(node.meta["val"]), self.graph.storage_dtype(name).itemsize
        if name in self.graph.parameters:
            return self._parameter(node, shape, itemsize)
        if name in input_names:
            fixed = self.fixed.inputs
            spec = fixed[input_names.index(name)] if fixed is not None else None
            specs = self._splits(shape) if spec is None else [spec]
            kind = "input"
        else:
            specs, kind = [ShardingSpec.replicated(len(shape))], "buffer"
        donated = name in self.graph.donated
        candidates = tuple(
            # a donated one takes back a result in the layout that it is held in
            Candidate(str(s) or "scalar", (s,), (s,) if donated else ())
            for s in specs
        )
        nbytes = np.array([float(self.costs.local_bytes(shape, itemsize, s)) for s in specs])
        if kind == "input":
            nbytes *= self.workload.microbatches
        return Decision(
            kind, node, candidates, np.zeros(len(specs)), nbytes,
            self.class_of(kind, donated, *specs),
            self.class_of("cost", kind, shape, itemsize, *specs), {"buffers_bytes": nbytes},
        )  # fmt: skip

    def _parameter(self, node: fx.Node, shape: tuple[int, ...], itemsize: int) -> Decision:
        qualified = self.graph.parameters[str(node.target)]
        fixed = self.fixed.parameters.get(qualified)
        trains = node.target in self.workload.trainable
        key = shape, itemsize, node.meta["val"].element_size(), fixed, trains
        if key not in self._parameters:
            self._parameters[key] = self._new_parameter(node, *key)
        decision = self._parameters[key]
        repeats = None
        if has_index(qualified):
            repeats = ("parameter", pattern(qualified), shape, len(decision.candidates), trains)
        return replace(decision, node=node, repeats=repeats)

    def _new_parameter(
        self,
        node: fx.Node,
        shape: tuple[int, ...],
        itemsize: int,
        compute_itemsize: int,
        fixed: ShardingSpec | None,
        trains: bool,
    ) -> Decision:
        specs = [fixed] if fixed is not None else self._splits(shape)
        candidates = []
        for spec in specs:
            candidates.append(Candidate(str(spec) or "scalar", (spec,)))
            if not spec.is_replicated and not self.workload.forward:
                candidates.append(Candidate(f"{spec} reshard", (spec,), reshard_after_forward=True))
        nbytes = np.array(
            [float(self.costs.local_bytes(shape, itemsize, c.outputs[0])) for c in candidates]
        )
        parts = {
            "parameters_bytes": nbytes,
            "gradients_bytes": nbytes * trains,
            "optimizer_bytes": nbytes * trains * self.workload.state_bytes_per_param_byte,
        }
        memory = sum(parts.values(), np.zeros(len(nbytes)))
        step = self.costs.step_us(nbytes * trains, self.workload.state_bytes_per_param_byte)
        parts |= {
            "step_us": step * trains,
            "step_bytes": nbytes * trains * self.costs.step_copies(self.workload),
        }
        if itemsize != compute_itemsize:
            parts["compute_us"] = self.costs.cast_us(nbytes, compute_itemsize / itemsize, trains)
        return Decision(
            "parameter", node, tuple(candidates), parts["step_us"] + parts.get("compute_us", 0.0),
            memory, self.class_of("parameter", *specs),
            self.class_of("cost", "parameter", shape, itemsize, compute_itemsize, fixed, trains),
            parts,
        )  # fmt: skip

    def operator(self, node: fx.Node, place: Any) -> Decision:
        """The decision on an operator.

        Args:
            place: of `ir.repeats.places`: equal for copies in repeated blocks.
        """
        repeats = None
        if place is not None:
            call = self.calls[node]
            count = len(self.strategies(node))
            repeats = (
                "op", place, str(call.op), call.inputs, call.outputs, count, self.saved.key(node),
            )  # fmt: skip
        summed = self._summed(node)
        number = self.class_of(
            "op", self._call_class(node), self.profile[node], self.saved.counted(node), summed
        )
        if number in self._operators:
            return replace(self._operators[number], node=node, repeats=repeats)
        strategies = self.strategies(node)
        candidates = tuple(Candidate(s.name, s.outputs, s.inputs, s) for s in strategies)
        forward, backward = self.costs.compute_us(node, strategies)
        parts = {
            "compute_us": forward + backward,
            "forward_us": forward,
            "backward_us": backward,
            "communication_us": self.costs.lowering_us(node, strategies, forward + backward),
            "activations_bytes": self.costs.saved_bytes(node, strategies),
            "working": self.costs.working_bytes(node, strategies),
        }
        if summed:
            parts["accumulation_us"] = self._accumulation_us(node, summed, strategies)
        if len(results(node)) == 1 and self.grads[node]:
            parts["gradient"] = self.gradient_bytes(node, 0, number, candidates)
        if self.workload.forward:
            parts["value"] = self.costs.result_bytes(node, strategies)
        time, saved = parts["compute_us"] + parts["communication_us"], parts["activations_bytes"]
        time = time + parts.get("accumulation_us", 0.0)
        self._operators[number] = decision = Decision(
            "op", node, candidates, time, saved, number, number, parts, repeats=repeats
        )
        return decision

    def is_parameter(self, node: fx.Node) -> bool:
        return node.op == "placeholder" and node.target in self.graph.parameters

    def _summed(self, node: fx.Node) -> tuple[int, ...]:
        """The operands that are weights whose gradients are summed over microbatches; of views of a
        weight, whoever reads them."""
        if self.workload.microbatches == 1 or self.is_parameter(self.saved.root(node)):
            return ()
        return tuple(
            i
            for i, n in enumerate(operands(node))
            if n is not None and self.grads[n] and self.is_parameter(self.saved.root(n))
        )

    def _accumulation_us(
        self, node: fx.Node, summed: Sequence[int], strategies: Sequence[Strategy]
    ) -> np.ndarray:
        """Per strategy, what these sums take."""
        us = np.zeros(len(strategies))
        for i, n in enumerate(operands(node)):
            if n is None or i not in summed:
                continue
            shape, itemsize = shape_of(n.meta["val"]), n.meta["val"].element_size()
            for k, strategy in enumerate(strategies):
                if (spec := strategy.inputs[i]) is not None:
                    us[k] += self.costs.accumulation_us(shape, itemsize, spec)
        return us

    def _call_class(self, node: fx.Node) -> int:
        """Equal for calls that have the same strategies."""
        if node not in self._class_of_call:
            call = self.calls[node]
            values = [*results(node), *(n.meta["val"] if n else None for n in operands(node))]
            types = [None if v is None else str(v.dtype) for v in values]
            self._class_of_call[node] = self.class_of(
                "call", call.op, repr(call.arguments), call.inputs, call.outputs, call.masks,
                call.strides, *types,
            )  # fmt: skip
        return self._class_of_call[node]

    def strategies(self, node: fx.Node) -> list[Strategy]:
        """Those of an operator that the space offers."""
        number = self._call_class(node)
        if number not in self._strategies_of:
            self._strategies_of[number] = [
                strategy
                for strategy in strategies_of(
                    node,
                    self.mesh,
                    any_order=self.any_order or bool(self.orders),
                    beside=self.cluster.device.runs_beside,
                    alike=self.groups,
                )
                if self._is_offered(strategy) and self.fixed.allows_strategy(node, strategy)
            ]
        return self._strategies_of[number]

    def _is_offered(self, strategy: Strategy) -> bool:
        """Whether the order of axes in each dim is one that the space has."""
        return self.any_order or all(
            list(axes) == sorted(axes) or axes in self.orders for axes in strategy.splits.values()
        )

    def gradient_bytes(
        self, node: fx.Node, result: int, number: int, candidates: Sequence[Candidate]
    ) -> np.ndarray:
        """Per candidate, of the class `number`, the bytes of the gradient of a value."""
        fake = results(node)[result]
        shape, itemsize = shape_of(fake), fake.element_size()
        index = result if len(candidates[0].outputs) > 1 else 0
        key = shape, itemsize, index, number
        if key not in self._gradients:
            local = [self.costs.local_bytes(shape, itemsize, c.outputs[index]) for c in candidates]
            self._gradients[key] = np.array(local, dtype=float)
        return self._gradients[key]

    def shared(
        self, decision: Decision, result: int, users: Sequence[tuple[fx.Node, int]], grad: bool
    ) -> tuple[int, tuple[Candidate, ...]]:
        """Every layout that the value is made in or that a user takes, and a class for them."""
        calls = [(user, operand) for user, operand in users if user.op != "output"]
        key = (
            decision.candidates_class, result, grad,
            *((self._call_class(user), operand) for user, operand in calls),
        )  # fmt: skip
        if key not in self._shared:
            specs = dict.fromkeys(c.outputs[result] for c in decision.candidates)
            for user, operand in calls:
                for strategy in self.strategies(user):
                    spec = strategy.inputs[operand]
                    assert spec is not None
                    specs.setdefault(spec)
            if not grad:
                specs = dict.fromkeys(s.data() for s in specs)
            candidates = tuple(Candidate(str(s) or "scalar", (s,), (s,)) for s in specs)
            self._shared[key] = self.class_of("shared", *specs), candidates
        return self._shared[key]
