"""Minimizes a pairwise cost of any width: contraction, then message passing on the core.

Nodes with at most two neighbours are eliminated exactly (min-plus products; Bertele & Brioschi,
1972); in models these are nearly all. The few that remain, with their summed tables, are the core:
`messages.minimize_core` bounds it from below and nearly always finds its optimum.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.solver.messages import SWEEPS, Core, Messages, minimize_core

Pair = tuple[int, int, np.ndarray]

# entries of a table that stays in the cache
_CACHED = 65_536
# sums of a product in double precision; larger ones are in single precision, which rounds both
# operands and the sum, of which none is negative
_DOUBLE, _SINGLE_ERROR = 100_000, 4 * 2.0**-24


@dataclass
class _Step:
    """An eliminated node: its cost and its tables [node, neighbour] at that time."""

    node: int
    cost: np.ndarray
    neighbours: tuple[int, ...]
    tables: tuple[np.ndarray, ...]
    message: np.ndarray


class Contraction:
    """The minimum of a sum of unary and pairwise costs, and what follows from it.

    Args:
        unary: per node its cost vector; infinite where forbidden.
        pairs: (u, v, matrix) terms.
        messages: to start from, by pair of core nodes (u < v).
        disable: layers to switch off, to measure what they earn: "elimination", "messages".

    Attributes:
        bound: a lower bound on the minimum, equal to it where `cost` is.
        choices: an assignment, of cost `cost`; None if none of finite cost is known.
    """

    def __init__(
        self,
        unary: Sequence[np.ndarray],
        pairs: Sequence[Pair],
        messages: Messages | None = None,
        disable: frozenset[str] = frozenset(),
    ) -> None:
        self._unary = list(unary)
        self._tables: list[dict[int, np.ndarray]] = [{} for _ in unary]
        self._steps: list[_Step] = []
        for a, b, table in pairs:
            self._add(a, b, table)
        constant = 0.0 if "elimination" in disable else self._eliminate()
        eliminated = {s.node for s in self._steps}
        self._core_nodes = [v for v in range(len(unary)) if v not in eliminated]
        index = {v: i for i, v in enumerate(self._core_nodes)}
        core_pairs = [
            (index[a], index[b], table)
            for a in self._core_nodes
            for b, table in self._tables[a].items()
            if a < b
        ]
        known = {
            (index[a], index[b]): moved
            for (a, b), moved in (messages or {}).items()
            if a in index and b in index
        }
        core_unary, sweeps = [self._unary[v] for v in index], 0 if "messages" in disable else SWEEPS
        self._core: Core = minimize_core(core_unary, core_pairs, known, sweeps)
        self.bound = constant + self._core.bound
        self.cost = constant + self._core.cost
        self.choices = self._read_back()

    @property
    def messages(self) -> Messages:
        """Of the core, by pair of nodes."""
        nodes = self._core_nodes
        return {(nodes[i], nodes[j]): moved for (i, j), moved in self._core.messages.items()}

    def _add(self, a: int, b: int, table: np.ndarray) -> None:
        known = self._tables[a].get(b)
        total = table if known is None else known + table
        self._tables[a][b], self._tables[b][a] = total, total.T

    def _eliminate(self) -> float:
        """Eliminate nodes with at most two neighbours, cheapest first; returns the constant."""
        constant = 0.0
        heap = [(self._work(v), v) for v, tables in enumerate(self._tables) if len(tables) <= 2]
        heapq.heapify(heap)
        eliminated: set[int] = set()
        while heap:
            work, v = heapq.heappop(heap)
            if v in eliminated or work != self._work(v):
                continue
            eliminated.add(v)
            cost, around = self._unary[v], tuple(self._tables[v])
            tables = tuple(self._tables[v][w] for w in around)
            if not around:
                message = np.asarray(cost.min())
                constant += float(message)
            elif len(around) == 1:
                message = (cost[:, None] + tables[0]).min(axis=0)
                self._unary[around[0]] = self._unary[around[0]] + message
            else:
                message = _product(cost[:, None] + tables[0], tables[1])
                self._add(around[0], around[1], message)
            for w in around:
                del self._tables[w][v]
            for w in around:
                if len(self._tables[w]) <= 2:
                    heapq.heappush(heap, (self._work(w), w))
            self._tables[v] = {}
            self._steps.append(_Step(v, cost, around, tables, message))
        return constant

    def _work(self, v: int) -> float:
        size = float(len(self._unary[v]))
        for w in self._tables[v]:
            size *= len(self._unary[w])
        return size

    def _read_back(self) -> tuple[int, ...] | None:
        if self._core.choices is None or not np.isfinite(self.cost):
            return None
        choice = dict(zip(self._core_nodes, self._core.choices, strict=True))
        for step in reversed(self._steps):
            column = step.cost
            for w, table in zip(step.neighbours, step.tables, strict=True):
                column = column + table[:, choice[w]]
            choice[step.node] = int(np.argmin(column))
        return tuple(choice[v] for v in range(len(self._unary)))

    def min_marginals(self) -> list[np.ndarray]:
        """Per node and choice, a lower bound on every assignment that makes that choice: the least
        cost of any, if the core was solved exactly."""
        constant = self.bound - self._core.bound
        marginals: dict[int, np.ndarray] = {}
        pair: dict[tuple[int, int], np.ndarray] = {}
        for v, marginal in zip(self._core_nodes, self._core.marginals, strict=True):
            marginals[v] = marginal + constant
        for (i, j), table in self._core.pair_marginals.items():
            pair[self._core_nodes[i], self._core_nodes[j]] = table + constant

        needed = {frozenset(s.neighbours) for s in self._steps if len(s.neighbours) == 2}

        def pair_of(a: int, b: int) -> np.ndarray:
            return pair[a, b] if (a, b) in pair else pair[b, a].T

        for step in reversed(self._steps):
            if not step.neighbours:
                marginals[step.node] = step.cost + (self.bound - float(step.message))
                continue
            if len(step.neighbours) == 1:
                (a,) = step.neighbours
                rest_a = _without(marginals[a], step.message)
                both = step.cost[:, None] + step.tables[0] + rest_a[None, :]
                marginals[step.node] = both.min(axis=1)
                pair[step.node, a] = both
                continue
            a, b = step.neighbours
            if frozenset((step.node, a)) not in needed:  # one product is cheaper than two
                a, b = b, a
            to_a, to_b = (step.tables[step.neighbours.index(w)] for w in (a, b))
            rest = _without(pair_of(*step.neighbours), step.message)
            rest = rest if (a, b) == step.neighbours else rest.T
            cost = step.cost[:, None]
            with_a = _product(to_b.T, rest.T) + (cost + to_a)
            both = frozenset((step.node, b)) in needed
            marginals[step.node] = with_a.min(axis=1)
            pair[step.node, a] = with_a
            if both:
                pair[step.node, b] = _product(to_a.T, rest) + (cost + to_b)
        return [marginals[v] for v in range(len(self._unary))]


def _without(total: np.ndarray, part: np.ndarray) -> np.ndarray:
    """The difference, infinite where either is."""
    allowed = np.isfinite(total) & np.isfinite(part)
    return np.where(allowed, total - np.where(allowed, part, 0.0), np.inf)


def _product(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[i, j]: min over k of first[k, i] + second[k, j], in blocks of rows that fit the cache.

    A large product is computed in single precision and rounded down, so that it is a lower bound.
    """
    (terms, rows), columns = first.shape, second.shape[1]
    single, base = terms * rows * columns > _DOUBLE, 0.0
    if single:
        # from the minimum on: what is near it, and decides, is nearly exact
        base = sum(float(t.min()) for t in (first, second))
        if not np.isfinite(base):
            return np.full((rows, columns), np.inf)
        first, second = ((t - t.min()).astype(np.float32) for t in (first, second))
    second = np.ascontiguousarray(second)[:, None, :]
    product = np.empty((rows, columns), first.dtype)
    several = max(1, _CACHED // (terms * columns))
    for i in range(0, rows, several):
        part = first[:, i : i + several, None] + second
        part.min(axis=0, out=product[i : i + several])
    return base + (1 - _SINGLE_ERROR) * product.astype(float) if single else product
