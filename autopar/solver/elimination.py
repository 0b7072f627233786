"""Exact minimization by variable elimination (min-plus products; Bertele & Brioschi, 1972).

Eliminating a node replaces all costs that mention it by one table over its neighbours: the minimum
over its choices. Transformers and ResNets are series-parallel, so tables stay two-dimensional.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Pairs = Sequence[tuple[int, int, np.ndarray]]

MAX_ENTRIES = 4_000_000


@dataclass
class _Bucket:
    """One eliminated node and its table over (node, *scope)."""

    node: int
    scope: tuple[int, ...]
    table: np.ndarray


class TooWide(Exception):
    """Elimination would need a table larger than it may be."""


def _expand(table: np.ndarray, over: Sequence[int], scope: Sequence[int]) -> np.ndarray:
    """`table` over nodes `over`, broadcast to the axes of `scope`."""
    order = sorted(range(len(over)), key=lambda i: scope.index(over[i]))
    shape = [1] * len(scope)
    for i in order:
        shape[scope.index(over[i])] = table.shape[i]
    return table.transpose(order).reshape(shape)


def _order(
    size: Sequence[int], pairs: Sequence[tuple[int, int]], largest: float
) -> list[tuple[int, tuple[int, ...]]]:
    """Nodes, smallest table next, each with the neighbours that it has when it goes.

    Raises:
        TooWide: before any table is made.
    """
    around: list[set[int]] = [set() for _ in size]
    for a, b in pairs:
        around[a].add(b)
        around[b].add(a)
    entries = [math.prod(size[w] for w in near) for near in around]
    left, order = set(range(len(size))), []
    while left:
        v = min(left, key=lambda n: (entries[n], n))
        if entries[v] * size[v] > largest:
            raise TooWide(f"{len(around[v])} nodes beside one need {entries[v] * size[v]} entries")
        near = around[v]
        order.append((v, tuple(sorted(near))))
        left.remove(v)
        for w in near:
            around[w] |= near
            around[w] -= {v, w}
        for w in near:
            entries[w] = math.prod(size[u] for u in around[w])
    return order


class Elimination:
    """Eliminates all nodes of a pairwise problem once; answers what follows from it.

    Args:
        unary: per node its cost vector.
        pairs: (u, v, matrix) terms.
        largest: entries of a table.

    Raises:
        TooWide: some table would be larger.
    """

    def __init__(
        self, unary: Sequence[np.ndarray], pairs: Pairs, *, largest: float = MAX_ENTRIES
    ) -> None:
        size = [len(u) for u in unary]
        order = _order(size, [(a, b) for a, b, _ in pairs], largest)
        rank = {v: k for k, (v, _) in enumerate(order)}
        # a factor waits for the first of its nodes to be eliminated
        waiting: list[list[tuple[tuple[int, ...], np.ndarray]]] = [
            [((v,), u)] for v, u in enumerate(unary)
        ]
        for a, b, table in pairs:
            waiting[min(a, b, key=rank.__getitem__)].append(((a, b), table))
        self.buckets: list[_Bucket] = []
        self.constant = 0.0
        self._size = size
        for v, around in order:
            scope = (v, *around)
            total = np.zeros([size[w] for w in scope])
            for over, values in waiting[v]:
                total += _expand(values, over, scope)
            self.buckets.append(_Bucket(v, around, total))
            message = total.min(axis=0)
            if around:
                waiting[min(around, key=rank.__getitem__)].append((around, message))
            else:
                self.constant += float(message)

    @property
    def minimum(self) -> float:
        return self.constant

    def argmin(self) -> tuple[int, ...]:
        """A minimizing assignment, by going back over the tables."""
        choice: dict[int, int] = {}
        for bucket in reversed(self.buckets):
            column = bucket.table
            for w in reversed(bucket.scope):
                column = column[..., choice[w]]
            choice[bucket.node] = int(np.argmin(column))
        return tuple(choice[v] for v in range(len(self._size)))
