"""Live bytes and exposed communication at every program point of a step, as linear expressions.

A step runs the operators forward, then backward in reverse. Of a step without backward, the memory
is that of the forward (`autopar/planner/forward_memory.py`). Each cost of the search space counts
during an interval of operators, so that the memory at one program point, or the communication
exposed there, is a linear expression in the choices: a row of the solver's problem.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from autopar.planner.forward_memory import forward_items
from autopar.planner.series import Item, Series
from autopar.planner.space import SearchSpace


class Liveness:
    """All rows of a search space, for a budget per device (infinite for no limit).

    Attributes:
        memory: live bytes; the last program point is the optimizer's step.
        exposed: exposed communication of weights, microseconds; empty where it cannot overlap.
    """

    def __init__(self, space: SearchSpace, budget_bytes: float) -> None:
        self.space = space
        decisions = space.decisions
        ops = [i for i, decision in enumerate(decisions) if decision.kind == "op"]
        self.count = len(ops)
        self._position = {decision: k for k, decision in enumerate(ops)}
        self._users: dict[int, list[int]] = defaultdict(list)
        for edge in reversed(space.edges):  # the users of a shared layout come before it
            target = edge.target
            shared = decisions[target].kind == "shared"
            self._users[edge.source] += self._users[target] if shared else [self._point(target)]
        forward = space.workload.forward
        items = forward_items(space) if forward else self._memory_items()
        points = 2 * (self.count + 1) if forward else self.count + 2
        self.memory = Series("memory", "", budget_bytes, items, points)
        self.exposed = self._exposed_communication() if space.weights_overlap else []

    def exposed_us(self, choices: Sequence[int]) -> float:
        """How long compute waits for weights, and the step for the last gradients."""
        slacks: dict[str, float] = defaultdict(float)
        for series in self.exposed:
            largest = float(series.values(choices).max(initial=0.0))
            slacks[series.slack] = max(slacks[series.slack], largest)
        return sum(slacks.values())

    def _point(self, decision: int) -> int:
        """The program point of a decision; the output comes after all operators."""
        return self._position.get(decision, self.count)

    def _edge_item(
        self, first: int, last: int, e: int, values: np.ndarray, name: str, kind: str
    ) -> Item:
        edge = self.space.edges[e]
        values_class = "edge", name, self.space.edge_costs(edge).cost_class
        return Item(first, last, (edge.source, edge.target), e, values, values_class, kind)

    def _compute_item(self, first: int, last: int, i: int, part: str) -> Item:
        """Compute that communication overlaps with counts against it."""
        decision = self.space.decisions[i]
        values_class = part, decision.cost_class
        return Item(first, last, (i,), i, -decision.parts[part], values_class, "compute")

    def _memory_items(self) -> list[Item]:
        """Backward of operator k is program point k; then come the return of the results, with all
        of the forward behind it, and the optimizer's step."""
        results, step = self.count, self.count + 1
        items = []
        decisions = self.space.decisions
        # the shared layout of several users holds the gradient of the value behind it
        shared = {k.source for k in self.space.edges if decisions[k.target].kind == "shared"}

        def add(first: int, last: int, i: int, part: str, kind: str) -> None:
            decision = decisions[i]
            values_class = part, decision.cost_class
            items.append(Item(first, last, (i,), i, decision.parts[part], values_class, kind))

        for i, decision in enumerate(decisions):
            users = self._users[i]
            if decision.kind == "op":
                at = self._position[i]
                add(at, results, i, "activations_bytes", "activations")
                add(at, at, i, "working", "transient")
            elif decision.kind == "parameter":
                add(0, step, i, "parameters_bytes", "parameters")
                add(0, step, i, "optimizer_bytes", "optimizer")
                # while the backward of the last user makes it, that operator holds it
                add(0, max(users, default=results) - 1, i, "gradients_bytes", "gradients")
                add(step, step, i, "gradients_bytes", "gradients")
                if self.space.workload.microbatches > 1:  # their sums
                    add(0, step, i, "gradients_bytes", "gradients")
                add(step, step, i, "step_bytes", "transient")
            elif "buffers_bytes" in decision.parts:
                add(0, step, i, "buffers_bytes", "buffers")
            if "gradient" in decision.parts and users and i not in shared:
                # between the operators that emit it and the one that consumes it
                last = min(max(users), results) - 1
                add(self._produced(i) + 1, last, i, "gradient", "transient")
        for e, edge in enumerate(self.space.edges):
            copies = self.space.edge_costs(edge).memory_bytes
            if copies is None:
                continue
            kind = decisions[edge.target].kind
            at = min(self._users[edge.target], default=0)
            if kind == "op":
                at = self._position[edge.target]
            if kind == "output":
                at = 0  # the caller has them during backward
                # a gather needs its result a second time, to reorder it
                items.append(self._edge_item(results, results, e, copies, "memory", "transient"))
            items.append(self._edge_item(at, results, e, copies, "memory", "activations"))
        return items

    def first_use(self, decision: int) -> int:
        """The program point of an operator, or of the first one that reads a value: the last in
        the backward."""
        return self._position.get(decision, min(self._users[decision], default=0))

    def _produced(self, decision: int) -> int:
        """The program point of the operator that makes a decision's value."""
        while self.space.decisions[decision].kind == "shared":
            decision = next(k.source for k in self.space.edges if k.target == decision)
        return self._position.get(decision, -1)

    def _exposed_communication(self) -> list[Series]:
        """Three queues of communication, each served while compute runs:

        forward     gathers of weights, before an operator needs them
        release     reductions of gradients once backward has passed an operator, and re-gathers
        deadline    re-gathers of weights, before backward comes to an operator
        """
        end, decisions = self.count, self.space.decisions
        forward, release, deadline = [], [], []
        for i, k in self._position.items():
            forward.append(self._compute_item(k + 1, end - 1, i, "forward_us"))
            release.append(self._compute_item(k + 1, end - 1, i, "backward_us"))
            deadline.append(self._compute_item(0, k - 1, i, "backward_us"))
        for e, edge in enumerate(self.space.edges):
            if not edge.weight:
                continue
            costs = self.space.edge_costs(edge)
            shared = decisions[edge.target].kind == "shared"
            users = self._users[edge.target] if shared else [edge.target]
            at = users if shared else [self._position.get(u, u) for u in users]
            first, last = min(at, default=0), max(at, default=0)
            first, last = min(first, end - 1), min(last, end - 1)
            for items, begin, until, part, values in (
                (forward, first, end - 1, "gather", costs.queued_us[0]),
                (release, first, end - 1, "release", costs.released_us),
                (deadline, 0, last, "again", costs.queued_us[2]),
                (deadline, 0, first - 1, "reduce", costs.queued_us[1]),
            ):
                items.append(self._edge_item(begin, until, e, values, part, "weights"))
        return [
            Series("forward", "forward", 0.0, forward, end),
            Series("release", "backward", 0.0, release, end),
            Series("deadline", "backward", 0.0, deadline, end),
        ]
