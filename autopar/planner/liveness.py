"""What is alive, and how late communication is, at every moment of a step.

A step runs the operators forward, then backward in reverse. Each cost of the search space counts
during an interval of operators, so that the memory at one moment, or the lateness of weights at
one, is a linear expression in the choices: a row of the solver's problem (`rows`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from autopar.ir.repeats import pattern
from autopar.planner.space import SearchSpace


@dataclass(frozen=True)
class Item:
    """One cost and when it counts.

    Args:
        first, last: liveness, both included.
        index: of a decision, or of a edge.
        is_link: which of the two.
        values: [candidates], or [source candidates, target candidates].
        kind: "parameters", "activations", ...
    """

    first: int
    last: int
    index: int
    is_link: bool
    values: np.ndarray
    kind: str


class Series:
    """The same expression at every moment.

    Args:
        name: of the rows, with the moment behind it.
        slack: of the rows.
        limit: of the rows.
        items: what counts when.
        count: of liveness.
    """

    def __init__(
        self, name: str, slack: str, limit: float, items: Sequence[Item], count: int
    ) -> None:
        self.name, self.slack, self.limit, self.count = name, slack, limit, count
        self.items = [item for item in items if item.first <= item.last and item.values.any()]
        self._first = np.array([item.first for item in self.items], dtype=np.int64)
        self._last = np.array([item.last for item in self.items], dtype=np.int64)
        self._table: _Table | None = None

    def values(self, space: SearchSpace, choices: Sequence[int]) -> np.ndarray:
        """The expression at every moment, [liveness]."""
        if self._table is None:
            self._table = _Table(space, self.items)
        value = self._table.chosen(choices)
        steps = np.bincount(self._first, value, self.count + 1)
        steps -= np.bincount(self._last + 1, value, self.count + 1)
        return np.cumsum(steps)[:-1]

    def kinds(self, space: SearchSpace, choices: Sequence[int], moment: int) -> dict[str, float]:
        """What the expression is made of at one moment."""
        found: dict[str, float] = defaultdict(float)
        for item, value in self._chosen(space, choices):
            if item.first <= moment <= item.last:
                found[item.kind] += value
        return found

    def where(self, space: SearchSpace, choices: Sequence[int], moment: int) -> dict[str, float]:
        """The expression by place at one moment: modules, copies in repeated blocks together, or
        the results that the caller gets."""
        found: dict[str, float] = defaultdict(float)
        for item, value in self._chosen(space, choices):
            if item.first <= moment <= item.last:
                decision = space.decisions[
                    space.edges[item.index].target if item.is_link else item.index
                ]
                module = "the results for the caller"
                if decision.kind != "output":
                    node = decision.node
                    parameter = space.graph.parameters.get(str(node.target), "")
                    module = pattern(parameter or space.graph.info(node).module) or node.name
                found[module] += value
        return found

    def _chosen(self, space: SearchSpace, choices: Sequence[int]) -> Iterator[tuple[Item, float]]:
        for item in self.items:
            if item.is_link:
                edge = space.edges[item.index]
                yield item, float(item.values[choices[edge.source], choices[edge.target]])
            else:
                yield item, float(item.values[choices[item.index]])

    def alive(self, moment: int) -> np.ndarray:
        """Which of the items count at a moment, [items]."""
        return (self._first <= moment) & (moment <= self._last)


class _Table:
    """The values of items in one array, tables that many of them share once."""

    def __init__(self, space: SearchSpace, items: Sequence[Item]) -> None:
        begins: dict[int, int] = {}
        parts, end = [], 0
        rows = []
        for item in items:
            if id(item.values) not in begins:
                begins[id(item.values)] = end
                parts.append(item.values.ravel())
                end += item.values.size
            edge = space.edges[item.index] if item.is_link else None
            source, target = (edge.source, edge.target) if edge else (item.index, item.index)
            width = item.values.shape[1] if edge else 1
            begin = begins[id(item.values)]
            rows.append((begin, source, width, target, bool(edge)))
        self._flat = np.concatenate(parts) if parts else np.zeros(0)
        columns = np.array(rows, dtype=np.int64).reshape(-1, 5).T
        self._begin, self._source, self._width, self._target, self._is_link = columns

    def chosen(self, choices: Sequence[int]) -> np.ndarray:
        """Per item its value."""
        c = np.asarray(choices)
        within = c[self._source] * self._width + c[self._target] * self._is_link
        return self._flat[self._begin + within]


class Liveness:
    """All rows of a search space.

    Args:
        space: the decisions.
        budget_bytes: of one device.

    Attributes:
        memory: bytes alive; the last moment is the optimizer's step.
        late: lateness of weights, microseconds; empty where nothing hides behind compute.
    """

    def __init__(self, space: SearchSpace, budget_bytes: float) -> None:
        self.space = space
        decisions = space.decisions
        ops = [i for i, decision in enumerate(decisions) if decision.kind == "op"]
        self.count = len(ops)
        self._position = {decision: k for k, decision in enumerate(ops)}
        self._users: dict[int, list[int]] = defaultdict(list)
        for edge in reversed(space.edges):  # a fan's own users come before the fan
            target = edge.target
            at = self._users[target] if decisions[target].kind == "fan" else [self._moment(target)]
            self._users[edge.source] += at
        self.memory = Series("memory", "", budget_bytes, self._alive(), self.count + 2)
        self.late = self._lateness() if space.weights_hide else []

    def late_us(self, choices: Sequence[int]) -> float:
        """How long compute waits for weights, and the step for the last gradients."""
        slacks: dict[str, float] = defaultdict(float)
        for series in self.late:
            latest = float(series.values(self.space, choices).max(initial=0.0))
            slacks[series.slack] = max(slacks[series.slack], latest)
        return sum(slacks.values())

    def _moment(self, decision: int) -> int:
        """When a decision runs; the output comes after all operators."""
        return self._position.get(decision, self.count)

    def _alive(self) -> list[Item]:
        """Backward of operator k at moment k; then the handing over of the results, with all of the
        forward behind it, and the optimizer's step."""
        handed, step = self.count, self.count + 1
        found = []
        decisions = self.space.decisions
        # the shared layout of several users speaks for the value behind it
        fanned = {k.source for k in self.space.edges if decisions[k.target].kind == "fan"}

        def add(first: int, last: int, index: int, values: np.ndarray, kind: str) -> None:
            found.append(Item(first, last, index, False, values, kind))

        for i, decision in enumerate(decisions):
            users = self._users[i]
            parts = decision.parts
            if decision.kind == "op":
                at = self._position[i]
                add(at, handed, i, parts["activations_bytes"], "activations")
                add(at, at, i, parts["working"], "transient")
            elif decision.kind == "parameter":
                add(0, step, i, parts["parameters_bytes"], "parameters")
                add(0, step, i, parts["optimizer_bytes"], "optimizer")
                # while its last user's backward makes it, the operator has it
                add(0, max(users, default=handed) - 1, i, parts["gradients_bytes"], "gradients")
                add(step, step, i, parts["gradients_bytes"], "gradients")
                add(step, step, i, parts["step_bytes"], "transient")
            elif "buffers_bytes" in parts:
                add(0, step, i, parts["buffers_bytes"], "buffers")
            if "gradient" in parts and users and i not in fanned:
                # between the operators that pass it on and the one that takes it
                first = self._produced(i)
                last = min(max(users), handed) - 1
                add(first + 1, last, i, parts["gradient"], "transient")
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
                # as they were gathered, before they are put in order
                found.append(Item(handed, handed, e, True, copies, "transient"))
            found.append(Item(at, handed, e, True, copies, "activations"))
        return found

    def _produced(self, decision: int) -> int:
        """The moment of the operator whose value a decision is."""
        while self.space.decisions[decision].kind == "fan":
            decision = next(k.source for k in self.space.edges if k.target == decision)
        return self._position.get(decision, -1)

    def _lateness(self) -> list[Series]:
        """Three queues, each served while compute runs:

        forward     weights gathered before an operator needs them
        release     gradients reduced once backward has passed an operator, and gathers again
        deadline    weights gathered again before backward comes to an operator
        """
        end = self.count
        forward, release, deadline = [], [], []
        negative: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for i, k in self._position.items():
            parts = self.space.decisions[i].parts
            if id(parts) not in negative:  # copies share their parts
                negative[id(parts)] = -parts["forward_us"], -parts["backward_us"]
            before, after = negative[id(parts)]
            forward.append(Item(k + 1, end - 1, i, False, before, "compute"))
            release.append(Item(k + 1, end - 1, i, False, after, "compute"))
            deadline.append(Item(0, k - 1, i, False, after, "compute"))
        for e, edge in enumerate(self.space.edges):
            if not edge.weight:
                continue
            costs = self.space.edge_costs(edge)
            target = self.space.decisions[edge.target]
            users = self._users[edge.target] if target.kind == "fan" else [edge.target]
            at = [self._position.get(u, u) for u in users] if target.kind != "fan" else users
            first, last = min(at, default=0), max(at, default=0)
            first, last = min(first, end - 1), min(last, end - 1)
            ahead, back, again = costs.queued_us
            forward.append(Item(first, end - 1, e, True, ahead, "weights"))
            release.append(Item(first, end - 1, e, True, costs.released_us, "weights"))
            deadline.append(Item(0, last, e, True, again, "weights"))
            deadline.append(Item(0, first - 1, e, True, back, "weights"))
        return [
            Series("forward", "forward", 0.0, forward, end),
            Series("release", "backward", 0.0, release, end),
            Series("deadline", "backward", 0.0, deadline, end),
        ]
