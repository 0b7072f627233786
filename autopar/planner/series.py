"""Linear expressions in the choices of a plan, at every program point."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Item:
    """One cost and when it counts.

    Args:
        first, last: program points, both included.
        decisions: the decision, or source and target of an edge.
        index: of the decision, or of the edge.
        values: [candidates], or [source candidates, target candidates].
        values_class: items with equal classes have equal values.
        kind: "parameters", "activations", ...
    """

    first: int
    last: int
    decisions: tuple[int, ...]
    index: int
    values: np.ndarray
    values_class: Hashable
    kind: str

    @property
    def is_edge(self) -> bool:
        return len(self.decisions) == 2


class Series:
    """The same expression at every one of `count` program points; the rows have its name with the
    point behind it, its slack and its limit."""

    def __init__(
        self, name: str, slack: str, limit: float, items: Sequence[Item], count: int
    ) -> None:
        self.name, self.slack, self.limit, self.count = name, slack, limit, count
        self.items = [item for item in items if item.first <= item.last and item.values.any()]
        # the values of all items in one array, each class once
        begins: dict[Hashable, int] = {}
        parts: list[np.ndarray] = [np.zeros(0)]
        rows, end = [], 0
        for item in self.items:
            if item.values_class not in begins:
                begins[item.values_class] = end
                parts.append(item.values.ravel())
                end += item.values.size
            source, target = item.decisions[0], item.decisions[-1]
            width = item.values.shape[1] if item.is_edge else 1
            begin = begins[item.values_class]
            rows.append((item.first, item.last, begin, source, width, target, item.is_edge))
        self._flat = np.concatenate(parts)
        self._first, self._last, *self._address = np.array(rows, dtype=np.int64).reshape(-1, 7).T

    def values(self, choices: Sequence[int]) -> np.ndarray:
        """The expression at every program point, [count]."""
        chosen = np.asarray(choices)
        begin, source, width, target, is_edge = self._address
        value = self._flat[begin + chosen[source] * width + chosen[target] * is_edge]
        steps = np.bincount(self._first, value, self.count + 1)
        steps -= np.bincount(self._last + 1, value, self.count + 1)
        return np.cumsum(steps, dtype=float)[:-1]  # bincount of nothing counts in integers

    def breakdown(
        self, choices: Sequence[int], point: int, label: Callable[[Item], str]
    ) -> dict[str, float]:
        """The expression at one program point, by a label of its items."""
        sums: dict[str, float] = defaultdict(float)
        for item in self.items:
            if item.first <= point <= item.last:
                sums[label(item)] += float(item.values[tuple(choices[i] for i in item.decisions)])
        return sums

    def alive(self, point: int) -> np.ndarray:
        """Which of the items count at a program point, [items]."""
        return (self._first <= point) & (point <= self._last)
