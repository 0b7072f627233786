"""`solve(problem) -> solution`: Lagrangian bounds, variable fixing, and branch and bound.

Cutting planes find the best lower bound that prices on rows can give, and visit good assignments on
the way. A choice is dropped when its min-marginal under these prices exceeds the best assignment
less the gap. While the bound and the best assignment differ, the subproblem with the lowest bound
is solved as an integer program if it is small, and divided in two if not. Its branching tree guides
the branching of a similar problem.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from autopar.errors import InfeasibleError
from autopar.solver.cutting_planes import CutPool
from autopar.solver.ilp import size_of
from autopar.solver.linear_program import available_backend
from autopar.solver.problem import Branch, Choices, Problem, Row, Separate, Solution
from autopar.solver.reductions import RestrictedDomains
from autopar.solver.restricted_mip import solve_restricted, visit_optimum
from autopar.solver.subproblem import Subproblem

# What `disable` switches off, to measure what each earns. "replay" and "interleaving" are layers of
# `planner.search`.
LAYERS = ("elimination", "messages", "restricted MIP", "replay", "interleaving")
TARGET_GAP = 9.9e-4
# evaluations of the dual: of the root, and of a branch
ROOT_STEPS, BRANCH_STEPS = 60, 6
# Choices are fixed where bound and best assignment are this close, and closer by this factor than
# when they were fixed last.
FIX_GAP, FIX_PROGRESS = 0.2, 0.7
# Prices of hard rows, in steps per largest excess, at which most assignments are within them.
FEASIBILITY_PRICES = (1.0, 4.0)
# The share of the time spent on finding an assignment within the hard rows before `fallback`.
FEASIBILITY_SHARE = 0.25
# Seconds to find a smaller excess when it is proven that there is one.
CLOSER_S = 2.0
# variables of an integer program that is solved, not divided
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
    better_than_us: float = math.inf,
    subproblems: float = math.inf,
    branching_gap: float = math.inf,
    mip_rounds: int = 6,
    fallback: Callable[[], Iterable[Choices]] | None = None,
    progress: Callable[[str], None] | None = None,
    disable: frozenset[str] = frozenset(),
) -> Solution:
    """The fastest assignment within the rows, with a certified gap.

    Args:
        separate: makes rows when they are needed.
        starts: assignments to visit first.
        prices: by row name, to start from.
        tree: of branching on a similar problem, to follow.
        time_limit: seconds of processor time; afterwards the best assignment is returned with its
            gap.
        gap: relative, at which to stop.
        enough_us: stop at an assignment as fast as this.
        better_than_us: stop when the bound shows that none is faster than this by the gap.
        subproblems: that branch and bound explores, at most; with a limit, none is solved as an
            integer program.
        branching_gap: relative; a larger one is left as prices have it.
        mip_rounds: of the restricted MIP, at most; each has the rows that the last one violated.
        fallback: gives assignments where none within the hard rows is found for a while.
        progress: called with a line per phase.
        disable: names of `LAYERS` to switch off.

    Raises:
        InfeasibleError: no assignment is within the hard rows; has the smallest excess.
    """
    assert disable <= {*LAYERS}, f"{disable} are not all among {LAYERS}"
    search = _Search(
        CutPool(problem, separate, disable, better_than_us), separate,
        time.process_time() + time_limit, gap, enough_us, subproblems, branching_gap,
        0 if "restricted MIP" in disable else mip_rounds,
        fallback or (lambda: ()), progress or (lambda line: None),
    )  # fmt: skip
    return search.run(starts, prices or {}, tree)


@dataclass(eq=False)
class _Node:
    """A subproblem in the branching tree.

    Attributes:
        sibling: the part of the same subproblem that is bounded before.
    """

    subproblem: Subproblem
    parts: list[_Node] = field(default_factory=list)
    sibling: _Node | None = None

    def leaves(self) -> list[_Node]:
        return [leaf for part in self.parts for leaf in part.leaves()] if self.parts else [self]

    def branch(self) -> Branch:
        parts = tuple(part.branch() for part in self.parts)
        return Branch(self.subproblem.decided, self.subproblem.prices, parts)


@dataclass
class _Search:
    pool: CutPool
    separate: Separate | None
    end: float
    gap: float
    enough_us: float
    subproblems: float
    branching_gap: float
    mip_rounds: int
    fallback: Callable[[], Iterable[Choices]]
    say: Callable[[str], None]
    bound: float = -math.inf

    @property
    def margin(self) -> float:
        """Improvements by less are dropped: the gap, and room for rounding."""
        return self.gap * (1 - 1e-6)

    def run(
        self, starts: Sequence[Choices], prices: Mapping[str, float], tree: Branch | None
    ) -> Solution:
        pool, problem = self.pool, self.pool.problem
        for start in starts:
            pool.visit(start)
        root = Subproblem(pool, [np.flatnonzero(np.isfinite(t)) for t in problem.time_us])
        root.prices = pool.known_prices(prices)
        if root.evaluate(root.prices).choices is None:
            raise InfeasibleError(
                "no assignment satisfies the constraints on layouts, whatever the memory",
                budget_bytes=math.inf,
                smallest_bytes=math.inf,
            )
        nodes, bound = len(problem.time_us), root.bound
        self.say(f"{nodes} nodes, {root.size()} choices: at least {bound:.0f} us")
        if pool.choices is None:
            self._find_feasible(root)
        if tree is not None:
            return self._branch_and_bound(root, self._replayed(root, tree))
        root = self._tighten_bound(root, ROOT_STEPS)
        self.bound = root.lowest
        if self._done():
            return self._solution(root, "Lagrangian prices" if root.prices else "elimination")
        self.say(f"best {pool.time_us:.0f} us, bound {self.bound:.0f} us")
        self._restricted_mip(root)
        distance = pool.target_us - self.bound
        if self._done() or not self.subproblems or distance > self.branching_gap * pool.time_us:
            return self._solution(root, "Lagrangian prices")
        return self._branch_and_bound(root, _Node(root.fixed(self.margin)))

    def _replayed(self, subproblem: Subproblem, tree: Branch) -> _Node:
        """A subproblem divided as in another tree, each part bounded at its prices there."""
        if not self._worthwhile(subproblem) or not tree.parts or self._done():
            return _Node(subproblem)
        subproblem = subproblem.fixed(self.margin)
        parts = []
        for branch in tree.parts:
            part = subproblem.part(branch.decided)
            if all(map(len, part.domains)):
                part.evaluate(self.pool.known_prices(branch.prices))
                parts.append(self._replayed(part, branch))
        return _Node(subproblem, parts)

    def _done(self) -> bool:
        best = self.pool.target_us
        enough = self.pool.time_us <= self.enough_us
        closed = best - self.bound <= self.gap * abs(best) or enough
        return closed or time.process_time() > self.end

    def _solution(self, root: Subproblem, method: str, tree: Branch | None = None) -> Solution:
        pool = self.pool
        assert pool.choices is not None
        open_gap = pool.time_us - root.bound > self.gap * abs(pool.time_us)
        return Solution(
            pool.choices, pool.time_us, min(self.bound, pool.time_us), method, root.prices,
            root.bound,
            tuple(root.near() if open_gap else ()),
            tree, tuple(pool.planes),
        )  # fmt: skip

    def _tighten_bound(self, subproblem: Subproblem, steps: int) -> Subproblem:
        """Raise the bound of a subproblem, and fix choices whenever that has become possible."""
        while steps > 0 and self._worthwhile(subproblem) and not self._done():
            best = self.pool.target_us
            distance = best - subproblem.bound
            progress = FIX_PROGRESS * (best - subproblem.fixed_at)
            if distance <= min(FIX_GAP * abs(best), progress):
                subproblem = subproblem.fixed(self.margin)
            before = subproblem.bound, len(self.pool.planes)
            subproblem.maximize(gap=self.gap, steps=1, done=self._done)
            steps -= 1
            if (subproblem.bound, len(self.pool.planes)) == before:
                break
        return subproblem

    def _restricted_mip(self, subproblem: Subproblem) -> None:
        """Visit the best assignment made of the choices of the best known and of those near it."""
        solve_restricted(
            self.pool, subproblem.near_domains(), rounds=self.mip_rounds, gap=self.gap / 4,
            done=self._done, say=self.say,
        )  # fmt: skip

    def _branch_and_bound(self, root: Subproblem, tree: _Node) -> Solution:
        """Lowest bound first.

        Args:
            root: all assignments.
            tree: those of them that may be better than the best known, divided already or not.
        """
        order = itertools.count()
        leaves = tree.leaves()
        self.bound = max(self.bound, min(leaf.subproblem.lowest for leaf in leaves))
        best = self.pool.choices
        if tree.parts and best is not None:
            for leaf in leaves:
                if leaf.subproblem.covers(best) and self._worthwhile(leaf.subproblem):
                    leaf.subproblem = self._tighten_bound(leaf.subproblem, BRANCH_STEPS)
                    self._restricted_mip(leaf.subproblem)
        heap = [(leaf.subproblem.lowest, next(order), leaf) for leaf in leaves]
        heapq.heapify(heap)
        explored, programs = 0, 0
        closed = math.inf  # the lowest bound of parts in which nothing is better by the gap
        while heap and not self._done() and explored < self.subproblems:
            _, _, node = heapq.heappop(heap)
            if node.sibling is not None and self._worthwhile(node.subproblem):
                # the prices that are best there drop other choices here than those of the bound
                prices = node.sibling.subproblem.prices
                node.subproblem = node.subproblem.fixed(self.margin, prices)
            if node is not tree:
                node.subproblem = self._tighten_bound(node.subproblem, BRANCH_STEPS)
            explored += 1
            subproblem = node.subproblem
            parts: list[_Node] = []
            if self._worthwhile(subproblem):
                small = self._small_program(subproblem)
                if small is not None:
                    programs += 1
                    seconds = max(1.0, self.end - time.process_time())
                    bound = visit_optimum(
                        self.pool, small, gap=self.gap / 4, seconds=seconds, better_by=self.gap / 2
                    )
                    subproblem.bound = max(subproblem.bound, bound)
                    parts = [node] if self._worthwhile(subproblem) else []  # rows were missing
                else:
                    parts = node.parts = [_Node(half) for half in subproblem.branches()]
                    for first, second in itertools.pairwise(parts):
                        second.sibling = first
            for part in parts:
                heapq.heappush(heap, (part.subproblem.lowest, next(order), part))
            if not parts:
                closed = min(closed, subproblem.lowest)
            lowest = min(closed, heap[0][0] if heap else math.inf)
            self.bound = max(self.bound, min(lowest, self.pool.time_us))
            if explored % 16 == 0:
                self.say(
                    f"best {self.pool.time_us:.0f} us, bound {self.bound:.0f} us, "
                    f"{len(heap)} open subproblems"
                )
        method = f"ilp ({available_backend()})" if programs else "branch and bound"
        return self._solution(root, method, tree.branch())

    def _worthwhile(self, subproblem: Subproblem) -> bool:
        """Whether it may hold an assignment that is better by the gap."""
        best = self.pool.target_us
        return best == math.inf or best - subproblem.bound > self.margin * abs(best)

    def _small_program(self, subproblem: Subproblem) -> RestrictedDomains | None:
        """The integer program of a subproblem, if it is small."""
        if math.isfinite(self.subproblems) or subproblem.size() > SMALL_PROGRAM // 3:
            return None
        problem = replace(self.pool.problem, rows=tuple(self.pool.rows))
        restricted = RestrictedDomains(problem, subproblem.domains)
        return restricted if size_of(restricted.problem) <= SMALL_PROGRAM else None

    def _find_feasible(self, root: Subproblem) -> None:
        """Visit an assignment within the hard rows: at high prices for them, or else by minimizing
        the largest excess."""
        pool = self.pool
        for price in FEASIBILITY_PRICES:
            root.evaluate(pool.hard_prices(price))
            if pool.choices is not None:
                return
        seconds = self.end - time.process_time()
        try:
            pool.visit(self._least_excess(FEASIBILITY_SHARE * seconds))
        except InfeasibleError as error:
            if error.proven:
                raise
            for choices in self.fallback():
                pool.visit(choices)
            if pool.choices is None:
                pool.visit(self._least_excess(math.inf))

    def _least_excess(self, seconds: float) -> Choices:
        """An assignment within the hard rows, found by minimizing the largest excess over a limit.

        Raises:
            InfeasibleError: that excess is positive.
        """
        rows, problem = self.pool.rows, self.pool.problem
        # A slack is not negative, but an excess may be: it is counted from minus the largest limit.
        # Bytes run to 1e11, so they are counted in units of that limit.
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
            rows = self.separate(choices) if self.separate is not None else ()
            return [soft(row) for row in rows if not row.slack]

        relaxed = Problem(
            tuple(map(free, problem.time_us)),
            tuple(replace(e, time_us=free(e.time_us)) for e in problem.edges),
            tuple(soft(row) for row in rows if not row.slack),
            problem.names,
        )
        search = partial(
            solve, relaxed, separate=violated, enough_us=1.0, disable=self.pool.disable
        )
        seconds = min(seconds, max(1.0, self.end - time.process_time()))
        solution = search(time_limit=seconds, subproblems=0)
        if solution.time_us > 1 + 1e-9:
            if solution.bound_us > 1:  # proven: a closer number is worth little
                seconds = min(seconds, CLOSER_S)
            solution = search(time_limit=seconds, starts=[solution.choices], prices=solution.prices)
        if solution.time_us > 1 + 1e-9:
            needed = offset * solution.time_us
            raise InfeasibleError(
                f"no assignment is within the limits: the largest needs {needed:.6g}, and has "
                f"{offset:.6g}",
                budget_bytes=offset,
                smallest_bytes=needed,
                proven=solution.bound_us > 1,
                choices=solution.choices,
            )
        return solution.choices
