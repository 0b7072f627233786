"""`solve(problem) -> solution`: prices for a bound, fixing by it, and branching on what is left.

`dual` finds the best lower bound that prices on rows can give, and meets good assignments on the
way. Every choice whose min-marginal under these prices exceeds the best assignment goes. While
bound and best assignment differ, the region with the lowest bound is solved as an integer program,
if it has become small, or else divided in two.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopar.errors import InfeasibleError
from autopar.solver.dual import Pool, Region
from autopar.solver.ilp import available_backend, size_of, solve_ilp
from autopar.solver.merging import Merged
from autopar.solver.problem import Choices, Problem, Row, Separate, Solution
from autopar.solver.reductions import Kept

TARGET_GAP = 9.9e-4
# evaluations of the dual: at first, and in a half of a region
PRICE_STEPS, BRANCH_STEPS = 60, 8
# A region is narrowed while bound and best assignment are this close, to this share of its choices.
NARROW_GAP, NARROWED = 0.2, 0.7
# Of the time, what is spent on finding an assignment within the hard rows before `fallback` helps.
ENTERING = 0.25
# variables of an integer program that is solved rather than divided
SMALL_PROGRAM = 4000
# of the program that recombines what was met: variables and seconds
MAX_PROGRAM, RECOMBINE_S = 6000, 4.0


def solve(
    problem: Problem,
    *,
    separate: Separate | None = None,
    starts: Sequence[Choices] = (),
    prices: Mapping[str, float] | None = None,
    kept: Sequence[np.ndarray] = (),
    time_limit: float = 60.0,
    gap: float = TARGET_GAP,
    enough_us: float = -math.inf,
    branch: bool = True,
    recombinations: int = 6,
    settled: bool = False,
    fallback: Callable[[], Iterable[Choices]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Solution:
    """The fastest assignment within the rows, with a certified gap.

    Args:
        separate: rows are made when needed: for choices, those they violate most, of each kind.
        starts: assignments to begin from.
        prices: of rows, by name, to begin from.
        kept: per node the choices (indices) that anything faster than the best start makes, as an
            earlier solution of this problem found them; all if not given.
        time_limit: seconds; afterwards the best found is returned with its gap.
        gap: good enough.
        enough_us: stop at an assignment as fast as this.
        branch: close the gap that prices leave.
        recombinations: of what was met, at most; each as rows turn up that the one before violates.
        settled: prices and starts are those of a problem that is nearly the same, so that the
            starts are recombined first. Where that is no better than the best of them by `gap`, nor
            `enough_us`, it is returned without a bound.
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
        branch,
        recombinations,
        settled,
        fallback or (lambda: ()),
        progress or (lambda line: None),
        Pool(problem, separate),
    )
    every = [np.flatnonzero(np.isfinite(t)) for t in problem.time_us]
    return search.run(starts, prices or {}, kept or every)


@dataclass
class _Search:
    problem: Problem
    separate: Separate | None
    end: float
    gap: float
    enough_us: float
    branch: bool
    recombinations: int
    settled: bool
    fallback: Callable[[], Iterable[Choices]]
    say: Callable[[str], None]
    pool: Pool
    bound: float = -math.inf

    def run(
        self,
        starts: Sequence[Choices],
        prices: Mapping[str, float],
        kept: Sequence[np.ndarray],
    ) -> Solution:
        pool, problem = self.pool, self.problem
        for start in starts:
            pool.note(start)
        whole = Region(pool, kept)
        known = {row.name for row in pool.rows}
        whole.prices = {name: price for name, price in prices.items() if name in known}
        if self.settled:
            before = pool.time_us
            self._recombine(whole)
            if pool.time_us > max(self.enough_us, before * (1 - self.gap)):
                return self._solution(whole, "recombination")
            self.enough_us = -math.inf
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
            self._enter()
        region = self._raise(whole, PRICE_STEPS)
        self.bound = region.bound
        if self._done():
            return self._solution(region, "prices" if region.prices else "elimination")
        self.say(f"{pool.time_us:.0f} us found, bound {self.bound:.0f} us")
        self._recombine(region)
        if self._done() or not self.branch:
            return self._solution(region, "prices")
        return self._branch_and_bound(region)

    def _done(self) -> bool:
        best = self.pool.time_us
        closed = best - self.bound <= self.gap * abs(best) or best <= self.enough_us
        return closed or time.monotonic() > self.end

    def _solution(self, region: Region, method: str) -> Solution:
        pool = self.pool
        assert pool.choices is not None
        bound = min(self.bound, pool.time_us)
        near = region.near() if pool.time_us - bound > self.gap * abs(pool.time_us) else ()
        return Solution(
            pool.choices, pool.time_us, bound, method, region.prices, tuple(near),
            tuple(region.kept),
        )  # fmt: skip

    def _raise(self, region: Region, steps: int) -> Region:
        """Raise a region's bound, and narrow it whenever that has become possible."""
        tried = math.inf
        while steps > 0 and not self._done():
            if self.pool.choices is not None:
                apart = (self.pool.time_us - region.bound) / max(abs(self.pool.time_us), 1e-9)
                if apart <= NARROW_GAP and apart < NARROWED * tried:
                    tried, region = apart, region.fixed()
            before = region.bound, len(self.pool.lines)
            region.maximize(gap=self.gap, steps=3, done=self._done)
            steps -= 3
            if (region.bound, len(self.pool.lines)) == before:
                break
        return region

    def _recombine(self, region: Region) -> None:
        """The best assignment made of choices that occur together in the mixture that reaches the
        bound, and in the best known one: an integer program of a few choices per node."""
        used = region.used()
        for _ in range(self.recombinations):
            rows = len(self.pool.rows)
            kept = Kept(replace(self.problem, rows=tuple(self.pool.rows)), used)
            merged = Merged(kept.problem)
            self.say(f"integer program of {size_of(merged.problem)} variables")
            if size_of(merged.problem) > MAX_PROGRAM:
                return
            self._by_program(kept, merged, RECOMBINE_S)
            self.say(f"{self.pool.time_us:.0f} us found, bound {self.bound:.0f} us")
            if self._done() or len(self.pool.rows) == rows:
                return

    def _branch_and_bound(self, root: Region) -> Solution:
        """Best bound first."""
        order = itertools.count()
        heap = [(root.bound, next(order), root)]
        programs, left = 0, math.inf  # the lowest bound of what was left aside as close enough
        while heap and not self._done():
            _, _, region = heapq.heappop(heap)
            if region is not root:
                region = self._raise(region, BRANCH_STEPS)
            elif self.pool.choices is not None:
                region = region.fixed()
            if self._worthwhile(region):
                small = self._small(region)
                if small is not None:
                    programs += 1
                    region.bound = max(region.bound, self._by_program(*small))
                    if self._worthwhile(region):  # rows were missing
                        heapq.heappush(heap, (region.bound, next(order), region))
                    else:
                        left = min(left, region.bound)
                elif halves := region.branches():
                    for half in halves:
                        heapq.heappush(heap, (half.bound, next(order), half))
                else:  # a single assignment, too large for a program
                    left = min(left, region.bound)
            else:
                left = min(left, region.bound)
            lowest = min(left, heap[0][0] if heap else math.inf)
            self.bound = max(self.bound, min(lowest, self.pool.time_us))
            if next(order) % 16 == 0:
                self.say(
                    f"{self.pool.time_us:.0f} us found, bound {self.bound:.0f} us, "
                    f"{len(heap)} regions"
                )
        method = f"ilp ({available_backend()})" if programs else "branch and bound"
        return self._solution(root, method)

    def _worthwhile(self, region: Region) -> bool:
        best = self.pool.time_us
        return best - region.bound > self.gap / 2 * abs(best)

    def _small(self, region: Region) -> tuple[Kept, Merged] | None:
        """The region's integer program, if it is small."""
        if region.sizes() > SMALL_PROGRAM // 3:
            return None
        kept = Kept(replace(self.problem, rows=tuple(self.pool.rows)), region.kept)
        merged = Merged(kept.problem)
        return (kept, merged) if size_of(merged.problem) <= SMALL_PROGRAM else None

    def _by_program(self, kept: Kept, merged: Merged, limit: float = math.inf) -> float:
        """A lower bound on what was kept, under the rows known when it was made."""
        limit = min(limit, max(1.0, self.end - time.monotonic()))
        gap = self.gap / (2 if self.settled else 4)
        try:
            found, bound = solve_ilp(merged.problem, time_limit=limit, gap=gap)
        except ValueError:  # nothing within the rows
            return math.inf
        if found is not None:
            self.pool.note(kept.expand(merged.expand(found)))
        return bound

    def _enter(self) -> None:
        """Find an assignment within the hard rows."""
        pool = self.pool
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
