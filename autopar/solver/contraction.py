"""The least of a pairwise cost, of any width: contraction, then message passing on what is left.

Nodes with one or two neighbours are eliminated exactly (min-plus products; Bertele & Brioschi,
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


@dataclass
class _Step:
    """An eliminated node, its cost when it went, and its tables [node, neighbour]."""

    node: int
    cost: np.ndarray
    neighbours: tuple[int, ...]
    tables: tuple[np.ndarray, ...]
    message: np.ndarray


class Contraction:
    """Minimizes sum of unary and pairwise costs once; answers what follows from it.

    Args:
        unary: per node its cost vector; infinite where forbidden.
        pairs: (u, v, matrix) terms.
        messages: of a core to begin from, by its nodes, u < v.

    Attributes:
        bound: a lower bound on the minimum, equal to it where `exact`.
        choices: an assignment, of cost `cost`; None if none of finite cost was found.
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
        gone = {s.node for s in self._steps}
        self._left = [v for v in range(len(unary)) if v not in gone]
        index = {v: i for i, v in enumerate(self._left)}
        self._core: Core = minimize_core(
            [self._unary[v] for v in self._left],
            [
                (index[a], index[b], table)
                for a in self._left
                for b, table in self._tables[a].items()
                if a < b
            ],
            {
                (index[a], index[b]): moved
                for (a, b), moved in (messages or {}).items()
                if a in index and b in index
            },
            0 if "messages" in disable else SWEEPS,
        )
        self.bound = constant + self._core.bound
        self.cost = constant + self._core.cost
        self.choices = self._read_back()

    @property
    def messages(self) -> Messages:
        """Of the core, by its nodes."""
        left = self._left
        return {(left[i], left[j]): moved for (i, j), moved in self._core.messages.items()}

    @property
    def core_size(self) -> int:
        """How many nodes could not be eliminated."""
        return len(self._left)

    @property
    def exact(self) -> bool:
        return self.cost <= self.bound + 1e-9 * max(1.0, abs(self.bound))

    def _add(self, a: int, b: int, table: np.ndarray) -> None:
        known = self._tables[a].get(b)
        total = table if known is None else known + table
        self._tables[a][b], self._tables[b][a] = total, total.T

    def _eliminate(self) -> float:
        """Eliminate while a node has at most two neighbours; the constant that this gives."""
        constant = 0.0
        narrow = [v for v, tables in enumerate(self._tables) if len(tables) <= 2]
        heap = [(self._work(v), v) for v in narrow]
        heapq.heapify(heap)
        gone: set[int] = set()
        while heap:
            work, v = heapq.heappop(heap)
            if v in gone or work != self._work(v):
                continue
            gone.add(v)
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
        choice = dict(zip(self._left, self._core.choices, strict=True))
        for step in reversed(self._steps):
            column = step.cost
            for w, table in zip(step.neighbours, step.tables, strict=True):
                column = column + table[:, choice[w]]
            choice[step.node] = int(np.argmin(column))
        return tuple(choice[v] for v in range(len(self._unary)))

    def min_marginals(self) -> list[np.ndarray]:
        """Per node and choice, a lower bound on every assignment that makes that choice (the least
        cost of any, if the core was solved exactly)."""
        constant = self.bound - self._core.bound
        found: dict[int, np.ndarray] = {}
        pair: dict[tuple[int, int], np.ndarray] = {}
        for v, marginal in zip(self._left, self._core.marginals, strict=True):
            found[v] = marginal + constant
        for (i, j), table in self._core.pair_marginals.items():
            pair[self._left[i], self._left[j]] = table + constant

        needed = {frozenset(s.neighbours) for s in self._steps if len(s.neighbours) == 2}

        def pair_of(a: int, b: int) -> np.ndarray:
            return pair[a, b] if (a, b) in pair else pair[b, a].T

        for step in reversed(self._steps):
            if not step.neighbours:
                found[step.node] = step.cost + (self.bound - float(step.message))
                continue
            if len(step.neighbours) == 1:
                (a,) = step.neighbours
                rest_a = _without(found[a], step.message)
                both = step.cost[:, None] + step.tables[0] + rest_a[None, :]
                found[step.node] = both.min(axis=1)
                pair[step.node, a] = both
                continue
            a, b = step.neighbours
            if frozenset((step.node, a)) not in needed:  # what only one pair is asked of costs less
                a, b = b, a
            to_a, to_b = (step.tables[step.neighbours.index(w)] for w in (a, b))
            rest = _without(pair_of(*step.neighbours), step.message)
            rest = rest if (a, b) == step.neighbours else rest.T
            cost = step.cost[:, None]
            with_a = _product(to_b.T, rest.T) + (cost + to_a)
            both = frozenset((step.node, b)) in needed
            found[step.node] = with_a.min(axis=1)
            pair[step.node, a] = with_a
            if both:
                pair[step.node, b] = _product(to_a.T, rest) + (cost + to_b)
        return [found[v] for v in range(len(self._unary))]


def _without(whole: np.ndarray, part: np.ndarray) -> np.ndarray:
    """The difference, infinite where either is: a bound may be finite where nothing is allowed."""
    allowed = np.isfinite(whole) & np.isfinite(part)
    return np.where(allowed, whole - np.where(allowed, part, 0.0), np.inf)


def _product(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[i, j]: min over k of first[k, i] + second[k, j]. As many rows at a time as stay in the
    cache."""
    (terms, rows), columns = first.shape, second.shape[1]
    second = np.ascontiguousarray(second)[:, None, :]
    found = np.empty((rows, columns))
    several = max(1, _CACHED // (terms * columns))
    for i in range(0, rows, several):
        part = first[:, i : i + several, None] + second
        part.min(axis=0, out=found[i : i + several])
    return found
