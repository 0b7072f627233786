"""Values saved for the backward, each counted once, however many operators save it."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx

from autopar.ir.graph import ModelGraph, operand_at, operands, producer, shape_of
from autopar.profiler.profile import NodeProfile
from autopar.sharding.node_rules import results


class SavedValues:
    """Which values are saved for the backward, and at which operator each is counted."""

    def __init__(self, graph: ModelGraph, profile: Mapping[fx.Node, NodeProfile]) -> None:
        self._profile = profile
        self._needed: dict[fx.Node, bool] = {}
        self._root: dict[fx.Node, fx.Node] = {}
        self._first: dict[fx.Node, tuple[fx.Node, int]] = {}
        self._output_first: set[tuple[fx.Node, int]] = set()
        for node in graph.nodes:
            source, _ = producer(node)
            if node.op == "placeholder":
                self._root[node] = node
                continue
            if source not in profile:
                continue
            if source is not node:  # getitem: a view of the split input, or a result of its own
                aliased = profile[source].aliases_input
                self._root[node] = self._root[source] if aliased else node
                continue
            first = _aliased(node) or node
            self._root[node] = self._root[first] if profile[node].aliases_input else node
            for i in profile[node].tape.saved_operands:
                self._first.setdefault(self._root[operand_at(node, i)], (node, i))
            for i in profile[node].tape.saved_results:
                results_of = (u for u in node.users if producer(u) == (node, i))
                saved = node if len(results(node)) == 1 else next(results_of, None)
                root = self._root.get(saved, saved) if saved is not None else None
                if root is None or root not in self._first:
                    self._output_first.add((node, i))
                    if saved is not None:
                        self._first.setdefault(saved, (node, -1 - i))

        self._first_of: dict[fx.Node, list[int]] = defaultdict(list)
        for first_at, i in self._first.values():
            self._first_of[first_at].append(i)

    def root(self, value: fx.Node) -> fx.Node:
        """The value whose storage this one shares."""
        return self._root.get(value, value)

    def any(self, root: fx.Node) -> bool:
        """Some operator saves the value, or a view of it."""
        return root in self._first

    def needs(self, node: fx.Node, operand: int) -> bool:
        """The operand, or a view of it, is saved but counted elsewhere, so that a converted copy
        adds memory."""
        if operand in self._profile[node].tape.saved_operands:
            return not self.counted_here(node, operand)
        return self._views_are_needed(node) and operand_at(node, operand) is _aliased(node)

    def _views_are_needed(self, node: fx.Node) -> bool:
        """Whether an operator's results are views, and a reader of them needs a copy."""
        if node not in self._needed:
            users = [(user, result) for result in _values_of(node) for user in result.users]
            self._needed[node] = self._profile[node].aliases_input and any(
                self.needs(user, k)
                for user, result in users
                if user in self._profile
                for k, operand in enumerate(operands(user))
                if operand is result
            )
        return self._needed[node]

    def counted_here(self, node: fx.Node, operand: int) -> bool:
        root = self.root(operand_at(node, operand))
        return root.op != "placeholder" and self._first.get(root) == (node, operand)

    def whole(self, node: fx.Node, operand: int) -> float:
        """Elements that are kept per element of an operand that is counted here: a view keeps all
        of its base, as a part of a product for query, key and value does."""
        value = operand_at(node, operand)
        sizes = [math.prod(shape_of(v.meta["val"])) for v in (self.root(value), value)
                 if isinstance(v.meta["val"], torch.Tensor)]  # fmt: skip
        return max(1.0, sizes[0] / max(1, sizes[-1]))

    def output_counted(self, node: fx.Node, result: int) -> bool:
        return (node, result) in self._output_first

    def counted(self, node: fx.Node) -> tuple[int, ...]:
        """The values that are counted at the node: operands, and results as ~index."""
        ins = (i for i, n in enumerate(operands(node)) if n is not None)
        outs = (~i for i in range(len(results(node))) if self.output_counted(node, i))
        return (*(i for i in ins if self.counted_here(node, i)), *outs)

    def key(self, node: fx.Node) -> tuple[Any, ...]:
        """Differs between copies of a block that save different values."""
        return tuple(sorted(self._first_of.get(node, ())))


def _aliased(node: fx.Node) -> fx.Node | None:
    """The operand that a view shows."""
    return next((n for n in operands(node) if n is not None), None)


def _values_of(node: fx.Node) -> list[fx.Node]:
    """A node and the results that are taken out of it."""
    return [node, *(user for user in node.users if user.target is operator.getitem)]
