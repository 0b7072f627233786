"""Exact minimization by variable elimination (min-plus products; Bertele & Brioschi, 1972).

Eliminating a node replaces all costs that mention it by one table over its neighbours: the minimum
over its choices. Transformers and ResNets are series-parallel, so tables stay two-dimensional.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Pairs = Sequence[tuple[int, int, np.ndarray]]

MAX_ENTRIES = 30_000_000


@dataclass
class _Bucket:
    """One eliminated node: its table over (node, *scope), and where the minimum over it went."""

    node: int
    scope: tuple[int, ...]
    table: np.ndarray
    parent: int = -1


class TooWide(Exception):
    """Elimination would need a table larger than `MAX_ENTRIES`."""


def _expand(table: np.ndarray, over: Sequence[int], scope: Sequence[int]) -> np.ndarray:
    """`table` over nodes `over`, broadcast to the axes of `scope`."""
    order = sorted(range(len(over)), key=lambda i: scope.index(over[i]))
    shape = [1] * len(scope)
    for i in order:
        shape[scope.index(over[i])] = table.shape[i]
    return table.transpose(order).reshape(shape)


class Elimination:
    """Eliminates all nodes of a pairwise problem once; answers what follows from it.

    Args:
        unary: per node its cost vector.
        pairs: (u, v, matrix) terms.

    Raises:
        TooWide: some table would exceed `MAX_ENTRIES`.
    """

    def __init__(self, unary: Sequence[np.ndarray], pairs: Pairs) -> None:
        count = len(unary)
        size = [len(u) for u in unary]
        factors: list[tuple[tuple[int, ...], np.ndarray, int]] = [
            ((v,), u, -1) for v, u in enumerate(unary)
        ] + [((a, b), m, -1) for a, b, m in pairs]
        touching: list[set[int]] = [set() for _ in range(count)]
        for i, (scope, _, _) in enumerate(factors):
            for v in scope:
                touching[v].add(i)
        self.buckets: list[_Bucket] = []
        self.constant = 0.0
        self._size = size
        left = set(range(count))

        def scope_of(v: int) -> set[int]:
            return {w for i in touching[v] for w in factors[i][0]} - {v}

        scopes = {v: scope_of(v) for v in left}
        while left:
            v = min(left, key=lambda n: (np.prod([float(size[w]) for w in scopes[n]]), n))
            scope = (v, *sorted(scopes[v]))
            shape = [size[w] for w in scope]
            if np.prod(shape, dtype=np.float64) > MAX_ENTRIES:
                raise TooWide(f"a table over {len(scope)} nodes needs {shape} entries")
            table = np.zeros(shape)
            for i in touching[v]:
                over, values, child = factors[i]
                table += _expand(values, over, scope)
                if child >= 0:
                    self.buckets[child].parent = len(self.buckets)
            for i in list(touching[v]):
                for w in factors[i][0]:
                    touching[w].discard(i)
            self.buckets.append(_Bucket(v, scope[1:], table))
            message = table.min(axis=0)
            if scope[1:]:
                factors.append((scope[1:], message, len(self.buckets) - 1))
                for w in scope[1:]:
                    touching[w].add(len(factors) - 1)
            else:
                self.constant += float(message)
            left.remove(v)
            for w in scope[1:]:
                scopes[w] = scope_of(w)

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

    def min_marginals(self) -> list[np.ndarray]:
        """Per node and choice, the minimum over all assignments that make that choice."""
        outside: list[np.ndarray] = [np.zeros(())] * len(self.buckets)
        found: list[np.ndarray] = [np.zeros(0)] * len(self._size)
        for k in reversed(range(len(self.buckets))):
            bucket = self.buckets[k]
            belief = bucket.table + outside[k][None]
            axes = tuple(range(1, belief.ndim))
            rest = self.constant - float(belief.min())
            found[bucket.node] = belief.min(axis=axes) + rest
            scope = (bucket.node, *bucket.scope)
            for c, child in enumerate(self.buckets[:k]):
                if child.parent == k:
                    message = _expand(child.table.min(axis=0), child.scope, scope)
                    away = tuple(i for i, w in enumerate(scope) if w not in child.scope)
                    with np.errstate(invalid="ignore"):
                        context = np.where(np.isinf(belief), np.inf, belief - message)
                    kept = [w for w in scope if w in child.scope]
                    outside[c] = _expand(context.min(axis=away), kept, child.scope)
        return found
