"""The search: the solver over the space, first with repeated blocks tied, then less so.

Tied copies of a block are one decision, so that depth costs nothing. That is a restriction: the
first and the last block, whose neighbours differ, are untied next. If a gap remains, every second
block is untied, and so on, so that any share of the blocks can make a choice. Each problem starts
from the choices and the prices of the one before. The steps of all problems are recorded: they show
what tying costs.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from autopar.errors import InfeasibleError
from autopar.ir.repeats import pattern
from autopar.plan_records import SolverRecord
from autopar.planner.axis_groups import groups_text
from autopar.planner.baselines import baseline_plans
from autopar.planner.constraints import Allowed, masked
from autopar.planner.liveness import Liveness
from autopar.planner.liveness_rows import LivenessRows
from autopar.planner.series import Item
from autopar.planner.space import SearchSpace
from autopar.planner.tied_repeats import block_positions, interleave, untie_ends
from autopar.solver import PairCost, Solution, solve
from autopar.solver.problem import Branch, Choices
from autopar.solver.reductions import RestrictedDomains, TiedProblem, TiedVariables
from autopar.solver.restricted_mip import combine
from autopar.solver.solve import TARGET_GAP
from autopar.units import bytes_text, time_text

# Which copies of a block are tied.
ALL_TIED, ENDS, EVERY_SECOND = "all blocks tied", "first and last untied", "every second untied"
# Untied blocks have to save at least this share of a step.
SIMPLER = 1e-4
# Parts (a half, a quarter, ...) into which blocks are untied, and segments of the step in which
# rows are separated then.
PARTS, SEGMENTS = 4, 16
# restricted MIPs over parts, at most
COMBINING = 3
# A relaxed problem may take this many times as long as all before, and at least these seconds.
CLOSING, CLOSING_S = 1.0, 3.0
# Of a problem with untied blocks, a larger gap than this is left open: its subproblems take long.
# The problem is then solved for its plan alone, if it has at most so many choices.
BRANCHING_GAP, SMALL = 1.5e-3, 10_000
# Subproblems that branching explores with all blocks tied, and parts of a branching tree that are
# replayed with the ends untied.
SUBPROBLEMS, REPLAYED = 1000, 8


@dataclass(frozen=True)
class SearchResult:
    """Choices per decision, and their quality.

    Args:
        bounded: which copies the bound's plans have tied, of `sharing`; "" if there are none.
        sharing: which copies were tied, and the best step with that, from all tied to least tied.
        seconds: that the search took.
        tied: the choices with all blocks tied; none if they were not searched.
        trade: memory and time against those of the fastest plan, if that is another one.
        alike: the axes that all plans of the space split alike, in words.
    """

    choices: Choices
    step_us: float
    bound_us: float
    method: str
    bounded: str = ""
    sharing: tuple[tuple[str, float], ...] = ()
    seconds: float = 0.0
    tied: Choices = ()
    trade: str = ""
    alike: str = ""

    @property
    def gap(self) -> float:
        """The share of the step by which a better plan might be faster, at most."""
        return max(0.0, 1 - self.bound_us / self.step_us) if self.step_us else 0.0

    def tied_within(self, share: float) -> SearchResult:
        """The plan with all blocks tied, if its step is at most a share longer; else this one."""
        step_us = dict(self.sharing).get(ALL_TIED, math.inf)
        if not self.tied or step_us > (1 + share) * self.step_us:
            return self
        return replace(self, choices=self.tied, step_us=step_us)

    def describe(self) -> str:
        """`a step of 20.1 ms, within 0.05% of the optimum`."""
        if self.trade:
            return f"a step of {time_text(self.step_us)}, {self.trade}"
        tied = self.bounded != (self.sharing or (("", 0.0),))[-1][0]
        among = f" with {self.bounded}" if tied else ""
        among += self.alike and f" where {self.alike}"
        return f"a step of {time_text(self.step_us)}, within {self.gap:.2%} of the optimum{among}"

    def record(self, seconds: Mapping[str, float]) -> SolverRecord:
        """The entry of a plan, with the seconds by stage."""
        return SolverRecord(
            self.method, self.step_us, self.bound_us, self.gap, dict(seconds),
            dict(self.sharing), self.bounded, self.trade, self.alike,
        )  # fmt: skip


def search(
    space: SearchSpace,
    *,
    budget_bytes: float,
    time_limit: float,
    progress: Callable[[str], None] | None = None,
    mask: Allowed | None = None,
    disable: frozenset[str] = frozenset(),
    us_per_byte: float = 0.0,
    is_enough: Callable[[SearchResult], bool] | None = None,
) -> SearchResult:
    """The fastest plan within the budget at every program point of the step.

    Args:
        budget_bytes: per device; infinite for no limit.
        time_limit: seconds.
        mask: candidates per decision, where not all of them are allowed.
        disable: names of `solver.LAYERS` to switch off, to measure what they earn.
        us_per_byte: price of the bytes that are held (`SearchSpace.held_bytes`), which the times of
            the result then have in them.
        is_enough: of the plan with all blocks tied, whether no better one is looked for.

    Raises:
        InfeasibleError: naming the smallest feasible budget.
    """
    return _Search(
        space,
        Liveness(space, budget_bytes),
        masked(space.problem(us_per_byte), mask or {}),
        mask or {},
        time_limit,
        progress or (lambda line: None),
        disable,
        is_enough,
    ).run()


@dataclass
class _Search:
    """State of a search: the best plan so far, and the best step of each problem."""

    space: SearchSpace
    liveness: Liveness
    ties: TiedProblem
    mask: Allowed
    time_limit: float
    say: Callable[[str], None]
    disable: frozenset[str]
    is_enough: Callable[[SearchResult], bool] | None
    start: float = field(default_factory=time.process_time)
    best: SearchResult = field(init=False)
    steps: dict[str, float] = field(default_factory=dict)

    @property
    def spent(self) -> float:
        return time.process_time() - self.start

    def run(self) -> SearchResult:
        classes, ends = list(self.ties.classes), untie_ends(self.ties.classes)
        repeated = ends != classes
        tied = self.ties.tied()
        solution = self._all_tied(tied, repeated)
        if repeated and not (self.is_enough and self.is_enough(self.best)):
            parts = self._interleaved(ends, tied, solution)
            if solution.gap > TARGET_GAP:
                solution = self._branched(tied, solution)
            self._untie(ends, parts, tied, solution)
        if self.best.choices != tied.expand(tied.contract(self.best.choices)):
            self.best = replace(self.best, choices=self._tied_where_equal(self.best.choices))
        bound = min(self.best.bound_us, self.best.step_us)
        return replace(
            self.best, bound_us=bound, sharing=tuple(self.steps.items()), seconds=self.spent,
            alike=groups_text(self.space.groups),
        )  # fmt: skip

    def _all_tied(self, tied: TiedVariables, repeated: bool) -> Solution:
        """Solve with all copies of a block tied; if there are any, without branching.

        Raises:
            InfeasibleError: naming the smallest feasible budget.
        """

        def baselines() -> Iterator[Choices]:
            self.say("no plan that fits is known yet: baselines ...")
            limit = self.time_limit / 8
            for baseline in baseline_plans(self.space, time_limit=limit, mask=self.mask):
                yield tied.contract(baseline.choices)

        try:
            solution = self._solve(
                tied, None, self.time_limit, (), fallback=baselines,
                mip_rounds=2 if repeated else 6, subproblems=0 if repeated else math.inf,
            )  # fmt: skip
        except InfeasibleError as error:
            if not math.isfinite(error.smallest_bytes):
                raise
            budget, smallest = self.liveness.memory.limit, error.smallest_bytes
            mesh = self.space.cluster.mesh_text
            breakdown = _peak_breakdown(self.liveness, tied.expand(error.choices))
            raise InfeasibleError(
                f"no plan fits {bytes_text(budget)} per device on mesh {mesh}: the smallest "
                f"budget with a plan is {bytes_text(smallest)} ({smallest:.0f} bytes), "
                f"{breakdown}. Set the memory to at least that, use more devices, or make the "
                "batch smaller.",
                budget_bytes=budget,
                smallest_bytes=smallest,
            ) from None
        choices, method = tied.expand(solution.choices), solution.method
        name = ALL_TIED
        self.best = SearchResult(
            choices, solution.time_us, solution.bound_us, method, name, tied=choices
        )
        self.steps[name] = solution.time_us
        return solution

    def _interleaved(
        self, ends: Sequence[int], tied: TiedVariables, solution: Solution
    ) -> Sequence[int] | None:
        """Untie every second block and so on if prices did not close the gap. The classes then;
        None if that did not help.

        Args:
            solution: with all blocks tied.
        """
        if not solution.near or self.disable & {"interleaving", "restricted MIP"}:
            return None
        parts = interleave(ends, block_positions(self.space, ends), PARTS)
        better = self._combined(parts, _expanded(solution, tied))
        if better is None:
            return None
        step = self.ties.problem.choices_us(better) + self.liveness.exposed_us(better)
        self._keep(EVERY_SECOND, better, step)
        return parts

    def _branched(self, tied: TiedVariables, solution: Solution) -> Solution:
        """Branch with all blocks tied, until nothing is better than the best plan known: one with
        untied blocks may be better than all of these.

        Args:
            solution: at its prices.
        """
        seconds = self.time_limit - self.spent
        if seconds <= 0:
            return solution
        starts = [tied.contract(self.best.tied), *solution.near]
        new = self._solve(
            tied, solution, seconds, starts, subproblems=SUBPROBLEMS, mip_rounds=0,
            better_than_us=self.best.step_us,
        )  # fmt: skip
        self.steps[ALL_TIED] = new.time_us
        choices = tied.expand(new.choices)
        self.best = replace(self.best, bound_us=new.bound_us, method=new.method, tied=choices)
        if new.time_us < self.best.step_us:
            self.best = replace(self.best, choices=choices, step_us=new.time_us)
        return replace(new, near=solution.near)

    def _untie(
        self, ends: Sequence[int], parts: Sequence[int] | None, tied: TiedVariables,
        solution: Solution,
    ) -> None:  # fmt: skip
        """Solve with every second block untied and so on, if that helped; else the first and the
        last block.

        Args:
            solution: with all blocks tied.
        """
        before = _expanded(solution, tied)
        name, classes = (ENDS, ends) if parts is None else (EVERY_SECOND, parts)
        # no prices bound a relaxed problem higher than this one
        open_gap = self.best.step_us - before.relaxed_us > BRANCHING_GAP * self.best.step_us
        relaxed = self.ties.tied(classes)
        if open_gap and sum(map(len, relaxed.problem.time_us)) > SMALL:
            return
        tree = None
        if name == ENDS and solution.gap <= TARGET_GAP and "replay" not in self.disable:
            tree = _for_middle_copies(solution.tree, self.ties.classes, ends)
        if tree is not None and tree.leaves > REPLAYED:
            tree = None
        self._solve_relaxed(name, relaxed, before, tree)

    def _solve_relaxed(
        self, name: str, tied: TiedVariables, before: Solution, tree: Branch | None
    ) -> None:
        """Solve with fewer copies tied, and update the best plan, and the bound if it is close.

        Args:
            tied: the problem.
            before: of the problem before, over all decisions; its choices and prices are the start.
            tree: of branching on that problem, to replay.
        """
        seconds = min(self.time_limit - self.spent, max(CLOSING * self.spent, CLOSING_S))
        if seconds <= 0:
            return
        starts = [tied.contract(c) for c in (self.best.choices, *before.near)]
        solution = self._solve(
            tied, before, seconds, starts, tree, mip_rounds=4, branching_gap=BRANCHING_GAP
        )
        if math.isfinite(solution.bound_us):
            self._keep(name, tied.expand(solution.choices), solution.time_us)
            relaxed = replace(
                self.best, bound_us=solution.bound_us, method=solution.method, bounded=name
            )
            # the bound of a problem that was closed says more than one that is still open
            if relaxed.gap <= TARGET_GAP or self.best.gap > TARGET_GAP:
                self.best = relaxed

    def _keep(self, name: str, choices: Choices, step_us: float) -> None:
        """Record the best step of a problem with fewer copies tied; keep the plan if it is faster.
        One with more blocks tied reads better."""
        self.steps[name] = step_us
        self.say("blocks: " + ", ".join(f"{how} {us:.0f} us" for how, us in self.steps.items()))
        if step_us < self.best.step_us * (1 - SIMPLER):
            self.best = replace(self.best, choices=choices, step_us=step_us)

    def _combined(self, classes: Sequence[int], before: Solution) -> Choices | None:
        """The best plan, over all decisions, made of choices visited before when fewer copies are
        tied; None if none is better by the gap or as good as the bound allows."""
        tied = self.ties.tied(classes)
        starts = [tied.contract(c) for c in (self.best.choices, *before.near)]
        restricted = RestrictedDomains(
            tied.problem, [np.unique(column) for column in zip(*starts, strict=True)]
        )
        rows = LivenessRows(self.liveness, tied, SEGMENTS, restricted)
        combined = combine(
            replace(restricted.problem, rows=tuple(map(rows.named, before.prices))),
            [restricted.contract(c) for c in starts],
            separate=rows, prices=before.prices, rounds=COMBINING, gap=TARGET_GAP, say=self.say,
            enough_us=before.relaxed_us / (1 - TARGET_GAP),
            expired=lambda: self.spent > self.time_limit, disable=self.disable,
        )  # fmt: skip
        choices = tied.expand(restricted.expand(combined))
        return choices if choices != self.best.choices else None

    def _solve(
        self,
        tied: TiedVariables,
        before: Solution | None,
        seconds: float,
        starts: Sequence[Choices],
        tree: Branch | None = None,
        **options: Any,
    ) -> Solution:
        """Solve, from the prices of a more restricted problem, if there was one."""
        prices = before.prices if before is not None else {}
        rows = LivenessRows(self.liveness, tied)
        names = dict.fromkeys([*prices, *_priced_rows(tree)])
        return solve(
            replace(tied.problem, rows=tuple(map(rows.named, names))),
            separate=rows, starts=starts, prices=prices, tree=tree, time_limit=seconds,
            progress=self.say, disable=self.disable, **options,
        )  # fmt: skip

    def _tied_where_equal(self, choices: Choices) -> Choices:
        """The choices, with each copy tied to those in the middle where that costs nothing: plans
        that differ for no reason are hard to read."""
        problem = self.ties.problem
        copies: dict[int, list[int]] = defaultdict(list)
        for v, c in enumerate(self.ties.classes):
            copies[c].append(v)
        touching: dict[int, list[PairCost]] = defaultdict(list)
        for edge in problem.edges:
            touching[edge.source].append(edge)
            touching[edge.target].append(edge)
        current = list(choices)

        def local_us(v: int) -> float:
            around = sum(
                float(e.time_us[current[e.source], current[e.target]]) for e in touching[v]
            )
            return float(problem.time_us[v][current[v]]) + around

        def exposed_and_excess() -> tuple[float, float]:
            excess = self.liveness.memory.values(current).max() - self.liveness.memory.limit
            return self.liveness.exposed_us(current), max(0.0, float(excess))

        exposed, excess = exposed_and_excess()
        for nodes in copies.values():
            usual = current[nodes[len(nodes) // 2]]
            for v in nodes:
                before, own = local_us(v), current[v]
                if own == usual:
                    continue
                current[v] = usual
                if local_us(v) > before + 1e-9 * max(1.0, abs(before)):
                    current[v] = own
                    continue
                after = exposed_and_excess()
                if after[0] > exposed + 1e-9 * max(1.0, exposed) or after[1] > excess:
                    current[v] = own
        return tuple(current)


def _expanded(solution: Solution, tied: TiedVariables) -> Solution:
    """A solution whose assignments near the best are over all decisions."""
    return replace(solution, near=tuple(map(tied.expand, solution.near)))


def _for_middle_copies(
    tree: Branch | None, classes: Sequence[int], relaxed: Sequence[int]
) -> Branch | None:
    """A branching tree over classes, over the relaxed classes of their middle copies."""
    if tree is None:
        return None
    copies: dict[int, list[int]] = defaultdict(list)
    order = {c: i for i, c in enumerate(dict.fromkeys(relaxed))}
    for c, new in zip(classes, relaxed, strict=True):
        copies[c].append(order[new])
    middle = [same[len(same) // 2] for same in copies.values()]

    def translated(branch: Branch) -> Branch:
        decided = {middle[v]: side for v, side in branch.decided.items()}
        return Branch(decided, branch.prices, tuple(map(translated, branch.parts)))

    return translated(tree)


def _priced_rows(tree: Branch | None) -> list[str]:
    """The names of the rows that have prices in a tree."""
    if tree is None:
        return []
    return [*tree.prices, *(name for part in tree.parts for name in _priced_rows(part))]


def _peak_breakdown(liveness: Liveness, choices: Choices) -> str:
    """The memory of a plan at its peak: kinds, and the modules with most of it."""
    space, series = liveness.space, liveness.memory

    def module(item: Item) -> str:
        decision = item.decisions[-1]
        if space.decisions[decision].kind == "output":
            return "the results for the caller"
        location = space.location(decision)
        if location[:1].isdigit():  # of a Sequential, whose parts differ
            return f"module {location}"
        return pattern(location) or space.decisions[decision].node.name

    def largest(label: Callable[[Item], str]) -> list[tuple[str, float]]:
        parts = series.breakdown(choices, int(np.argmax(series.values(choices))), label)
        return sorted(parts.items(), key=lambda entry: -entry[1])

    kinds, modules = largest(lambda item: item.kind), largest(module)[:3]
    by_kind = ", ".join(f"{kind} {bytes_text(n)}" for kind, n in kinds if n)
    by_module = ", ".join(f"{bytes_text(n)} in {name}" for name, n in modules)
    return f"of which {by_kind}; most of it {by_module}"
