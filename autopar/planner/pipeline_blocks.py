"""A planned microbatch as a chain of blocks: what each costs a pipeline, and what crosses the cuts.

The chain is the order of the operators. It may be cut at any of them; the places that are worth
looking at are those where less crosses the cut than just before and just behind (after a residual
sum, between the levels of a U-Net).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import median

import numpy as np
import torch
import torch.fx as fx

from autopar.ir.graph import operands, producer, shape_of
from autopar.ir.spec import ShardingSpec
from autopar.planner.decisions import Decision
from autopar.planner.estimate import accumulation_us
from autopar.planner.liveness import Liveness
from autopar.planner.space import SearchSpace
from autopar.schedule.budget import width_of_sums
from autopar.schedule.pipeline.blocks import Block
from autopar.sharding.node_rules import is_floating, results

# Operators whose weight has a gradient of its own: a product as large as that for their input.
_MATRIX_PRODUCTS = frozenset(
    f"{name}.default"
    for name in (
        "aten.linear aten.mm aten.addmm aten.matmul autopar.packed_linear autopar.packed_addmm"
    ).split()
)
_PRODUCTS = _MATRIX_PRODUCTS | frozenset(
    f"aten.{name}.default" for name in "bmm einsum conv1d conv2d conv3d".split()
)

_SUMMED = (
    "forward_us", "input_us", "weight_us", "held_bytes", "weight_bytes", "state_bytes",
    "before_us", "after_us",
)  # fmt: skip

# A place is left out if so much more crosses it than most of its neighbours.
_WIDE, _NEIGHBOURS = 1.5, 8


@dataclass(frozen=True)
class OperatorChain:
    """The operators of a microbatch in their order.

    Args:
        nodes: the operators.
        costs: per operator, what sums up over the operators of a block.
        host_us: per operator, what the host takes to launch its forward and its backward.
        forward_bytes, backward_bytes: what crosses a cut before each operator, and behind the last;
            values and gradients.
        shares: per operator, parameters that other operators use too, with their bytes.
        places: numbers of the operators before which a cut is worth looking at.
    """

    nodes: tuple[fx.Node, ...]
    costs: tuple[Mapping[str, float], ...]
    host_us: tuple[tuple[float, float], ...]
    forward_bytes: tuple[float, ...]
    backward_bytes: tuple[float, ...]
    shares: tuple[Sequence[tuple[str, float]], ...]
    places: tuple[int, ...]

    def places_for(self, ranks: int) -> list[int]:
        """Places at which a pipeline may be cut: blocks between `places` that take longer than a
        rank's share of the step (layers of equal width, that have no narrow place between them)
        are cut further, where least crosses, near their middle."""
        us = [
            0.0,
            *accumulate(c["forward_us"] + c["input_us"] + c["weight_us"] for c in self.costs),
        ]
        crossing = [f + b for f, b in zip(self.forward_bytes, self.backward_bytes, strict=True)]
        edges = [0, *self.places, len(self.nodes)]
        longer = list(pairwise(edges))
        while longer:
            a, b = longer.pop()
            if b - a < 2 or us[b] - us[a] <= us[-1] / ranks:
                continue
            middle = (us[a] + us[b]) / 2
            cut = min(range(a + 1, b), key=lambda k: (crossing[k], abs(us[k] - middle)))
            edges.append(cut)
            longer += [(a, cut), (cut, b)]
        return sorted(edges)[1:-1]

    def between(self, places: Sequence[int]) -> list[Block]:
        """Blocks of several operators.

        Args:
            places: numbers of the operators at which all but the first begin, in order.
        """
        edges = [0, *places, len(self.nodes)]
        return [self._block(a, b) for a, b in pairwise(edges)]

    def _block(self, first: int, end: int) -> Block:
        sums = {name: sum(costs[name] for costs in self.costs[first:end]) for name in _SUMMED}
        # passes wait for the host where that takes longer to launch them
        forward_us, backward_us = (
            sum(host[k] for host in self.host_us[first:end]) for k in range(2)
        )
        sums["forward_us"] = max(sums["forward_us"], forward_us)
        sums["input_us"] += max(0.0, backward_us - sums["input_us"] - sums["weight_us"])
        held = sums["held_bytes"]
        return Block(
            self.nodes[first].name, **sums | {"weight_bytes": min(held, sums["weight_bytes"])},
            recompute_us=sums["forward_us"],
            checkpoint_bytes=min(held, self.forward_bytes[first]),
            forward_bytes=self.forward_bytes[end],
            backward_bytes=self.backward_bytes[end],
            shares=tuple(dict(share for s in self.shares[first:end] for share in s).items()),
        )  # fmt: skip


def operator_chain(space: SearchSpace, choices: Sequence[int]) -> OperatorChain:
    """The chain of a plan, given as a full choice of candidates."""
    return _Chain(space, choices).chain()


class _Chain:
    def __init__(self, space: SearchSpace, choices: Sequence[int]) -> None:
        self.space, self.choices, self.graph = space, choices, space.graph
        self.ops = [(i, d) for i, d in enumerate(space.decisions) if d.kind == "op"]
        self.nodes = [d.node for _, d in self.ops]
        self.number = {node: k for k, node in enumerate(self.nodes)}
        self.of = {i: k for k, (i, _) in enumerate(self.ops)}
        self.converted: set[fx.Node] = set()  # parameters whose copies have the gradients
        self.reduced: set[fx.Node] = set()  # parameters whose gradients are summed over ranks
        self.layout = {
            (d.node, r): spec
            for d, c in zip(space.decisions, choices, strict=True)
            if d.kind in ("op", "parameter", "input", "buffer")
            for r, spec in enumerate(d.candidates[c].outputs)
        }
        for d, c in zip(space.decisions, choices, strict=True):
            if d.kind == "shared":
                self.layout[d.node, d.result] = d.candidates[c].outputs[0]

    def chain(self) -> OperatorChain:
        rows = [self._operator(d, self.choices[i]) for i, d in self.ops]
        held = self._held()
        for row, nbytes in zip(rows, held, strict=True):
            row["held_bytes"] = nbytes
        self._conversions(rows)
        self._parameters(rows)
        forward, backward = self._crossing()
        return OperatorChain(
            tuple(self.nodes), tuple(rows), tuple(self._host_us()),
            tuple(forward), tuple(backward),
            tuple(self._shares()), tuple(_narrow(forward)),
        )  # fmt: skip

    def _operator(self, d: Decision, c: int) -> dict[str, float]:
        forward, backward = float(d.parts["forward_us"][c]), float(d.parts["backward_us"][c])
        more = float(d.parts["communication_us"][c])
        share = self._weight_share(d.node)
        weight_bytes = 0.0
        if 0 < share < 1:  # the operand, and the gradient of the result
            weight_bytes = float(d.parts["activations_bytes"][c])
            weight_bytes += sum(self._bytes((d.node, r)) for r, _ in enumerate(results(d.node)))
        return {
            "forward_us": forward + more / 2,
            "input_us": backward * (1 - share) + more / 2,
            "weight_us": backward * share,
            "weight_bytes": weight_bytes,
            "state_bytes": 0.0,
            "before_us": 0.0,
            "after_us": 0.0,
        }

    def _host_us(self) -> list[tuple[float, float]]:
        """Per operator, what the host takes for it and for conversions of its operands."""
        us = [list(self.space.host_us(node)) for node in self.nodes]
        for edge in self.space.edges:
            at = self._place(self.space.decisions[edge.target])
            if at is not None and not edge.weight:
                for k, more in enumerate(self.space.collective_host_us(edge, self.choices)):
                    us[at][k] += more
        return [(forward, backward) for forward, backward in us]

    def _weight_share(self, node: fx.Node) -> float:
        """The part of a backward that nobody but the optimizer waits for."""
        grads, workload = self.space.grads, self.space.workload.trainable
        taking = [n for n in operands(node) if n is not None and grads.get(producer(n)[0])]
        own = [n for n in taking if str(producer(n)[0].target) in workload]
        if not own:
            return 0.0
        if len(own) == len(taking):
            return 1.0
        return 0.5 if str(node.target) in _PRODUCTS else 0.0

    def _held(self) -> list[float]:
        """Bytes that each operator keeps for the backward."""
        held = [0.0] * len(self.ops)
        series = Liveness(self.space, float("inf")).memory
        point = len(self.ops)
        for item in series.items:
            if item.kind != "activations" or not item.first <= point <= item.last:
                continue
            value = float(item.values[tuple(self.choices[i] for i in item.decisions)])
            target = item.decisions[-1]
            if target in self.of:
                held[self.of[target]] += value
            elif self.space.decisions[target].kind == "shared":
                held[self.number.get(self.space.decisions[target].node, 0)] += value
        return held

    def _conversions(self, rows: list[dict[str, float]]) -> None:
        """Of activations at every microbatch, of weights once a step, with their copies."""
        for edge in self.space.edges:
            source, target = self.space.decisions[edge.source], self.space.decisions[edge.target]
            costs = self.space.edge_costs(edge)
            pair = self.choices[edge.source], self.choices[edge.target]
            at = self._place(target)
            if at is None:
                continue
            forward, backward = float(costs.forward_us[pair]), float(costs.backward_us[pair])
            if not edge.weight:
                rows[at]["forward_us"] += forward
                rows[at]["input_us"] += backward
                continue
            rows[at]["weight_us"] += accumulation_us(self.space, edge, self.choices)
            if backward:
                self.reduced.add(source.node)
            rows[at]["before_us"] += forward
            rows[at]["after_us"] += backward
            before = source.candidates[pair[0]].outputs[edge.result]
            after = target.candidates[pair[1]].inputs[edge.operand]
            if after is not None and (edge.cast or before.dims != after.dims):
                nbytes = self._local_bytes(edge.shape, edge.itemsize, after)
                rows[at]["state_bytes"] += nbytes * (1 + edge.grad * width_of_sums(edge.itemsize))
                self.converted.add(source.node)

    def _place(self, target: Decision) -> int | None:
        """The operator at which a conversion happens."""
        if target.kind == "op":
            return self.number[target.node]
        if target.kind != "shared":
            return len(self.ops) - 1 if self.ops else None
        if target.node in self.number:
            return self.number[target.node]
        users = [self.number[u] for u in target.node.users if u in self.number]
        return min(users, default=None)

    def _parameters(self, rows: list[dict[str, float]]) -> None:
        """States, and the optimizer's step, where a parameter is used first."""
        first = self._users_of_parameters()
        for d, c in zip(self.space.decisions, self.choices, strict=True):
            users = first.get(d.node)
            if d.kind != "parameter" or not users:
                continue
            row = rows[users[0]]
            row["state_bytes"] += float(d.memory_bytes[c])
            if d.node not in self.converted:
                sums = width_of_sums(d.node.meta["val"].element_size())
                more = sums - 1 if self._is_added_in_place(d.node, users) else sums
                row["state_bytes"] += more * float(d.parts["gradients_bytes"][c])
            row["after_us"] += float(d.time_us[c])

    def _is_added_in_place(self, parameter: fx.Node, users: Sequence[int]) -> bool:
        """Whether the product that makes a gradient adds to that of earlier microbatches
        (`passes/accumulate.py`); else both are there."""
        weight: torch.Tensor = parameter.meta["val"]
        (user, *others) = users
        return (
            weight.ndim == 2
            and width_of_sums(weight.element_size()) == 1
            and not others
            and str(self.nodes[user].target) in _MATRIX_PRODUCTS
            and parameter not in self.reduced
        )

    def _users_of_parameters(self) -> dict[fx.Node, list[int]]:
        """Operators that use each parameter, also through what is computed of parameters alone."""
        roots: dict[fx.Node, set[fx.Node]] = {}
        users: dict[fx.Node, list[int]] = defaultdict(list)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                if node.target in self.graph.parameters:
                    roots[node] = {node}
                continue
            sources = node.all_input_nodes
            if sources and all(n in roots for n in sources) and node not in self.number:
                roots[node] = set().union(*(roots[n] for n in sources))
                continue
            if node in self.number:
                for root in set().union(*(roots.get(n, set()) for n in sources)):
                    users[root].append(self.number[node])
        return users

    def _shares(self) -> list[list[tuple[str, float]]]:
        shares: list[list[tuple[str, float]]] = [[] for _ in self.ops]
        for node, users in self._users_of_parameters().items():
            if len(users) > 1:
                nbytes = self._bytes((node, 0))
                for k in users:
                    shares[k].append((self.graph.parameters[str(node.target)], nbytes))
        return shares

    def _crossing(self) -> tuple[list[float], list[float]]:
        """Bytes that cross a cut before each operator, and bytes of their gradients."""
        parameters: set[fx.Node] = set()
        others: set[fx.Node] = set()
        last: dict[tuple[fx.Node, int], int] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                (parameters if node.target in self.graph.parameters else others).add(node)
                continue
            sources = {producer(n)[0] for n in node.all_input_nodes}
            if sources & parameters:
                parameters.add(node)
            if sources & others:
                others.add(node)
            if node in self.number:
                for n in operands(node):
                    if n is not None:
                        last[producer(n)] = self.number[node]
        forward, backward = np.zeros(len(self.ops) + 2), np.zeros(len(self.ops) + 2)
        for (node, result), until in last.items():
            if node not in self.number or not (node in parameters and node in others):
                continue
            nbytes, first = self._bytes((node, result)), self.number[node] + 1
            forward[first] += nbytes
            forward[until + 1] -= nbytes
            if self.space.grads[node] and is_floating(results(node)[result]):
                backward[first] += nbytes
                backward[until + 1] -= nbytes
        return np.cumsum(forward)[:-1].tolist(), np.cumsum(backward)[:-1].tolist()

    def _bytes(self, value: tuple[fx.Node, int]) -> float:
        node, result = value
        fake = results(node)[result]
        return self._local_bytes(shape_of(fake), fake.element_size(), self.layout[value])

    def _local_bytes(self, shape: tuple[int, ...], itemsize: int, spec: ShardingSpec) -> float:
        return float(self.space.local_bytes(shape, itemsize, spec))


def _narrow(crossing: Sequence[float]) -> list[int]:
    """Where less crosses than around; one of neighbours that are equal."""
    count = len(crossing) - 1
    minima = [
        k
        for k in range(1, count)
        if crossing[k] < crossing[k - 1]
        and crossing[k] <= next((x for x in crossing[k + 1 : count] if x != crossing[k]), np.inf)
    ]
    return [
        k
        for at, k in enumerate(minima)
        if crossing[k]
        <= _WIDE * median(crossing[j] for j in minima[max(0, at - _NEIGHBOURS) : at + _NEIGHBOURS])
    ]
