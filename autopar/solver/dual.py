"""Lower bounds by prices on rows (Lagrangian relaxation), and the assignments met on the way.

For prices p >= 0 (those of one slack add up to at most one)

    D(p)  =  min over x of  t(x) + sum_r p_r (a_r(x) - limit_r)

is a lower bound on every assignment within the rows. Every x met gives a line above D, so the best
prices are found by Kelley's cutting planes (1960): a small linear program proposes prices where the
lines allow the highest bound, and D is evaluated there. Its dual mixes the assignments met into a
fractional one, which tells where to branch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pulp

from autopar.solver.contraction import Contraction
from autopar.solver.ilp import solver_of
from autopar.solver.messages import Messages
from autopar.solver.problem import Choices, Problem, Row, Separate

# assignments that are recombined
NEAR = 16
# of a hard row: in steps per all of the excess that was met
MAX_PRICE = 1e6


@dataclass(frozen=True)
class Line:
    """An assignment: its time without slacks, and by how much it exceeds every row."""

    choices: Choices
    busy_us: float
    usage: list[float]


class Pool:
    """What is known of a problem: rows, assignments, and the best of those within the rows.

    Args:
        problem: its rows are the first ones.
        separate: gives rows that choices violate, beyond those listed.

    Attributes:
        time_us, choices: of the best assignment; infinite and None before there is one.
    """

    def __init__(
        self,
        problem: Problem,
        separate: Separate | None,
        disable: frozenset[str] = frozenset(),
    ) -> None:
        self.problem, self.disable = problem, disable
        self.rows: list[Row] = list(problem.rows)
        self.lines: dict[Choices, Line] = {}
        self.time_us = math.inf
        self.choices: Choices | None = None
        self._separate = separate or (lambda choices: ())
        self._known = {row.name for row in self.rows}

    def add(self, row: Row) -> None:
        """One row more, if it is not known."""
        if row.name in self._known:
            return
        self.problem.check(row)
        self._known.add(row.name)
        self.rows.append(row)
        for line in self.lines.values():
            line.usage.append(self.problem.usage(row, line.choices))

    def note(self, choices: Choices) -> None:
        """Learn the rows that an assignment violates, its line, and whether it is the best."""
        if choices in self.lines:
            return
        for row in self._separate(choices):
            self.add(row)
        usage = [self.problem.usage(row, choices) for row in self.rows]
        line = Line(choices, self.problem.busy_us(choices), usage)
        self.lines[choices] = line
        slacks: dict[str, float] = {}
        for row, used in zip(self.rows, usage, strict=True):
            if row.slack:
                slacks[row.slack] = max(slacks.get(row.slack, 0.0), used)
            elif used > 1e-9 * max(1.0, abs(row.limit)):
                return
        time = line.busy_us + sum(slacks.values())
        if time < self.time_us:
            self.time_us, self.choices = time, choices


class Region:
    """All assignments that choose among `kept`, and a lower bound on them.

    Args:
        pool: shared by all regions of a problem.
        kept: per node the choices (indices).
        bound: known already.
        prices: by row name, to begin from.
        messages: of the core, to begin from.
        dropped: no assignment that fixing dropped on the way here is faster than this.
        decided: per node that branching has divided, its choices on this side (indices).
    """

    def __init__(
        self,
        pool: Pool,
        kept: Sequence[np.ndarray],
        bound: float = -math.inf,
        prices: Mapping[str, float] | None = None,
        messages: Messages | None = None,
        dropped: float = math.inf,
        decided: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        self._messages, self.dropped, self.decided = messages or {}, dropped, decided or {}
        self.pool, self.kept, self.bound = pool, list(kept), bound
        self.prices: dict[str, float] = dict(prices or {})
        self.narrowed_at = -math.inf  # the bound by which choices were dropped last
        self._tightest: tuple[Contraction, float] | None = None  # at `prices`
        self._inside = [set(map(int, k)) for k in kept]
        edges = pool.problem.edges
        self._times = [t[k] for t, k in zip(pool.problem.time_us, kept, strict=True)]
        self._pairs = [
            (e.source, e.target, self._cut(e.time_us, e.source, e.target)) for e in edges
        ]
        self._cut_rows: dict[str, tuple[dict[int, np.ndarray], dict[int, np.ndarray]]] = {}

    def _cut(self, table: np.ndarray, a: int, b: int) -> np.ndarray:
        rows, columns = self.kept[a], self.kept[b]
        if table.shape == (len(rows), len(columns)):
            return table
        return table[np.ix_(rows, columns)]

    def _row(self, row: Row) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """Its terms over the choices kept."""
        if row.name not in self._cut_rows:
            ends = self._pairs
            self._cut_rows[row.name] = (
                {v: terms[self.kept[v]] for v, terms in row.nodes.items()},
                {e: self._cut(t, ends[e][0], ends[e][1]) for e, t in row.edges.items()},
            )
        return self._cut_rows[row.name]

    def contains(self, choices: Choices) -> bool:
        return all(c in inside for c, inside in zip(choices, self._inside, strict=True))

    def covers(self, choices: Choices) -> bool:
        """Whether branching led these choices here, even if fixing dropped them."""
        return all(choices[v] in among for v, among in self.decided.items())

    def sizes(self) -> int:
        """How many choices there are."""
        return sum(map(len, self.kept))

    # -- the dual function ------------------------------------------------------------------------

    def weighted(self, prices: Mapping[str, float]) -> tuple[Contraction, float]:
        """The least of time plus priced rows, and what the limits take off."""
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
        found = Contraction(unary, pairs, self._messages, self.pool.disable)
        self._messages = found.messages
        return found, constant

    def evaluate(self, prices: Mapping[str, float]) -> Contraction:
        """D at the prices; notes bound, line and incumbent."""
        found, constant = self.weighted(prices)
        if found.bound - constant > self.bound or self._tightest is None:
            self.bound = max(self.bound, found.bound - constant)
            self.prices, self._tightest = dict(prices), (found, constant)
        if found.choices is not None:
            choices = zip(self.kept, found.choices, strict=True)
            self.pool.note(tuple(int(k[c]) for k, c in choices))
        return found

    def maximize(self, *, gap: float, steps: int, done: Callable[[], bool]) -> None:
        """Raise the bound until it is within `gap` of the best assignment, no prices promise a
        higher one, or `done()`."""
        for _ in range(steps):
            best = self.pool.time_us
            if done() or best - self.bound <= gap * abs(best):
                return
            lines = self._lines()
            if lines:
                promised, prices = self._master(lines)
                if promised - self.bound <= 0.1 * gap * max(abs(self.bound), 1e-9):
                    return
            else:
                prices = self.prices
            found = self.evaluate(prices)
            if found.choices is None:  # nothing is left here
                self.bound = math.inf if not math.isfinite(found.bound) else self.bound
                return

    def hard_prices(self, price: float) -> dict[str, float]:
        """Of the hard rows alike: `price` is in steps per all of the excess that was met."""
        rows, lines = self.pool.rows, list(self.pool.lines.values())
        hard = [r for r, row in enumerate(rows) if not row.slack]
        return {rows[r].name: price * self._scale(r, lines) / len(hard) for r in hard}

    def _lines(self) -> list[Line]:
        return [line for line in self.pool.lines.values() if self.contains(line.choices)]

    def _master(self, lines: Sequence[Line]) -> tuple[float, dict[str, float]]:
        """Prices at which the lines known allow the highest bound."""
        rows = self.pool.rows
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            program = pulp.LpProblem("prices", pulp.LpMaximize)
            value = pulp.LpVariable("value", upBound=self._ceiling(lines))
            scale = [self._scale(r, lines) for r in range(len(rows))]
            p = [
                pulp.LpVariable(f"p{r}", 0, 1 if row.slack else MAX_PRICE)
                for r, row in enumerate(rows)
            ]
            program.setObjective(value)
            for line in lines:
                terms = [(p[r], -u * scale[r]) for r, u in enumerate(line.usage)]
                program.addConstraint(
                    pulp.LpAffineExpression([(value, 1.0), *terms]) <= line.busy_us
                )
            for name in {row.slack for row in rows if row.slack}:
                group = [v for v, row in zip(p, rows, strict=True) if row.slack == name]
                program.addConstraint(pulp.lpSum(group) <= 1)
            program.solve(solver_of(time_limit=10.0, gap=0.0))
        prices = {
            row.name: max(0.0, v.value() or 0.0) * s
            for row, v, s in zip(rows, p, scale, strict=True)
        }
        return float(value.value()), {name: price for name, price in prices.items() if price}

    def _scale(self, r: int, lines: Sequence[Line]) -> float:
        """Hard rows come in bytes: a unit of price is a step for all of the excess met."""
        if self.pool.rows[r].slack:
            return 1.0
        excess = max(abs(line.usage[r]) for line in lines)
        return max(max(abs(line.busy_us) for line in lines), 1e-9) / max(excess, 1e-9)

    def _ceiling(self, lines: Sequence[Line]) -> float:
        """D of a region with a better assignment does not exceed the best known; before one is
        known, a multiple of the slowest met stands for "as high as you like"."""
        if math.isfinite(self.pool.time_us):
            return self.pool.time_us
        return 10.0 * max(abs(line.busy_us) for line in lines) + 1.0

    # -- smaller regions --------------------------------------------------------------------------

    def fixed(self, gap: float = 0.0) -> Region:
        """Without the choices that cannot be part of anything that is better than the best known
        by more than `gap`."""
        if self._tightest is None:
            self.evaluate(self.prices)
        assert self._tightest is not None
        found, constant = self._tightest
        best = self.pool.time_us - gap * abs(self.pool.time_us)
        limit = best + constant
        limit += 1e-9 * max(1.0, abs(limit))
        marginals = found.min_marginals()
        kept = [k[m <= limit] for k, m in zip(self.kept, marginals, strict=True)]
        if any(not len(k) for k in kept):  # everything is above the limit
            self.bound = max(self.bound, limit - constant)
            return self
        smaller = self._within(kept)
        smaller.dropped = min(self.dropped, best)
        smaller.narrowed_at = self.bound
        return smaller

    @property
    def lowest(self) -> float:
        """A lower bound on its assignments and on those that fixing dropped."""
        return min(self.bound, self.dropped)

    def near(self) -> list[Choices]:
        """The assignments met whose priced time is below the best known, least first; not more
        than `NEAR`, as each makes the program that recombines them larger."""
        prices = [self.prices.get(row.name, 0.0) for row in self.pool.rows]
        priced = [
            (line.busy_us + float(np.dot(prices, line.usage)), line.choices)
            for line in self._lines()
        ]
        return [choices for us, choices in sorted(priced)[:NEAR] if us <= self.pool.time_us]

    def used(self) -> list[np.ndarray]:
        """Per node the choices in those and in the best known."""
        best = [self.pool.choices] if self.pool.choices is not None else []
        columns = zip(*self.near(), *best, strict=True)
        return [np.array(sorted(set(column))) for column in columns]

    def branches(self) -> list[Region]:
        """Two halves: of the node over which the assignments that reach the bound differ most, its
        most frequent choice, and the others. None if they agree."""
        lines = self._lines()
        shares = self._mixture(lines)
        impact = [self._impact(line) for line in lines]
        best, node = 0.0, -1
        for v, kept in enumerate(self.kept):
            if len(kept) < 2:
                continue
            here = np.array([parts[v] for parts in impact] or [0.0])
            spread = float(shares @ np.abs(here - shares @ here)) if lines else 0.0
            if spread > best:
                best, node = spread, v
        if node < 0:
            node = max(range(len(self.kept)), key=lambda v: len(self.kept[v]))
            if len(self.kept[node]) < 2:
                return []
        weight = np.zeros(len(self.pool.problem.time_us[node]))
        for share, line in zip(shares, lines, strict=True):
            weight[line.choices[node]] += share
        chosen = max(self.kept[node], key=weight.__getitem__)
        among = self.decided.get(node, np.arange(len(weight)))
        return [self.part({node: among[side]}) for side in (among == chosen, among != chosen)]

    def part(self, decided: Mapping[int, np.ndarray]) -> Region:
        """The part that makes these choices of some nodes."""
        kept = list(self.kept)
        for node, among in decided.items():
            kept[node] = kept[node][np.isin(kept[node], among)]
        part = self._within(kept)
        part.decided = {**self.decided, **decided}
        return part

    def _within(self, kept: Sequence[np.ndarray]) -> Region:
        """The part of this region that chooses among fewer."""
        at = [np.searchsorted(every, some) for every, some in zip(self.kept, kept, strict=True)]
        messages = {
            (a, b): (to_a[at[a]], to_b[at[b]]) for (a, b), (to_a, to_b) in self._messages.items()
        }
        part = Region(
            self.pool, kept, self.bound, self.prices, messages, self.dropped, self.decided
        )
        part.narrowed_at = self.narrowed_at
        return part

    def _mixture(self, lines: Sequence[Line]) -> np.ndarray:
        """Shares of the assignments, summing to one, in the cheapest mixture within the rows."""
        rows = self.pool.rows
        if not lines:
            return np.zeros(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            program = pulp.LpProblem("mixture", pulp.LpMinimize)
            share = [pulp.LpVariable(f"share{i}", 0) for i in range(len(lines))]
            slack = {row.slack: pulp.LpVariable(f"slack_{row.slack}", 0) for row in rows}
            over = pulp.LpVariable("over", 0)  # of hard rows, if no mixture is within them
            cost = [(s, line.busy_us) for s, line in zip(share, lines, strict=True)]
            cost += [(v, 1.0) for name, v in slack.items() if name]
            heavy = 1e3 * max((abs(line.busy_us) for line in lines), default=1.0)
            program.setObjective(pulp.LpAffineExpression([*cost, (over, heavy)]))
            program.addConstraint(pulp.lpSum(share) == 1)
            for r, row in enumerate(rows):
                scale = max([1e-9, *(abs(line.usage[r]) for line in lines)])
                terms = [(s, line.usage[r] / scale) for s, line in zip(share, lines, strict=True)]
                beyond = (slack[row.slack], -1.0 / scale) if row.slack else (over, -1.0)
                program.addConstraint(pulp.LpAffineExpression([*terms, beyond]) <= 0)
            program.solve(solver_of(time_limit=10.0, gap=0.0))
        found = np.array([max(0.0, s.value() or 0.0) for s in share])
        return found / max(found.sum(), 1e-12)

    def _impact(self, line: Line) -> list[float]:
        """Per node what it adds to the priced rows and the time, with half of its edges."""
        problem = self.pool.problem
        parts = [float(t[c]) for t, c in zip(problem.time_us, line.choices, strict=True)]
        times = {e: x.time_us for e, x in enumerate(problem.edges)}
        terms: list[tuple[float, Mapping[int, np.ndarray], Mapping[int, np.ndarray]]]
        terms = [(1.0, {}, times)]
        for row in self.pool.rows:
            if price := self.prices.get(row.name, 0.0):
                terms.append((price, row.nodes, row.edges))
        for price, nodes, edges in terms:
            for v, values in nodes.items():
                parts[v] += price * float(values[line.choices[v]])
            for e, table in edges.items():
                a, b = problem.edges[e].source, problem.edges[e].target
                half = 0.5 * price * float(table[line.choices[a], line.choices[b]])
                parts[a] += half
                parts[b] += half
        return parts
