"""Lower and upper bounds on a pairwise cost by dual block-coordinate ascent.

Costs are moved between nodes and pairs without changing the cost of any assignment, so that the sum
of the parts' minima, a lower bound, never falls (the "handshake" of MPLP++: Tourani, Shekhovtsov,
Rother, Savchynskyy, ECCV 2018). Choices whose bound exceeds a known assignment go; what is left is
mostly small enough to be solved exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autopar.solver.elimination import MAX_ENTRIES, Elimination, TooWide

Pair = tuple[int, int, np.ndarray]
# Per pair (u, v) what of its cost was moved to u and to v, by choice.
Messages = Mapping[tuple[int, int], tuple[np.ndarray, np.ndarray]]

SWEEPS = 160
# Assignments are looked for among so many of the best choices of each node, in tables of so many
# entries.
_TRIED, _TRIED_ENTRIES = (12, 6, 3, 1), 50_000


@dataclass(frozen=True)
class Core:
    """What is known of the least cost.

    Args:
        bound: no assignment costs less.
        cost, choices: of the best assignment found; infinite and None if there was none.
        marginals: per node and choice, a lower bound on assignments that make it.
        pair_marginals: the same per pair of choices, for every pair with a table.
        messages: with which the bound was reached.
    """

    bound: float
    cost: float
    choices: tuple[int, ...] | None
    marginals: tuple[np.ndarray, ...]
    pair_marginals: Mapping[tuple[int, int], np.ndarray]
    messages: Messages


def minimize_core(
    unary: Sequence[np.ndarray],
    pairs: Sequence[Pair],
    messages: Messages | None = None,
    sweeps: int = SWEEPS,
) -> Core:
    """Bounds on min over x of sum_v unary_v[x_v] + sum_(u,v) pair[x_u, x_v].

    Args:
        unary: per node its costs, infinite where forbidden.
        pairs: (u, v, [choices of u, choices of v]), at most one per pair of nodes.
        messages: to begin from, such as those of nearly the same costs; any give a bound.
        sweeps: over all pairs, at most; with 0 no cost is moved.
    """
    if not unary:
        return Core(0.0, 0.0, (), (), {}, {})
    # no assignment of finite cost reaches the value that stands for "forbidden"
    spread = sum(_spread(c) for c in (*unary, *(p for _, _, p in pairs)))
    forbidden = 4.0 * spread + 1.0
    nodes = [_without_infinity(u, forbidden) for u in unary]
    tables = [_Table(a, b, _without_infinity(p, forbidden)) for a, b, p in pairs]
    for table in tables:
        table.begin(nodes, (messages or {}).get((table.a, table.b)))
    best_cost, best = np.inf, None
    bound = -np.inf
    for sweep in range(min(1, sweeps), sweeps + 1):
        if sweep:
            _sweep(nodes, tables if sweep % 2 else tables[::-1])
        if sweep not in (1, 2, 4, 8) and sweep % 16:
            continue
        before, bound = bound, _bound(nodes, tables)
        cost, choices = _among_best(unary, pairs, nodes)
        if cost < best_cost:
            best_cost, best = cost, choices
        tolerance = 1e-9 * max(1.0, abs(bound))
        if best_cost - bound <= tolerance:
            break
        solved = _exactly(unary, pairs, _marginals(nodes, tables, bound), best_cost)
        if solved is not None:
            if solved[0] < best_cost:
                best_cost, best = solved
            # every assignment that costs less than `best_cost` was among those looked at
            bound = max(bound, min(best_cost, solved[0]))
            break
        if sweep > 32 and bound - before <= 1e-6 * max(1.0, abs(bound)):
            break
    sum_of_minima = _bound(nodes, tables)
    return Core(
        min(bound, best_cost), float(best_cost), best,
        _marginals(nodes, tables, sum_of_minima),
        _pair_marginals(nodes, tables, sum_of_minima),
        {(t.a, t.b): (t.to_a, t.to_b) for t in tables},
    )  # fmt: skip


def _spread(costs: np.ndarray) -> float:
    finite = costs[np.isfinite(costs)]
    return float(finite.max() - finite.min()) + abs(float(finite.min())) if finite.size else 0.0


def _without_infinity(costs: np.ndarray, forbidden: float) -> np.ndarray:
    return np.where(np.isfinite(costs), costs, forbidden)


class _Table:
    """The cost of a pair of nodes, and what of it was moved to either; both stay apart, so that
    the table is only read.

    Args:
        a, b: the nodes.
        cost: [choices of a, choices of b].
    """

    def __init__(self, a: int, b: int, cost: np.ndarray) -> None:
        self.a, self.b, self.cost = a, b, cost
        self.to_a, self.to_b = np.zeros(cost.shape[0]), np.zeros(cost.shape[1])
        self._work = np.empty_like(cost)

    def begin(self, nodes: list[np.ndarray], moved: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Move what was moved before."""
        if moved is None or (len(moved[0]), len(moved[1])) != self.cost.shape:
            return
        self.to_a, self.to_b = moved
        nodes[self.a] = nodes[self.a] + self.to_a
        nodes[self.b] = nodes[self.b] + self.to_b

    def handshake(self, nodes: list[np.ndarray]) -> None:
        """All cost to the pair, half of it back to one node, then all that can go to the other,
        then the rest to the first."""
        rest_a, rest_b = nodes[self.a] - self.to_a, nodes[self.b] - self.to_b
        half = 0.5 * (self._over_b(rest_b) + rest_a)
        np.add(self.cost, (rest_a - half)[:, None], out=self._work)
        to_b = self._work.min(axis=0) + rest_b
        to_a = self._over_b(rest_b - to_b) + rest_a
        nodes[self.a], nodes[self.b] = to_a, to_b
        self.to_a, self.to_b = to_a - rest_a, to_b - rest_b

    def left(self) -> np.ndarray:
        """The cost that was not moved; valid until the next call."""
        np.subtract(self.cost, self.to_a[:, None], out=self._work)
        return np.subtract(self._work, self.to_b[None, :], out=self._work)

    def _over_b(self, costs: np.ndarray) -> np.ndarray:
        np.add(self.cost, costs[None, :], out=self._work)
        return self._work.min(axis=1)


def _sweep(nodes: list[np.ndarray], tables: Sequence[_Table]) -> None:
    for table in tables:
        table.handshake(nodes)


def _bound(nodes: Sequence[np.ndarray], tables: Sequence[_Table]) -> float:
    return float(sum(n.min() for n in nodes) + sum(t.left().min() for t in tables))


def _marginals(
    nodes: Sequence[np.ndarray], tables: Sequence[_Table], bound: float
) -> tuple[np.ndarray, ...]:
    found = [bound + n - n.min() for n in nodes]
    for table in tables:
        left = table.left()
        least = left.min(axis=1)
        found[table.a] = found[table.a] + least - least.min()
        least = left.min(axis=0)
        found[table.b] = found[table.b] + least - least.min()
    return tuple(found)


def _pair_marginals(
    nodes: Sequence[np.ndarray], tables: Sequence[_Table], bound: float
) -> dict[tuple[int, int], np.ndarray]:
    over = [n - n.min() for n in nodes]
    found = {}
    for table in tables:
        a, b, left = table.a, table.b, table.left()
        found[a, b] = left + (bound - left.min() + over[a])[:, None] + over[b][None, :]
    return found


def _among_best(
    unary: Sequence[np.ndarray], pairs: Sequence[Pair], nodes: Sequence[np.ndarray]
) -> tuple[float, tuple[int, ...] | None]:
    """The best assignment among the choices that the nodes' own costs favour."""
    ranked = [np.argsort(n, kind="stable") for n in nodes]
    for count in _TRIED:
        kept = [np.sort(r[:count]) for r in ranked]
        try:
            found = _restricted(unary, pairs, kept, _TRIED_ENTRIES)
        except TooWide:
            continue
        if np.isfinite(found[0]):
            return found
    return np.inf, None


def _exactly(
    unary: Sequence[np.ndarray],
    pairs: Sequence[Pair],
    marginals: Sequence[np.ndarray],
    best_cost: float,
) -> tuple[float, tuple[int, ...] | None] | None:
    """The optimum among all choices that can be part of a better assignment; None if too wide."""
    if not np.isfinite(best_cost):
        return None
    kept = [np.flatnonzero(m <= best_cost + 1e-9 * max(1.0, abs(best_cost))) for m in marginals]
    if any(not len(k) for k in kept):
        return best_cost, None
    try:
        return _restricted(unary, pairs, kept, MAX_ENTRIES)
    except TooWide:
        return None


def _restricted(
    unary: Sequence[np.ndarray],
    pairs: Sequence[Pair],
    kept: Sequence[np.ndarray],
    largest: float,
) -> tuple[float, tuple[int, ...] | None]:
    found = Elimination(
        [u[k] for u, k in zip(unary, kept, strict=True)],
        [(a, b, p[np.ix_(kept[a], kept[b])]) for a, b, p in pairs],
        largest=largest,
    )
    if not np.isfinite(found.minimum):
        return np.inf, None
    return found.minimum, tuple(int(k[c]) for k, c in zip(kept, found.argmin(), strict=True))
