"""Lower and upper bounds on a pairwise cost: message passing by dual block-coordinate ascent.

Costs are moved between nodes and pairs without changing the cost of any assignment, so that the sum
of the parts' minima, a lower bound, never falls (the "handshake" of MPLP++: Tourani, Shekhovtsov,
Rother, Savchynskyy, ECCV 2018). Choices whose bound exceeds a known assignment are dropped; the
rest is mostly small enough to be solved exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autopar.solver.elimination import MAX_ENTRIES, TooWide, eliminate

Pair = tuple[int, int, np.ndarray]
# Per pair (u, v) the cost that was moved from it to u and to v, by choice.
Messages = Mapping[tuple[int, int], tuple[np.ndarray, np.ndarray]]

SWEEPS = 160
# Assignments are searched among this many of the best choices of each node, in tables of at most
# this many entries.
_TRIED, _TRIED_ENTRIES = (12, 6, 3, 1), 50_000


@dataclass(frozen=True)
class Core:
    """Bounds on the least cost.

    Args:
        bound: no assignment costs less.
        cost, choices: of the best known assignment; infinite and None without one.
        marginals: per node and choice, a lower bound on the assignments that make it.
        pair_marginals: the same per pair of choices, for every pair with a table.
        messages: that reached the bound.
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
        messages: to start from, such as those of similar costs; any give a valid bound.
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
        for table in tables[:: 1 if sweep % 2 else -1] if sweep else ():
            table.handshake(nodes)
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
            # the restricted problem had every assignment that costs less than `best_cost`
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
    """The cost of a pair of nodes, and the part of it that was moved to either. They are stored
    separately, so that the table [choices of a, choices of b] is never written."""

    def __init__(self, a: int, b: int, cost: np.ndarray) -> None:
        self.a, self.b, self.cost = a, b, cost
        self.to_a, self.to_b = np.zeros(cost.shape[0]), np.zeros(cost.shape[1])
        self._work = np.empty_like(cost)

    def begin(self, nodes: list[np.ndarray], moved: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Apply messages of an earlier run."""
        if moved is None or (len(moved[0]), len(moved[1])) != self.cost.shape:
            return
        self.to_a, self.to_b = moved
        nodes[self.a] = nodes[self.a] + self.to_a
        nodes[self.b] = nodes[self.b] + self.to_b

    def handshake(self, nodes: list[np.ndarray]) -> None:
        """Move all cost to the pair, half of it back to one node, as much as possible to the other,
        and the rest to the first."""
        rest_a, rest_b = nodes[self.a] - self.to_a, nodes[self.b] - self.to_b
        half = 0.5 * (self._over_b(rest_b) + rest_a)
        np.add(self.cost, (rest_a - half)[:, None], out=self._work)
        to_b = self._work.min(axis=0) + rest_b
        to_a = self._over_b(rest_b - to_b) + rest_a
        nodes[self.a], nodes[self.b] = to_a, to_b
        self.to_a, self.to_b = to_a - rest_a, to_b - rest_b

    def remaining(self) -> np.ndarray:
        """The cost that was not moved; overwritten by the next call."""
        np.subtract(self.cost, self.to_a[:, None], out=self._work)
        return np.subtract(self._work, self.to_b[None, :], out=self._work)

    def _over_b(self, costs: np.ndarray) -> np.ndarray:
        np.add(self.cost, costs[None, :], out=self._work)
        return self._work.min(axis=1)


def _bound(nodes: Sequence[np.ndarray], tables: Sequence[_Table]) -> float:
    return float(sum(n.min() for n in nodes) + sum(t.remaining().min() for t in tables))


def _marginals(
    nodes: Sequence[np.ndarray], tables: Sequence[_Table], bound: float
) -> tuple[np.ndarray, ...]:
    marginals = [bound + n - n.min() for n in nodes]
    for table in tables:
        remaining = table.remaining()
        least = remaining.min(axis=1)
        marginals[table.a] = marginals[table.a] + least - least.min()
        least = remaining.min(axis=0)
        marginals[table.b] = marginals[table.b] + least - least.min()
    return tuple(marginals)


def _pair_marginals(
    nodes: Sequence[np.ndarray], tables: Sequence[_Table], bound: float
) -> dict[tuple[int, int], np.ndarray]:
    over = [n - n.min() for n in nodes]
    marginals = {}
    for table in tables:
        a, b, cost = table.a, table.b, table.remaining()
        marginals[a, b] = cost + (bound - cost.min() + over[a])[:, None] + over[b][None, :]
    return marginals


def _among_best(
    unary: Sequence[np.ndarray], pairs: Sequence[Pair], nodes: Sequence[np.ndarray]
) -> tuple[float, tuple[int, ...] | None]:
    """The best assignment among the cheapest choices of each node."""
    ranked = [np.argsort(n, kind="stable") for n in nodes]
    for count in _TRIED:
        domains = [np.sort(r[:count]) for r in ranked]
        try:
            cost, choices = _restricted(unary, pairs, domains, _TRIED_ENTRIES)
        except TooWide:
            continue
        if np.isfinite(cost):
            return cost, choices
    return np.inf, None


def _exactly(
    unary: Sequence[np.ndarray],
    pairs: Sequence[Pair],
    marginals: Sequence[np.ndarray],
    best_cost: float,
) -> tuple[float, tuple[int, ...] | None] | None:
    """The optimum over all choices that a better assignment may contain; None if tables get too
    large."""
    if not np.isfinite(best_cost):
        return None
    limit = best_cost + 1e-9 * max(1.0, abs(best_cost))
    domains = [np.flatnonzero(m <= limit) for m in marginals]
    if any(not len(d) for d in domains):
        return best_cost, None
    try:
        return _restricted(unary, pairs, domains, MAX_ENTRIES)
    except TooWide:
        return None


def _restricted(
    unary: Sequence[np.ndarray],
    pairs: Sequence[Pair],
    domains: Sequence[np.ndarray],
    largest: float,
) -> tuple[float, tuple[int, ...] | None]:
    """The optimum over the choices in `domains` (indices)."""
    minimum, choices = eliminate(
        [u[d] for u, d in zip(unary, domains, strict=True)],
        [(a, b, p[np.ix_(domains[a], domains[b])]) for a, b, p in pairs],
        largest=largest,
    )
    if not np.isfinite(minimum):
        return np.inf, None
    return minimum, tuple(int(d[c]) for d, c in zip(domains, choices, strict=True))
