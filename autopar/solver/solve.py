"""`solve(problem) -> solution`: prices for a bound, fixing by it, and branching on what is left.

`dual` finds the best lower bound that prices on rows can give, and meets good assignments on the
way. Every choice goes whose min-marginal under these prices exceeds what is better than the best
assignment by the gap. While bound and best assignment differ, the region with the lowest bound is
solved as an integer program, if it has become small, or else divided in two. How it was divided
leads the branching of a problem that is nearly the same.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from autopar.errors import InfeasibleError
from autopar.solver.dual import Pool, Region
from autopar.solver.ilp import available_backend, size_of
from autopar.solver.merging import Merged
from autopar.solver.problem import Branch, Choices, Problem, Row, Separate, Solution
from autopar.solver.recombination import by_program, recombine
from autopar.solver.reductions import Kept

# What `disable` switches off, to measure what each earns; "replay" and "interleaving" are layers of
# the search around the solver.
LAYERS = ("elimination", "messages", "merging", "restricted MIP", "replay", "interleaving")
TARGET_GAP = 9.9e-4
# evaluations of the dual: at first, and in a half of a region
PRICE_STEPS, BRANCH_STEPS = 60, 6
# A region is narrowed where bound and best assignment are this close, and closer by this than when
# it was narrowed last.
NARROW_GAP, NARROWED = 0.2, 0.7
# In times of all that is done, for all that was too much: prices at which the hard rows are mostly
# met.
ENTERING_PRICES = (1.0, 4.0)
# Of the time, what is spent on finding an assignment within the hard rows before `fallback` helps.
ENTERING = 0.25
# variables of an integer program that is solved rather than divided
SMALL_PROGRAM = 4000


def solve(
    problem: Problem,
    *,
    separate: Separate | None = None,
    starts: Sequence[Choices] = (),
    prices: Mapping[str, float] | None = None,
    tree: Branch | None = None,
    time_limit: float = 60.0,
    gap: float = TARGET_GAP,
    enough_us: float = -math.inf,
    regions: float = math.inf,
    recombinations: int = 6,
    fallback: Callable[[], Iterable[Choices]] | None = None,
    progress: Callable[[str], None] | None = None,
    disable: frozenset[str] = frozenset(),
) -> Solution:
    """The fastest assignment within the rows, with a certified gap.

    Args:
        separate: rows are made when needed: for choices, those they violate most, of each kind.
        starts: assignments to begin from.
        prices: of rows, by name, to begin from.
        tree: how branching went on a problem that is nearly the same.
        time_limit: seconds; afterwards the best found is returned with its gap.
        gap: good enough.
        enough_us: stop at an assignment as fast as this.
        regions: that branching looks at, at most, to close the gap that prices leave; if there is
            a limit, none is solved as an integer program.
        recombinations: of what was met, at most; each as rows turn up that the one before violates.
        fallback: asked for assignments where none within the hard rows is found for a while.
        progress: called with a line for each phase.

    Raises:
        InfeasibleError: no assignment is within the hard rows; says how far the best is outside.
    """
    search = _Search(
        problem,
        separate,
        time.monotonic() + time_limit,
        gap,
        enough_us,
        regions,
        0 if "restricted MIP" in disable else recombinations,
        fallback or (lambda: ()),
        progress or (lambda line: None),
        Pool(problem, separate, disable),
    )
    every = [np.flatnonzero(np.isfinite(t)) for t in problem.time_us]
    return search.run(starts, prices or {}, every, tree)


@dataclass(eq=False)
class _Node:
    """A region in the tree of branching."""

    region: Region
    parts: list[_Node] = field(default_factory=list)

    def leaves(self) -> list[_Node]:
        return [leaf for part in self.parts for leaf in part.leaves()] if self.parts else [self]

    def branch(self) -> Branch:
        parts = tuple(part.branch() for part in self.parts)
        return Branch(self.region.decided, self.region.prices, parts)


@dataclass
class _Search:
    problem: Problem
    separate: Separate | None
    end: float
    gap: float
    enough_us: float
    regions: float
    recombinations: int
    fallback: Callable[[], Iterable[Choices]]
    say: Callable[[str], None]
    pool: Pool
    bound: float = -math.inf

    @property
    def margin(self) -> float:
        """What is better by less is left aside; rounding may not make it more than the gap."""
        return self.gap * (1 - 1e-6)

    def run(
        self,
        starts: Sequence[Choices],
        prices: Mapping[str, float],
        kept: Sequence[np.ndarray],
        tree: Branch | None,
    ) -> Solution:
        pool, problem = self.pool, self.problem
        for start in starts:
            pool.note(start)
        whole = Region(pool, kept)
        known = {row.name for row in pool.rows}
        whole.prices = {name: price for name, price in prices.items() if name in known}
        if whole.evaluate(whole.prices).choices is None:
            raise InfeasibleError(
                "no assignment satisfies the constraints on layouts, whatever the memory",
                budget_bytes=math.inf,
                smallest_bytes=math.inf,
            )
        self.say(
            f"{len(problem.time_us)} nodes, {whole.sizes()} choices: at least {whole.bound:.0f} us"
        )
        if pool.choices is None:
            self._enter(whole)
        if tree is not None:
            return self._branch_and_bound(whole, self._replayed(whole, tree))
        region = self._raise(whole, PRICE_STEPS)
        self.bound = region.lowest
        if self._done():
            return self._solution(region, "prices" if region.prices else "elimination")
        self.say(f"{pool.time_us:.0f} us found, bound {self.bound:.0f} us")
        self._recombine(region)
        if self._done() or not self.regions:
            return self._solution(region, "prices")
        return self._branch_and_bound(region, _Node(region.fixed(self.margin)))

    def _replayed(self, region: Region, tree: Branch) -> _Node:
        """A region divided as another was, at the prices that bounded the parts of that one."""
        if not self._worthwhile(region) or not tree.parts:
            return _Node(region)
        region = region.fixed(self.margin)
        known = {row.name for row in self.pool.rows}
        parts = []
        for branch in tree.parts:
            part = region.part(branch.decided)
            if all(map(len, part.kept)):
                prices = {name: price for name, price in branch.prices.items() if name in known}
                part.evaluate(prices)
                parts.append(self._replayed(part, branch))
        return _Node(region, parts)

    def _done(self) -> bool:
        best = self.pool.time_us
        closed = best - self.bound <= self.gap * abs(best) or best <= self.enough_us
        return closed or time.monotonic() > self.end

    def _solution(self, root: Region, method: str, tree: Branch | None = None) -> Solution:
        pool = self.pool
        assert pool.choices is not None
        apart = pool.time_us - root.bound > self.gap * abs(pool.time_us)
        return Solution(
            pool.choices, pool.time_us, min(self.bound, pool.time_us), method, root.prices,
            root.bound,
            tuple(root.near() if apart else ()),
            tree, tuple(pool.lines),
        )  # fmt: skip

    def _raise(self, region: Region, steps: int) -> Region:
        """Raise a region's bound, and narrow it whenever that has become possible."""
        while steps > 0 and self._worthwhile(region) and not self._done():
            best = self.pool.time_us
            apart = best - region.bound
            if apart <= min(NARROW_GAP * abs(best), NARROWED * (best - region.narrowed_at)):
                region = region.fixed(self.margin)
            before = region.bound, len(self.pool.lines)
            region.maximize(gap=self.gap, steps=1, done=self._done)
            steps -= 1
            if (region.bound, len(self.pool.lines)) == before:
                break
        return region

    def _recombine(self, region: Region) -> None:
        """The best assignment made of choices that occur together in the mixture that reaches the
        bound, and in the best known one."""
        recombine(
            self.pool, region.used(), rounds=self.recombinations, gap=self.gap / 4,
            done=self._done, say=self.say,
        )  # fmt: skip

    def _branch_and_bound(self, root: Region, tree: _Node) -> Solution:
        """Best bound first.

        Args:
            root: all assignments.
            tree: what of them may be better than the best known, divided already or not.
        """
        order = itertools.count()
        leaves = tree.leaves()
        self.bound = max(self.bound, min(leaf.region.lowest for leaf in leaves))
        best = self.pool.choices
        if tree.parts and best is not None:
            for leaf in leaves:
                if leaf.region.covers(best) and self._worthwhile(leaf.region):
                    leaf.region = self._raise(leaf.region, BRANCH_STEPS)
                    self._recombine(leaf.region)
        heap = [(leaf.region.lowest, next(order), leaf) for leaf in leaves]
        heapq.heapify(heap)
        looked, programs = 0, 0
        left = math.inf  # the lowest bound of parts that hold nothing better by the gap
        while heap and not self._done() and looked < self.regions:
            _, _, node = heapq.heappop(heap)
            if node is not tree:
                node.region = self._raise(node.region, BRANCH_STEPS)
            looked += 1
            region = node.region
            if self._worthwhile(region):
                small = self._small(region)
                if small is not None:
                    programs += 1
                    seconds = max(1.0, self.end - time.monotonic())
                    bound = by_program(
                        self.pool, *small, gap=self.gap / 4, seconds=seconds, better_by=self.gap / 2
                    )
                    region.bound = max(region.bound, bound)
                    again = [node] if self._worthwhile(region) else []  # rows were missing
                else:
                    again = node.parts = [_Node(half) for half in region.branches()]
                for part in again:
                    heapq.heappush(heap, (part.region.lowest, next(order), part))
                if not again:  # a single assignment, too large for a program
                    left = min(left, region.lowest)
            else:
                left = min(left, region.lowest)
            lowest = min(left, heap[0][0] if heap else math.inf)
            self.bound = max(self.bound, min(lowest, self.pool.time_us))
            if looked % 16 == 0:
                self.say(
                    f"{self.pool.time_us:.0f} us found, bound {self.bound:.0f} us, "
                    f"{len(heap)} regions"
                )
        method = f"ilp ({available_backend()})" if programs else "branch and bound"
        return self._solution(root, method, tree.branch())

    def _worthwhile(self, region: Region) -> bool:
        best = self.pool.time_us
        return best == math.inf or best - region.bound > self.margin * abs(best)

    def _small(self, region: Region) -> tuple[Kept, Merged] | None:
        """The region's integer program, if it is small."""
        if math.isfinite(self.regions) or region.sizes() > SMALL_PROGRAM // 3:
            return None
        kept = Kept(replace(self.problem, rows=tuple(self.pool.rows)), region.kept)
        merged = Merged(kept.problem, "merging" not in self.pool.disable)
        return (kept, merged) if size_of(merged.problem) <= SMALL_PROGRAM else None

    def _enter(self, whole: Region) -> None:
        """Find an assignment within the hard rows: at high prices for them, or else by itself."""
        pool = self.pool
        for price in ENTERING_PRICES:
            whole.evaluate(whole.hard_prices(price))
            if pool.choices is not None:
                return
        left = self.end - time.monotonic()
        try:
            pool.note(self._within(pool.rows, ENTERING * left))
        except InfeasibleError as error:
            if error.proven:
                raise
            for choices in self.fallback():
                pool.note(choices)
            if pool.choices is None:
                pool.note(self._within(pool.rows, math.inf))

    def _within(self, rows: Sequence[Row], limit: float) -> Choices:
        """An assignment within the hard rows: least is by how much the largest exceeds its limit.

        Args:
            limit: seconds.

        Raises:
            InfeasibleError: that excess is positive.
        """
        # slacks are not negative, but what is left of a limit may be: counted from its other end.
        # Bytes run to 1e11, so that they are counted in units of the largest limit.
        offset = max(1.0, *(abs(row.limit) for row in rows if not row.slack))

        def soft(row: Row) -> Row:
            return Row(
                row.name,
                row.limit / offset - 1.0,
                {v: terms / offset for v, terms in row.nodes.items()},
                {e: terms / offset for e, terms in row.edges.items()},
                slack="needed",
            )

        def free(costs: np.ndarray) -> np.ndarray:
            return np.where(np.isfinite(costs), 0.0, np.inf)

        def violated(choices: Choices) -> list[Row]:
            found = self.separate(choices) if self.separate is not None else ()
            return [soft(row) for row in found if not row.slack]

        loose = Problem(
            tuple(map(free, self.problem.time_us)),
            tuple(replace(e, time_us=free(e.time_us)) for e in self.problem.edges),
            tuple(soft(row) for row in rows if not row.slack),
            self.problem.names,
        )
        found = solve(
            loose,
            separate=violated,
            time_limit=min(limit, max(1.0, self.end - time.monotonic())),
            enough_us=1.0,
            disable=self.pool.disable,
        )
        if found.time_us > 1 + 1e-9:
            needed = offset * found.time_us
            raise InfeasibleError(
                f"no assignment is within the limits: the largest needs {needed:.6g}, and has "
                f"{offset:.6g}",
                budget_bytes=offset,
                smallest_bytes=needed,
                proven=found.bound_us > 1,
                choices=found.choices,
            )
        return found.choices
