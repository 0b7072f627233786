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
        count = len(unary)
        size = [len(u) for u in unary]
        factors: list[tuple[tuple[int, ...], np.ndarray]] = [
            ((v,), u) for v, u in enumerate(unary)
        ] + [((a, b), m) for a, b, m in pairs]
        touching: list[set[int]] = [set() for _ in range(count)]
        for i, (scope, _) in enumerate(factors):
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
            v = min(left, key=lambda n: (math.prod(size[w] for w in scopes[n]), n))
            scope = (v, *sorted(scopes[v]))
            shape = [size[w] for w in scope]
            if math.prod(shape) > largest:
                raise TooWide(f"a table over {len(scope)} nodes needs {shape} entries")
            table = np.zeros(shape)
            for i in touching[v]:
                over, values = factors[i]
                table += _expand(values, over, scope)
            for i in list(touching[v]):
                for w in factors[i][0]:
                    touching[w].discard(i)
            self.buckets.append(_Bucket(v, scope[1:], table))
            message = table.min(axis=0)
            if scope[1:]:
                factors.append((scope[1:], message))
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
