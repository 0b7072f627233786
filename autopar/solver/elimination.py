"""Exact minimization by variable elimination (min-plus products; Bertele & Brioschi, 1972).

Eliminating a node replaces all costs that mention it by one table over its neighbours: the minimum
over its choices. Transformers and ResNets are series-parallel, so tables stay two-dimensional.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Pairs = Sequence[tuple[int, int, np.ndarray]]

MAX_ENTRIES = 4_000_000


class TooWide(Exception):
    """Elimination would need a table of more entries than allowed."""


def eliminate(
    unary: Sequence[np.ndarray], pairs: Pairs, *, largest: float = MAX_ENTRIES
) -> tuple[float, tuple[int, ...]]:
    """The minimum of a sum of unary and pairwise costs, and an assignment that reaches it.

    Args:
        unary: per node its cost vector.
        pairs: (u, v, matrix) terms.
        largest: entries of a table.

    Raises:
        TooWide: some table would be larger.
    """
    size = [len(u) for u in unary]
    order = _order(size, [(a, b) for a, b, _ in pairs], largest)
    rank = {v: k for k, (v, _) in enumerate(order)}
    # a factor waits for the first of its nodes to be eliminated
    waiting: list[list[tuple[tuple[int, ...], np.ndarray]]] = [
        [((v,), u)] for v, u in enumerate(unary)
    ]
    for a, b, table in pairs:
        waiting[min(a, b, key=rank.__getitem__)].append(((a, b), table))
    minimum = 0.0
    steps: list[tuple[tuple[int, ...], np.ndarray]] = []  # (node, *neighbours), their table
    for v, neighbours in order:
        scope = (v, *neighbours)
        total = np.zeros([size[w] for w in scope])
        for nodes, values in waiting[v]:
            total += _broadcast(values, nodes, scope)
        steps.append((scope, total))
        message = total.min(axis=0)
        if neighbours:
            waiting[min(neighbours, key=rank.__getitem__)].append((neighbours, message))
        else:
            minimum += float(message)
    choice: dict[int, int] = {}
    for scope, column in reversed(steps):
        for w in reversed(scope[1:]):
            column = column[..., choice[w]]
        choice[scope[0]] = int(np.argmin(column))
    return minimum, tuple(choice[v] for v in range(len(size)))


def _broadcast(table: np.ndarray, nodes: Sequence[int], scope: Sequence[int]) -> np.ndarray:
    """A table over `nodes`, with an axis for each node of `scope`."""
    order = sorted(range(len(nodes)), key=lambda i: scope.index(nodes[i]))
    shape = [1] * len(scope)
    for i in order:
        shape[scope.index(nodes[i])] = table.shape[i]
    return table.transpose(order).reshape(shape)


def _order(
    size: Sequence[int], pairs: Sequence[tuple[int, int]], largest: float
) -> list[tuple[int, tuple[int, ...]]]:
    """Nodes in the order of elimination, smallest table first, with their neighbours at that time.

    Raises:
        TooWide: before any table is made.
    """
    neighbours: list[set[int]] = [set() for _ in size]
    for a, b in pairs:
        neighbours[a].add(b)
        neighbours[b].add(a)
    entries = [math.prod(size[w] for w in near) for near in neighbours]
    remaining, order = set(range(len(size))), []
    while remaining:
        v = min(remaining, key=lambda n: (entries[n], n))
        near = neighbours[v]
        if entries[v] * size[v] > largest:
            raise TooWide(f"{len(near)} neighbours of a node need {entries[v] * size[v]} entries")
        order.append((v, tuple(sorted(near))))
        remaining.remove(v)
        for w in near:
            neighbours[w] |= near
            neighbours[w] -= {v, w}
        for w in near:
            entries[w] = math.prod(size[u] for u in neighbours[w])
    return order
