"""The search space of a graph: decisions with their candidates and costs.

Decisions are the parameters (where they are stored), the inputs (how they are split), every
operator call (its strategy), every value with several users (the layout they share: one conversion,
and one gradient reduction), and the outputs. A plan is one candidate per decision.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch.fx as fx

from autopar.cluster.cluster import NODE_SIZE, ClusterInfo
from autopar.comm.cost import BUCKET_MEMBER_BYTES
from autopar.ir.deferred_results import deferred_results
from autopar.ir.graph import ModelGraph, operands, producer, shape_of
from autopar.ir.repeats import places
from autopar.ir.spec import ShardingSpec
from autopar.planner.axis_groups import Groups, single_axes
from autopar.planner.candidates import CandidateTable
from autopar.planner.decisions import Candidate, Decision, Edge, FixedLayouts, Workload
from autopar.planner.edge_costs import EdgeCosts, EdgeCostTable
from autopar.planner.op_costs import OpCosts
from autopar.planner.saved_values import SavedValues
from autopar.profiler.profile import profile_graph, requires_grad_map
from autopar.sharding.conversion.converter import converter_for
from autopar.sharding.node_rules import call_of, results, rule_of
from autopar.sharding.rules import describe_missing
from autopar.solver import PairCost, Problem
from autopar.solver.reductions import TiedProblem

log = logging.getLogger(__name__)

_HELD = ("parameter", "input")  # decisions on what a rank holds between steps


class SearchSpace:
    """All legal plans of a graph on a cluster.

    Args:
        any_order: offer dims that several axes split in every order of the axes, not the ascending
            one alone. Operators cost the same in every order and parameters are stored in one, so
            little can be won; on three axes planning takes several times as long.
        orders: the only ones of these orders that are offered.
        groups: of axes that split alike (`planner.axis_groups`); each by itself if None.
    """

    def __init__(
        self,
        graph: ModelGraph,
        cluster: ClusterInfo,
        workload: Workload,
        fixed: FixedLayouts | None = None,
        *,
        any_order: bool = False,
        orders: frozenset[tuple[int, ...]] = frozenset(),
        groups: Groups | None = None,
    ) -> None:
        self.any_order, self.orders = any_order, orders
        self.groups = single_axes(cluster.mesh) if groups is None else groups
        self.graph, self.cluster, self.workload = graph, cluster, workload
        self.fixed = fixed or FixedLayouts()
        self.mesh = cluster.mesh
        self.profile = profile_graph(graph, set(workload.trainable))
        self.grads = requires_grad_map(graph, set(workload.trainable))
        self.unruled = [n for n in graph.compute_nodes() if not rule_of(n)[1]]
        for node in self.unruled:
            log.info("%s", describe_missing(call_of(node), graph.info(node).source))
        self._saved = SavedValues(graph, self.profile)
        self._costs = OpCosts(cluster, self.profile, self._saved)
        self._table = CandidateTable(
            graph, workload, self.fixed, self.grads, self._costs, any_order=any_order,
            orders=orders, groups=self.groups,
        )  # fmt: skip
        weights = [int(graph.placeholders[p].meta["val"].nbytes) for p in graph.parameters]
        small = sum(n for n in weights if n <= BUCKET_MEMBER_BYTES)
        converter = converter_for(cluster, small, self.fixed.whole_sizes, self.groups)
        self._edge_costs = EdgeCostTable(converter, self._costs, forward=workload.forward)
        self.decisions: list[Decision] = []
        self.edges: list[Edge] = []
        self._decision_of: dict[tuple[fx.Node, int], int] = {}
        self._build()

    # -- public ---------------------------------------------------------------------------------

    @property
    def weights_overlap(self) -> bool:
        """Whether conversions of weights run beside compute."""
        return self.cluster.device.runs_beside

    def local_bytes(self, shape: tuple[int, ...], itemsize: int, spec: ShardingSpec) -> int:
        """Bytes of a value on the fullest rank."""
        return self._costs.local_bytes(shape, itemsize, spec)

    def accumulation_us(self, shape: tuple[int, ...], itemsize: int, spec: ShardingSpec) -> float:
        """As of `OpCosts`."""
        return self._costs.accumulation_us(shape, itemsize, spec)

    def host_us(self, node: fx.Node) -> tuple[float, float]:
        """What the host takes to launch an operator's forward and its backward."""
        return self._costs.host_us(node)

    def collective_host_us(self, edge: Edge, choices: Sequence[int]) -> tuple[float, float]:
        """What the host takes to launch the conversion of a value on an edge under a full choice,
        and of its gradient."""
        software, costs = self.cluster.software, self.edge_costs(edge)
        source, target = self.decisions[edge.source], self.decisions[edge.target]
        pair = choices[edge.source], choices[edge.target]
        before = source.candidates[pair[0]].outputs[edge.result]
        after = target.candidates[pair[1]].inputs[edge.operand]
        if software is None or after is None:
            return 0.0, 0.0
        axes = [a for a in range(len(self.mesh)) if before.state(a) != after.state(a)]
        waits = software.wait_us * (min(NODE_SIZE, prod(self.mesh[a] for a in axes)) - 1)
        local = self.cluster.device.launch_us  # a conversion that launches no collective
        forward, backward = float(costs.forward_us[pair]), float(costs.backward_us[pair])
        return waits * (forward > local), waits * (backward > local)

    def held_bytes(self, choices: Sequence[int]) -> float:
        """Bytes of parameters and inputs (a cache) on the fullest rank, under a full choice."""
        chosen = zip(self.decisions, choices, strict=True)
        return sum(float(d.memory_bytes[c]) for d, c in chosen if d.kind in _HELD)

    def problem(self, us_per_byte: float = 0.0) -> TiedProblem:
        """The SPMD problem without rows (`liveness.Liveness` makes them), with copies in repeated
        blocks in one class. Communication that overlaps with compute is not in its times.

        Args:
            us_per_byte: price of `held_bytes`, added to times.
        """
        ties: dict[Hashable, int] = {}
        keys = [d.repeats or ("decision", i) for i, d in enumerate(self.decisions)]
        edge_costs = [self.edge_costs(e) for e in self.edges]
        hidden = [e.weight and self.weights_overlap for e in self.edges]
        edges = zip(self.edges, edge_costs, hidden, strict=True)
        return TiedProblem(
            Problem(
                tuple(
                    d.time_us + us_per_byte * d.memory_bytes if d.kind in _HELD else d.time_us
                    for d in self.decisions
                ),
                tuple(
                    PairCost(e.source, e.target, costs.hidden_us if hide else costs.time_us)
                    for e, costs, hide in edges
                ),
                names=tuple(d.name for d in self.decisions),
            ),
            tuple(ties.setdefault(key, len(ties)) for key in keys),
            tuple(d.cost_class for d in self.decisions),
            tuple(costs.cost_class for costs in edge_costs),
        )

    def weight_operands(self) -> list[list[int]]:
        """Per decision the operands that are parameters, or views of one."""
        weights: list[list[int]] = [[] for _ in self.decisions]
        for edge in self.edges:
            if edge.weight:
                weights[edge.target].append(edge.operand)
        return weights

    def location(self, decision: int) -> str:
        """The qualified name of a parameter; of other decisions, the module of their node."""
        node = self.decisions[decision].node
        parameter = self.graph.parameters.get(str(node.target))
        return parameter or (self.graph.info(node).module if node.op == "call_function" else "")

    def edge_costs(self, edge: Edge) -> EdgeCosts:
        """Costs of the conversions on an edge, for every pair of candidates."""
        return self._edge_costs.of(edge, self.decisions[edge.source], self.decisions[edge.target])

    def conversion_costs(self, edge: Edge, choices: Sequence[int]) -> tuple[float, float]:
        """Time and memory of the conversion on an edge under a full choice."""
        costs = self.edge_costs(edge)
        pair = choices[edge.source], choices[edge.target]
        memory = costs.memory_bytes
        return float(costs.time_us[pair]), 0.0 if memory is None else float(memory[pair])

    # -- construction ---------------------------------------------------------------------------

    def _add(self, decision: Decision, *values: int) -> int:
        self.decisions.append(decision)
        for result in values:
            self._decision_of[decision.node, result] = len(self.decisions) - 1
        return len(self.decisions) - 1

    def _build(self) -> None:
        input_names = [name for name in self.graph.inputs if name is not None]
        calls = self._table.calls
        signatures = [(str(c.op), c.inputs, c.outputs) for c in calls.values()]
        modules = [self.graph.info(n).module for n in calls]
        place = dict(zip(calls, places(zip(modules, signatures, strict=True)), strict=True))
        free = self.fixed.outputs is None
        deferred = deferred_results(self.graph) if free else frozenset()
        donated: dict[int, int] = {}  # decision on an input, by the position of its result
        users = _user_edges(self.graph, deferred)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                if not results(node):  # a flag, specialized
                    continue
                index = self._add(self._table.placeholder(node, input_names), 0)
                if node.target in self.graph.donated:
                    donated[self.graph.donated[str(node.target)]] = index
            elif node in self.profile:
                decision = self._table.operator(node, place[node])
                index = self._add(decision, *range(len(results(node))))
                for i, operand in enumerate(operands(node)):
                    if operand is not None:
                        self._connect(operand, index, i)
            else:
                continue
            for result in range(len(results(node))):
                if len(users[node, result]) > 1:
                    self._add_shared_layout(node, result, users[node, result])
        self._outputs(deferred, donated)

    def _connect(self, value: fx.Node, target: int, operand: int) -> None:
        node, result = producer(value)
        source = self._decision_of[node, result]
        fake = value.meta["val"]
        root = self._saved.root(value)
        weight = self._table.is_parameter(root)
        is_op = self.decisions[target].kind == "op"
        converts_for_saver = is_op and self._saved.needs(self.decisions[target].node, operand)
        if self.decisions[source].kind == "shared":
            result = 0
        saved = self._saved.any(root) if weight else converts_for_saver
        self.edges.append(
            Edge(
                source, target, result, operand, shape_of(fake), fake.element_size(),
                self.grads[value], weight, saved, self.graph.sum_dtype(value).itemsize,
                self._is_cast(self.decisions[source]),
            )
        )  # fmt: skip

    def _is_cast(self, source: Decision) -> bool:
        """Whether an edge from a decision casts what a parameter stores."""
        name = str(source.node.target)
        return source.kind == "parameter" and (
            self.graph.storage_dtype(name) != source.node.meta["val"].dtype
        )

    def _add_shared_layout(
        self, node: fx.Node, result: int, users: Sequence[tuple[fx.Node, int]]
    ) -> None:
        """Add the decision on the layout that the users of a value share."""
        source = self._decision_of[node, result]
        grad = self.grads[node]
        number, candidates = self._table.shared(self.decisions[source], result, users, grad)
        copies = self.decisions[source].repeats
        repeats = None if copies is None else ("shared", result, copies, number)
        fake = results(node)[result]
        shape, itemsize = shape_of(fake), fake.element_size()
        root = self._saved.root(node) if len(results(node)) == 1 else node
        weight = self._table.is_parameter(root)
        parts = {}
        if (grad or self.workload.forward) and not weight:
            # the gradient has the bytes of the value
            part = "value" if self.workload.forward else "gradient"
            parts[part] = self._table.gradient_bytes(node, result, number, candidates)
        zero = np.zeros(len(candidates))
        cost_class = self._table.class_of("cost", "shared", number, shape, itemsize, *parts)
        decision = Decision(
            "shared", node, candidates, zero, zero, number, cost_class, parts, result, repeats
        )
        saved, index = weight and self._saved.any(root), len(self.decisions)
        self.edges.append(
            Edge(
                source, index, result, 0, shape, itemsize, grad, weight, saved,
                self.graph.sum_dtype(node, result).itemsize, self._is_cast(self.decisions[source]),
            )
        )  # fmt: skip
        self._add(decision, result)

    def _outputs(self, deferred: Collection[int], donated: Mapping[int, int]) -> None:
        """Add the mutated buffers and the results, each in the layout that the caller expects.

        Args:
            deferred: positions of the results that stay as they are laid out.
            donated: decisions on inputs that results are written to, by the results' positions.
        """
        outputs: Any = self.graph.output.args[0]
        for i, index in donated.items():
            self._connect(outputs[i], index, 0)
        values = [
            v
            for i, v in enumerate(outputs)
            if isinstance(v, fx.Node) and i not in deferred and i not in donated
        ]
        buffers = len(self.graph.mutations)
        specs = [ShardingSpec.replicated(value.meta["val"].ndim) for value in values]
        if self.fixed.outputs is not None:
            specs[buffers:] = self.fixed.outputs
        zero, number = np.zeros(1), self._table.class_of("output")
        candidates = (Candidate("outputs", (), tuple(specs)),)
        decision = Decision("output", self.graph.output, candidates, zero, zero, number, number)
        index = self._add(decision)
        for i, value in enumerate(values):
            self._connect(value, index, i)


def _user_edges(
    graph: ModelGraph, deferred: Collection[int]
) -> dict[tuple[fx.Node, int], list[tuple[fx.Node, int]]]:
    """Per value its users as (node, operand); the output node counts as a user, but of deferred
    results."""
    users: dict[tuple[fx.Node, int], list[tuple[fx.Node, int]]] = defaultdict(list)
    for node in graph.compute_nodes():
        for i, operand in enumerate(operands(node)):
            if operand is not None:
                users[producer(operand)].append((node, i))
    for i, value in enumerate(graph.output.args[0]):  # type: ignore[arg-type]
        if isinstance(value, fx.Node) and i not in deferred:
            users[producer(value)].append((graph.output, i))
    return users
