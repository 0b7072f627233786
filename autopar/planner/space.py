"""The search space of a graph: a decision each, with its candidates and their costs.

Sites are the parameters (where they are stored), the inputs (how they are split), every operator
call (its strategy), every value with several users (the layout they share: converted to once, with
one gradient reduction), and the outputs. A plan is one candidate per decision; the solver's `Problem`
and random plans are both read off the space.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch.fx as fx

from autopar.cluster.cluster import ClusterInfo
from autopar.comm.cost import BUCKET_MEMBER_BYTES
from autopar.ir.graph import ModelGraph, operands, producer, shape_of
from autopar.ir.repeats import has_index, pattern, places
from autopar.ir.spec import ShardingSpec, fills_every_rank
from autopar.planner.decisions import Candidate, Decision, Edge, FixedLayouts, Workload
from autopar.planner.edge_costs import EdgeCosts, EdgeCostTable
from autopar.planner.op_costs import OpCosts
from autopar.planner.saved_values import SavedValues
from autopar.profiler.profile import profile_graph, requires_grad_map
from autopar.sharding.conversion.converter import converter_for
from autopar.sharding.node_rules import call_of, results, rule_of, strategies_of
from autopar.sharding.rule import Strategy
from autopar.sharding.rules import describe_missing
from autopar.solver import PairCost, Problem

log = logging.getLogger(__name__)


class SearchSpace:
    """All legal plans of a graph on a cluster.

    Args:
        any_order: offer dims that several axes split in every order of the axes, not the ascending
            one alone. Operators cost the same in every order and parameters are stored in one, so
            that little can be won; on three axes planning takes several times as long.
    """

    def __init__(
        self,
        graph: ModelGraph,
        cluster: ClusterInfo,
        workload: Workload,
        fixed: FixedLayouts | None = None,
        *,
        any_order: bool = False,
    ) -> None:
        self.any_order = any_order
        self.graph, self.cluster, self.workload = graph, cluster, workload
        self.fixed = fixed or FixedLayouts()
        self.mesh = cluster.mesh
        self.profile = profile_graph(graph, set(workload.trainable))
        self.grads = requires_grad_map(graph, set(workload.trainable))
        # what is alike is made once, and its costs are known by its identity
        self._known_strategies: dict[int, list[Strategy]] = {}
        self._known_operators: dict[Hashable, Decision] = {}
        self._known_parameters: dict[Hashable, Decision] = {}
        self._known_fans: dict[Hashable, tuple[Candidate, ...]] = {}
        self._known_candidates: dict[Hashable, tuple[Candidate, ...]] = {}
        self._known_gradients: dict[Hashable, np.ndarray] = {}
        self._kinds: dict[Hashable, int] = {}
        self._kind_of: dict[fx.Node, int] = {}
        self.unruled = [n for n in graph.compute_nodes() if not rule_of(n)[1]]
        for node in self.unruled:
            log.info("%s", describe_missing(call_of(node), graph.info(node).source))
        self._saved = SavedValues(graph, self.profile)
        self._costs = OpCosts(cluster, self.profile, self._saved)
        weights = [int(graph.placeholders[p].meta["val"].nbytes) for p in graph.parameters]
        small = sum(n for n in weights if n <= BUCKET_MEMBER_BYTES)
        self._prices = EdgeCostTable(converter_for(cluster, small), self._costs)
        self.decisions: list[Decision] = []
        self.edges: list[Edge] = []
        self._decision_of: dict[tuple[fx.Node, int], int] = {}
        self._build()

    # -- public ---------------------------------------------------------------------------------

    @property
    def weights_hide(self) -> bool:
        """Whether conversions of weights run beside compute."""
        return self.cluster.device.runs_beside

    def problem(self) -> tuple[Problem, list[int]]:
        """The SPMD problem without rows (`liveness.Liveness` makes them) and, per decision, the class of
        the copies it shares its choice with. Weights that hide are not in its times."""
        problem = Problem(
            tuple(s.time_us for s in self.decisions),
            tuple(PairCost(k.source, k.target, self._exposed_us(k)) for k in self.edges),
            (),
            tuple(s.name for s in self.decisions),
        )
        keys: dict[Any, int] = {}
        classes = [
            keys.setdefault(s.repeats if s.repeats is not None else ("decision", i), len(keys))
            for i, s in enumerate(self.decisions)
        ]
        return problem, classes

    def _exposed_us(self, edge: Edge) -> np.ndarray:
        costs = self.edge_costs(edge)
        return costs.hidden_us if edge.weight and self.weights_hide else costs.time_us

    def cost_edges(self) -> None:
        """Compute all conversion costs now (they are memoized)."""
        for edge in self.edges:
            self.edge_costs(edge)

    def edge_costs(self, edge: Edge) -> EdgeCosts:
        """What the conversions on a edge cost, for every pair of candidates."""
        return self._prices.of(edge, self.decisions[edge.source], self.decisions[edge.target])

    def conversion_costs(self, edge: Edge, choices: Sequence[int]) -> tuple[float, float]:
        """Time and memory of the conversion on a edge under a full choice."""
        costs = self.edge_costs(edge)
        pair = choices[edge.source], choices[edge.target]
        memory = costs.memory_bytes
        return float(costs.time_us[pair]), 0.0 if memory is None else float(memory[pair])

    def random_choices(self, rng: np.random.Generator) -> tuple[int, ...]:
        """A uniformly drawn candidate per decision, redrawn where no conversion exists."""
        costs = [(edge, self.edge_costs(edge).time_us) for edge in self.edges]
        touching: dict[int, list[tuple[Edge, np.ndarray]]] = defaultdict(list)
        for edge, cost in costs:
            touching[edge.source].append((edge, cost))
            touching[edge.target].append((edge, cost))
        choices = [int(rng.integers(len(s.candidates))) for s in self.decisions]
        order = sorted(range(len(self.decisions)), key=lambda i: self.decisions[i].kind == "fan")
        for i in order:
            allowed = np.ones(len(self.decisions[i].candidates), dtype=bool)
            if self.decisions[i].kind == "fan":
                for edge, cost in touching[i]:
                    line = (
                        cost[:, choices[edge.target]]
                        if edge.source == i
                        else cost[choices[edge.source], :]
                    )
                    allowed &= np.isfinite(line)
                choices[i] = int(rng.choice(np.flatnonzero(allowed)))
        return tuple(choices)

    # -- construction ---------------------------------------------------------------------------

    def _splits(self, shape: tuple[int, ...]) -> list[ShardingSpec]:
        """Every placement of a stored tensor: each axis splits one dim or none.

        Axes of one dim in ascending order only: DTensor's placements cannot say another.
        """
        found = [ShardingSpec.replicated(len(shape))]
        for axis, size in enumerate(self.mesh):
            if size == 1:
                continue
            found += [
                ShardingSpec(tuple((*a, axis) if e == d else a for e, a in enumerate(s.dims)))
                for s in found
                for d in range(len(shape))
            ]
        return [
            s
            for s in found
            if all(fills_every_rank(n, a, self.mesh) for n, a in zip(shape, s.dims, strict=True))
        ]

    def _add(self, decision: Decision, *values: int) -> int:
        self.decisions.append(decision)
        for result in values:
            self._decision_of[decision.node, result] = len(self.decisions) - 1
        return len(self.decisions) - 1

    def _build(self) -> None:
        input_names = [name for name in self.graph.inputs if name is not None]
        calls = [n for n in self.graph.nodes if n in self.profile]
        self._calls = {n: call_of(n) for n in calls}
        signatures = [(str(c.op), c.inputs, c.outputs) for c in self._calls.values()]
        modules = [self.graph.info(n).module for n in calls]
        place = dict(zip(calls, places(zip(modules, signatures, strict=True)), strict=True))
        users = _user_edges(self.graph)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                if not results(node):  # a flag, specialized
                    continue
                self._add(self._placeholder(node, input_names), 0)
            elif node in self.profile:
                decision = self._operator(node, place[node])
                index = self._add(decision, *range(len(results(node))))
                for i, operand in enumerate(operands(node)):
                    if operand is not None:
                        self._connect(operand, index, i)
            else:
                continue
            for result in range(len(results(node))):
                if len(users[node, result]) > 1:
                    self._add_fan(node, result, users[node, result])
        self._outputs()

    def _connect(self, value: fx.Node, target: int, operand: int) -> None:
        node, result = producer(value)
        source = self._decision_of[node, result]
        fake = value.meta["val"]
        root = self._saved.root(value)
        parameter = root.op == "placeholder" and root.target in self.graph.parameters
        is_op = self.decisions[target].kind == "op"
        converts_for_saver = is_op and self._saved.needs(self.decisions[target].node, operand)
        fan = self.decisions[source].kind == "fan"
        self.edges.append(
            Edge(
                source,
                target,
                0 if fan else result,
                operand,
                shape_of(fake),
                fake.element_size(),
                self.grads[value],
                parameter,
                saved=self._saved.any(root) if parameter else converts_for_saver,
            )
        )

    def _placeholder(self, node: fx.Node, input_names: Sequence[str]) -> Decision:
        name = str(node.target)
        fake = node.meta["val"]
        shape, itemsize = shape_of(fake), fake.element_size()
        whole = ShardingSpec.replicated(len(shape))
        if name in self.graph.parameters:
            return self._parameter(node, shape, itemsize)
        if name in input_names:
            fixed = self.fixed.inputs
            spec = fixed[input_names.index(name)] if fixed is not None else None
            specs = self._splits(shape) if spec is None else [spec]
            kind = "input"
        else:
            specs, kind = [whole], "buffer"
        candidates = tuple(Candidate(str(s) or "scalar", (s,)) for s in specs)
        held = np.array([float(self._costs.local_bytes(shape, itemsize, s)) for s in specs])
        return Decision(kind, node, candidates, np.zeros(len(specs)), held, {"buffers_bytes": held})

    def _parameter(self, node: fx.Node, shape: tuple[int, ...], itemsize: int) -> Decision:
        qualified = self.graph.parameters[str(node.target)]
        fixed = self.fixed.parameters.get(qualified)
        trains = node.target in self.workload.trainable
        key = shape, itemsize, fixed, trains
        if key not in self._known_parameters:
            self._known_parameters[key] = self._parameter_alike(node, *key)
        decision = self._known_parameters[key]
        repeats = None
        if has_index(qualified):
            repeats = ("parameter", pattern(qualified), shape, len(decision.candidates), trains)
        return replace(decision, node=node, repeats=repeats)

    def _parameter_alike(
        self,
        node: fx.Node,
        shape: tuple[int, ...],
        itemsize: int,
        fixed: ShardingSpec | None,
        trains: bool,
    ) -> Decision:
        specs = [fixed] if fixed is not None else self._splits(shape)
        every = []
        for spec in specs:
            every.append(Candidate(str(spec) or "scalar", (spec,)))
            if not spec.is_replicated:
                every.append(Candidate(f"{spec} reshard", (spec,), reshard_after_forward=True))
        candidates = self._known_candidates.setdefault(("parameter", *specs), tuple(every))
        held = np.array(
            [float(self._costs.local_bytes(shape, itemsize, c.outputs[0])) for c in candidates]
        )
        parts = {
            "parameters_bytes": held,
            "gradients_bytes": held * trains,
            "optimizer_bytes": held * trains * self.workload.state_bytes_per_param_byte,
        }
        kept = sum(parts.values(), np.zeros(len(held)))
        step = self._costs.step_us(held * trains, self.workload.state_bytes_per_param_byte)
        parts |= {
            "step_us": step * trains,
            "step_bytes": held * trains * self._costs.step_copies(self.workload),
        }
        return Decision("parameter", node, candidates, parts["step_us"], kept, parts)

    def _operator(self, node: fx.Node, place: Any) -> Decision:
        repeats = None
        if place is not None:
            call = self._calls[node]
            count = len(self._strategies(node))
            repeats = (
                "op", place, str(call.op), call.inputs, call.outputs, count, self._saved.key(node),
            )  # fmt: skip
        key = (self._alike(node), id(self.profile[node]), self._saved.counted(node))
        if key in self._known_operators:
            return replace(self._known_operators[key], node=node, repeats=repeats)
        found = self._strategies(node)
        candidates = tuple(Candidate(s.name, s.outputs, s.inputs, s) for s in found)
        forward, backward = self._costs.compute_us(node, found)
        communicate = self._costs.lowering_us(node, found)
        saved = self._costs.saved_bytes(node, found)
        working = self._costs.working_bytes(node, found)
        parts = {
            "compute_us": forward + backward,
            "forward_us": forward,
            "backward_us": backward,
            "communication_us": communicate,
            "activations_bytes": saved,
            "working": working,
        }
        if len(results(node)) == 1 and self.grads[node]:
            parts["gradient"] = self._gradient_bytes(node, 0, candidates)
        time = parts["compute_us"] + communicate
        decision = Decision("op", node, candidates, time, saved, parts, repeats=repeats)
        self._known_operators[key] = decision
        return decision

    def _alike(self, node: fx.Node) -> int:
        """Equal for calls that have the same strategies at the same costs."""
        if node not in self._kind_of:
            self._kind_of[node] = self._kinds.setdefault(self._described(node), len(self._kinds))
        return self._kind_of[node]

    def _described(self, node: fx.Node) -> Hashable:
        call = self._calls[node]
        kinds = tuple(str(t.dtype) for t in results(node))
        given = tuple(None if n is None else str(n.meta["val"].dtype) for n in operands(node))
        return (
            call.op, repr(call.arguments), call.inputs, call.outputs, call.masks, call.strides,
            kinds, given,
        )  # fmt: skip

    def _strategies(self, node: fx.Node) -> list[Strategy]:
        key = self._alike(node)
        if key not in self._known_strategies:
            found = strategies_of(node, self.mesh, any_order=self.any_order)
            self._known_strategies[key] = found
        return self._known_strategies[key]

    def _gradient_bytes(
        self, node: fx.Node, result: int, candidates: Sequence[Candidate]
    ) -> np.ndarray:
        """Of the gradient of a decision's value, while it waits for the operator that made it."""
        fake = results(node)[result]
        shape, itemsize = shape_of(fake), fake.element_size()
        index = result if len(candidates[0].outputs) > 1 else 0
        key = shape, itemsize, index, id(candidates)
        if key not in self._known_gradients:
            local = [self._costs.local_bytes(shape, itemsize, c.outputs[index]) for c in candidates]
            self._known_gradients[key] = np.array(local, dtype=float)
        return self._known_gradients[key]

    def _add_fan(self, node: fx.Node, result: int, users: Sequence[tuple[fx.Node, int]]) -> None:
        """A shared layout for a value with several users; its candidates are what any side has."""
        source = self._decision_of[node, result]
        grad = self.grads[node]
        candidates = self._fan_candidates(source, result, users, grad)
        zero = np.zeros(len(candidates))
        copies = self.decisions[source].repeats
        repeats = None
        if copies is not None:
            repeats = ("fan", result, copies, id(candidates))  # equal ones are made once
        fake = results(node)[result]
        value = node
        root = self._saved.root(value) if len(results(node)) == 1 else node
        parameter = root.op == "placeholder" and root.target in self.graph.parameters
        parts = {}
        if grad and not parameter:
            parts["gradient"] = self._gradient_bytes(node, result, candidates)
        decision = Decision("fan", node, candidates, zero, zero, parts, result, repeats)
        index = len(self.decisions)
        self.edges.append(
            Edge(
                source, index, result, 0, shape_of(fake), fake.element_size(), grad, parameter,
                saved=parameter and self._saved.any(root),
            )
        )  # fmt: skip
        self._add(decision, result)

    def _fan_candidates(
        self, source: int, result: int, users: Sequence[tuple[fx.Node, int]], grad: bool
    ) -> tuple[Candidate, ...]:
        """Every layout that the value is made in or wanted in."""
        made = self.decisions[source].candidates
        wanted = [(self._strategies(user), i) for user, i in users if user.op != "output"]
        # both are known by identity, and stay
        key = id(made), result, grad, *((id(found), i) for found, i in wanted)
        if key not in self._known_fans:
            specs = dict.fromkeys(c.outputs[result] for c in made)
            for found, operand in wanted:
                for strategy in found:
                    spec = strategy.inputs[operand]
                    assert spec is not None
                    specs.setdefault(spec)
            if not grad:
                specs = dict.fromkeys(s.data() for s in specs)
            named = tuple(Candidate(str(s) or "scalar", (s,), (s,)) for s in specs)
            self._known_fans[key] = self._known_candidates.setdefault(("fan", *specs), named)
        return self._known_fans[key]

    def _outputs(self) -> None:
        """Mutated buffers and results, each in the layout that the caller expects."""
        values = [v for v in self.graph.output.args[0] if isinstance(v, fx.Node)]  # type: ignore[union-attr]
        buffers = len(self.graph.mutations)
        specs = []
        for i, value in enumerate(values):
            spec = ShardingSpec.replicated(value.meta["val"].ndim)
            if i >= buffers and self.fixed.outputs is not None:
                spec = self.fixed.outputs[i - buffers]
            specs.append(spec)
        zero = np.zeros(1)
        candidate = Candidate("outputs", (), tuple(specs))
        index = self._add(Decision("output", self.graph.output, (candidate,), zero, zero))
        for i, value in enumerate(values):
            self._connect(value, index, i)


def _user_edges(graph: ModelGraph) -> dict[tuple[fx.Node, int], list[tuple[fx.Node, int]]]:
    """Per value its users as (node, operand); the output node counts as a user."""
    found: dict[tuple[fx.Node, int], list[tuple[fx.Node, int]]] = defaultdict(list)
    for node in graph.compute_nodes():
        for i, operand in enumerate(operands(node)):
            if operand is not None:
                found[producer(operand)].append((node, i))
    for i, value in enumerate(graph.output.args[0]):  # type: ignore[arg-type]
        if isinstance(value, fx.Node):
            found[producer(value)].append((graph.output, i))
    return found
