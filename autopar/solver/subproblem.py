"""A part of the assignments in branch and bound, with its Lagrangian lower bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from autopar.solver.contraction import Contraction
from autopar.solver.cutting_planes import CutPool, CuttingPlane
from autopar.solver.messages import Messages
from autopar.solver.problem import Choices, Row

# Assignments whose choices a restricted MIP gets, at most.
NEAR = 16


class Subproblem:
    """All assignments with choices in `domains`, and a lower bound on them.

    Args:
        pool: shared by all subproblems.
        domains: per node its remaining choices (indices).
        parent: the subproblem that this one is a part of.

    Attributes:
        bound: no assignment of the subproblem is faster.
        prices: by row name, at which the bound was reached.
        dropped: no assignment that fixing dropped on the way here is faster than this.
        decided: per node that was branched on, its choices on this side (indices).
        fixed_at: the bound by which choices were dropped last.
    """

    def __init__(
        self, pool: CutPool, domains: Sequence[np.ndarray], parent: Subproblem | None = None
    ) -> None:
        self.pool, self.domains = pool, list(domains)
        self.bound, self.dropped, self.fixed_at = -math.inf, math.inf, -math.inf
        self.prices: dict[str, float] = {}
        self.decided: dict[int, np.ndarray] = {}
        self._messages: Messages = {}
        if parent is not None:
            self.bound, self.dropped, self.fixed_at = parent.bound, parent.dropped, parent.fixed_at
            self.prices, self.decided = dict(parent.prices), parent.decided
            self._messages = parent.messages_within(domains)
        self._tightest: tuple[Contraction, float] | None = None  # at `prices`
        self._sets = [set(map(int, d)) for d in domains]
        self._times = [t[d] for t, d in zip(pool.problem.time_us, domains, strict=True)]
        self._pairs = [
            (e.source, e.target, self._select(e.time_us, e.source, e.target))
            for e in pool.problem.edges
        ]
        self._rows: dict[str, tuple[dict[int, np.ndarray], dict[int, np.ndarray]]] = {}

    def messages_within(self, domains: Sequence[np.ndarray]) -> Messages:
        """The messages of the core, over fewer choices."""
        at = list(map(np.searchsorted, self.domains, domains))
        return {
            (a, b): (to_a[at[a]], to_b[at[b]]) for (a, b), (to_a, to_b) in self._messages.items()
        }

    def _select(self, table: np.ndarray, a: int, b: int) -> np.ndarray:
        rows, columns = self.domains[a], self.domains[b]
        if table.shape == (len(rows), len(columns)):
            return table
        return table[np.ix_(rows, columns)]

    def _row(self, row: Row) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """Its terms over the remaining choices."""
        if row.name not in self._rows:
            self._rows[row.name] = (
                {v: terms[self.domains[v]] for v, terms in row.nodes.items()},
                {e: self._select(t, *self._pairs[e][:2]) for e, t in row.edges.items()},
            )
        return self._rows[row.name]

    def contains(self, choices: Choices) -> bool:
        return all(c in domain for c, domain in zip(choices, self._sets, strict=True))

    def covers(self, choices: Choices) -> bool:
        """Whether branching led these choices here, even if fixing dropped them."""
        return all(choices[v] in side for v, side in self.decided.items())

    def size(self) -> int:
        """The number of remaining choices."""
        return sum(map(len, self.domains))

    @property
    def lowest(self) -> float:
        """A lower bound on its assignments and on those that fixing dropped."""
        return min(self.bound, self.dropped)

    # -- the dual function ------------------------------------------------------------------------

    def evaluate(self, prices: Mapping[str, float]) -> Contraction:
        """D at the prices; updates the bound and visits the assignment that minimizes."""
        unary, tables, constant = list(self._times), [t for _, _, t in self._pairs], 0.0
        for row in self.pool.rows:
            price = prices.get(row.name, 0.0)
            if price <= 0:
                continue
            nodes, edges = self._row(row)
            constant += price * row.limit
            for v, terms in nodes.items():
                unary[v] = unary[v] + price * terms
            for e, terms in edges.items():
                tables[e] = tables[e] + price * terms
        pairs = [(a, b, t) for (a, b, _), t in zip(self._pairs, tables, strict=True)]
        relaxed = Contraction(unary, pairs, self._messages, self.pool.disable)
        self._messages = relaxed.messages
        if relaxed.bound - constant > self.bound or self._tightest is None:
            self.bound = max(self.bound, relaxed.bound - constant)
            self.prices, self._tightest = dict(prices), (relaxed, constant)
        if relaxed.choices is not None:
            choices = zip(self.domains, relaxed.choices, strict=True)
            self.pool.visit(tuple(int(d[c]) for d, c in choices))
        return relaxed

    def _cost_of(self, prices: Mapping[str, float]) -> float:
        """What prices cost, whatever the choices."""
        return sum(max(0.0, prices.get(row.name, 0.0)) * row.limit for row in self.pool.rows)

    def maximize(self, *, gap: float, steps: int, done: Callable[[], bool]) -> None:
        """Raise the bound until it is within `gap` of the best assignment, no prices promise a
        higher one, or `done()`."""
        for _ in range(steps):
            best = self.pool.target_us
            if done() or best - self.bound <= gap * abs(best):
                return
            prices: Mapping[str, float] = self.prices
            if planes := self._planes():
                promised, prices = self.pool.best_prices(planes)
                if promised - self.bound <= 0.1 * gap * max(abs(self.bound), 1e-9):
                    return
            relaxed = self.evaluate(prices)
            if relaxed.choices is None:  # no assignment remains
                self.bound = math.inf if not math.isfinite(relaxed.bound) else self.bound
                return

    def _planes(self) -> list[CuttingPlane]:
        return [plane for plane in self.pool.planes.values() if self.contains(plane.choices)]

    # -- smaller subproblems ----------------------------------------------------------------------

    def fixed(self, gap: float = 0.0, prices: Mapping[str, float] | None = None) -> Subproblem:
        """Without the choices whose min-marginal shows that no assignment with them is better than
        the best known by more than `gap`.

        Args:
            prices: at which the min-marginals are; those of the bound if None.
        """
        if prices is not None:
            relaxed, constant = self.evaluate(prices), self._cost_of(prices)
        else:
            if self._tightest is None:
                self.evaluate(self.prices)
            assert self._tightest is not None
            relaxed, constant = self._tightest
        best = self.pool.target_us - gap * abs(self.pool.target_us)
        limit = best + constant
        limit += 1e-9 * max(1.0, abs(limit))
        marginals = relaxed.min_marginals()
        domains = [d[m <= limit] for d, m in zip(self.domains, marginals, strict=True)]
        if any(not len(d) for d in domains):  # everything is above the limit
            self.bound = max(self.bound, limit - constant)
            return self
        smaller = Subproblem(self.pool, domains, self)
        smaller.dropped = min(self.dropped, best)
        smaller.fixed_at = self.bound
        return smaller

    def near(self) -> list[Choices]:
        """The visited assignments whose priced time is below the best known, cheapest first; at
        most `NEAR`, as each makes the restricted MIP larger."""
        prices = [self.prices.get(row.name, 0.0) for row in self.pool.rows]
        priced = [
            (plane.choices_us + float(np.dot(prices, plane.usage)), plane.choices)
            for plane in self._planes()
        ]
        return [choices for us, choices in sorted(priced)[:NEAR] if us <= self.pool.time_us]

    def near_domains(self) -> list[np.ndarray]:
        """Per node its choices in those and in the best known."""
        best = [self.pool.choices] if self.pool.choices is not None else []
        columns = zip(*self.near(), *best, strict=True)
        return [np.array(sorted(set(column))) for column in columns]

    def branches(self) -> list[Subproblem]:
        """Two halves: for the node over which the assignments that reach the bound differ most, its
        most frequent choice, and the others. Empty if a single assignment remains."""
        planes = self._planes()
        shares = self.pool.mixture(planes)
        impact = [self._impact(plane) for plane in planes]
        best, node = 0.0, -1
        for v, domain in enumerate(self.domains):
            if len(domain) < 2:
                continue
            here = np.array([parts[v] for parts in impact] or [0.0])
            spread = float(shares @ np.abs(here - shares @ here)) if planes else 0.0
            if spread > best:
                best, node = spread, v
        if node < 0:
            node = max(range(len(self.domains)), key=lambda v: len(self.domains[v]))
            if len(self.domains[node]) < 2:
                return []
        weight = np.zeros(len(self.pool.problem.time_us[node]))
        for share, plane in zip(shares, planes, strict=True):
            weight[plane.choices[node]] += share
        chosen = max(self.domains[node], key=weight.__getitem__)
        sides = self.decided.get(node, np.arange(len(weight)))
        return [self.part({node: sides[side]}) for side in (sides == chosen, sides != chosen)]

    def part(self, decided: Mapping[int, np.ndarray]) -> Subproblem:
        """The part that makes these choices of some nodes."""
        domains = list(self.domains)
        for node, side in decided.items():
            domains[node] = domains[node][np.isin(domains[node], side)]
        part = Subproblem(self.pool, domains, self)
        part.decided = {**self.decided, **decided}
        return part

    def _impact(self, plane: CuttingPlane) -> list[float]:
        """Per node its share of the priced time, with half of its edges."""
        problem = self.pool.problem
        parts = [float(t[c]) for t, c in zip(problem.time_us, plane.choices, strict=True)]
        times = {e: x.time_us for e, x in enumerate(problem.edges)}
        terms: list[tuple[float, Mapping[int, np.ndarray], Mapping[int, np.ndarray]]]
        terms = [(1.0, {}, times)]
        for row in self.pool.rows:
            if price := self.prices.get(row.name, 0.0):
                terms.append((price, row.nodes, row.edges))
        for price, nodes, edges in terms:
            for v, values in nodes.items():
                parts[v] += price * float(values[plane.choices[v]])
            for e, table in edges.items():
                a, b = problem.edges[e].source, problem.edges[e].target
                half = 0.5 * price * float(table[plane.choices[a], plane.choices[b]])
                parts[a] += half
                parts[b] += half
        return parts
