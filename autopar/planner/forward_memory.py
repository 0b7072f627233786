"""Live bytes of a forward: a value lives from the operator that makes it to the last that reads it.

A view shows the value it was taken of, and a pointwise operator writes over an operand that dies
with it (`autopar/passes/overwrite.py`). What is written into an argument that the caller donates (a
cache) takes no memory either.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch.fx as fx

from autopar.ir.aliasing import overwritable
from autopar.ir.graph import operand_at, producer
from autopar.planner.decisions import Edge
from autopar.planner.series import Item
from autopar.planner.space import SearchSpace


def forward_items(space: SearchSpace) -> list[Item]:
    """All that is held, at two program points for each operator: the conversions of its operands,
    and the operator; then come two for the return of the results."""
    return _ForwardMemory(space).items()


class _ForwardMemory:
    """What is held when.

    Attributes:
        position: the program point of each operator, by decision.
        results: the program point at which results are returned.
        last: by decision, the last program point that reads its value, or a view of it.
        given: decisions whose values lie in arguments of the model.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        decisions = space.decisions
        operators = (i for i, decision in enumerate(decisions) if decision.kind == "op")
        self.position = {i: 2 * k + 1 for k, i in enumerate(operators)}
        self.results = 2 * len(self.position) + 1
        self.readers: dict[int, list[int]] = defaultdict(list)
        self.operands: dict[int, list[Edge]] = defaultdict(list)
        for edge in space.edges:
            self.readers[edge.source].append(edge.target)
            self.operands[edge.target].append(edge)
        self.last = self._last_uses()
        self.given = self._in_arguments()

    def items(self) -> list[Item]:
        decisions, end = self.space.decisions, self.results
        over = self._overwriting()
        items = []

        def add(first: int, last: int, i: int, part: str, kind: str = "transient") -> None:
            decision = decisions[i]
            values = decision.parts[part]
            items.append(Item(first, last, (i,), i, values, (part, decision.cost_class), kind))

        for i, decision in enumerate(decisions):
            if decision.kind == "op":
                at = self.position[i]
                add(at, at, i, "working")
                if i not in self.given and not self._is_view(i):
                    add(at + (i in over), max(at, self.last[i]), i, "value")
            elif decision.kind == "shared" and i not in self.given and "value" in decision.parts:
                add(self._made(i) + 2, self.last[i], i, "value")
            elif decision.kind == "parameter":
                add(0, end, i, "parameters_bytes", "parameters")
            elif "buffers_bytes" in decision.parts:
                add(0, end, i, "buffers_bytes", "buffers")
        return items + self._copies()

    def _copies(self) -> list[Item]:
        """What conversions make."""
        items = []
        for e, edge in enumerate(self.space.edges):
            costs, kind = self.space.edge_costs(edge), self.space.decisions[edge.target].kind
            copies = costs.copies
            assert copies is not None
            at, last = self._reads_at(edge.target) - 1, self._reads_at(edge.target)
            result, of = ("copy", copies.result), "transient"
            if kind == "output":
                assert costs.memory_bytes is not None
                result, of = ("memory", costs.memory_bytes), "activations"
            elif kind == "shared" and edge.target in self.given:
                at = min(map(self._reads_at, self.readers[edge.target]), default=1) - 1
                last = self.last[edge.target]
            elif kind == "shared":  # from the next program point on, its own value counts
                at = last = self._made(edge.target) + 1
            elif self._is_view(edge.target):
                last = self.last[edge.target]
            dies = edge.source not in self.given and self.last[self._root(edge.source)] <= at + 1
            working = ("dying", copies.dying) if dies else ("working", copies.working)
            for (name, values), until, called in ((result, last, of), (working, at, "transient")):
                decisions, values_class = (edge.source, edge.target), (name, costs.cost_class)
                items.append(Item(at, until, decisions, e, values, values_class, called))
        return items

    # -- who reads what -------------------------------------------------------------------------

    def _is_view(self, i: int) -> bool:
        decision = self.space.decisions[i]
        return decision.kind == "op" and self.space.profile[decision.node].aliases_input

    def _reads_at(self, i: int) -> int:
        """The program point at which a decision reads its operands."""
        return self.position.get(i, self.results)

    def _made(self, i: int) -> int:
        """The program point of the operator that makes a decision's value."""
        while self.space.decisions[i].kind == "shared":
            i = self.operands[i][0].source
        return self.position.get(i, -1)

    def _last_uses(self) -> dict[int, int]:
        last: dict[int, int] = {}
        decisions = self.space.decisions
        outputs: Any = self.space.graph.output.args[0]
        returned = {producer(value)[0] for value in outputs if isinstance(value, fx.Node)}
        for i in reversed(range(len(decisions))):
            shared = {reader for reader in self.readers[i] if decisions[reader].kind == "shared"}
            ends = [self._made(i)]
            if decisions[i].node in returned and not shared:  # a deferred result has no reader
                ends.append(self.results)
            for reader in self.readers[i]:
                if reader in shared and decisions[i].kind == "op":
                    ends.append(self._made(i) + 1)
                elif reader in shared or self._is_view(reader):
                    ends.append(last[reader])
                else:
                    ends.append(self._reads_at(reader))
            last[i] = max(ends)
        return last

    def _in_arguments(self) -> set[int]:
        """Parameters, inputs and buffers, what shows them, and what is written into them."""
        decisions, given = self.space.decisions, set[int]()
        donated = {
            edge.source
            for edge in self.space.edges
            if decisions[edge.target].kind not in ("op", "shared", "output")
        }
        for i, decision in enumerate(decisions):
            argument = decision.kind not in ("op", "shared", "output")
            written = i in donated or bool(donated & {*self.readers[i]})
            shows = bool(self.operands[i]) and (self._is_view(i) or decision.kind == "shared")
            if argument or written or (shows and self.operands[i][0].source in given):
                given.add(i)
        return given

    def _overwriting(self) -> set[int]:
        """Operators that write over an operand."""
        decisions, over = self.space.decisions, set[int]()
        for i, at in self.position.items():
            roots = [self._root(edge.source) for edge in self.operands[i]]
            dying = {r for r in roots if r not in self.given and self.last[r] == at}
            places = overwritable(decisions[i].node)
            for edge in self.operands[i]:
                root = self._root(edge.source)
                fits = operand_at(decisions[i].node, edge.operand) in places
                if fits and root in dying and roots.count(root) == 1:
                    over.add(i)
        return over

    def _root(self, i: int) -> int:
        """The decision whose value a view shows."""
        while self._is_view(i):
            i = self.operands[i][0].source
        return i
