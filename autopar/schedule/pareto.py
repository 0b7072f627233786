"""The Pareto front of a program: for every budget, the schedule that costs least.

Candidates come from the chain (options per stage, composed by the rotor program), from one integer
program over the whole step, and from common checkpointing policies. The same simulation scores all
of them, and the best are refined to the budget. So no candidate is better than the front.
"""

from __future__ import annotations

import itertools
import math
import operator
import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from autopar.schedule.build import schedule_of
from autopar.schedule.chained import ChainSchedules
from autopar.schedule.options import StageModel
from autopar.schedule.program import Program, Schedule, eager_schedule
from autopar.schedule.refine import Refiner
from autopar.schedule.simulate import peak_bytes
from autopar.schedule.stages import Stage, linearize
from autopar.schedule.streams import host_wait_us

_STARTS = 6  # candidates that are refined, in programs of up to
_FEW_OPS = 1500  # operators; fewer in longer ones
_MANY_STAGES = 12  # of which the chain is better than what other searches reach in time
_EXPENSIVE = ("mm.", "bmm", "convolution", "attention")
_LOWER = (0.8, 0.9, 0.97)  # steps in which the smallest peak is sought
_FAR_FROM_BEST = 1.3
_SHARES = tuple(k / 24 for k in range(24))  # of the bytes that eager keeps
_SECONDS = 0.3  # for each integer program over all operators
# What is kept, as a share of the peak, by the schedules of the whole program that are tried.
_LEAST_KEPT, _MOST_KEPT = 0.85, 1.25
# In programs of many operators, growing keeps so many results at once, and ends below that gain.
_TOGETHER, _LEAST_GAIN = 256, 1e-4
_COMMON = ("keep everything", "checkpointing")  # policies that need no search
_CHAIN_TRIED = 3  # schedules of the chain on either side of where they begin to fit a budget
_SPREAD = 400  # schedules of the chain, evenly over its budgets, that look for the smallest peak


@dataclass(frozen=True)
class SchedulePoint:
    """A schedule, scored.

    Args:
        peak_bytes: simulated.
        cost: of recomputation, in the unit of the front's costs, and of waiting for copies to the
            host, in microseconds.
        name: of the method.
    """

    schedule: Schedule
    peak_bytes: int
    cost: float
    name: str


def has_many_operators(program: Program) -> bool:
    """Whether a program has too many to search its schedules thoroughly."""
    return len(program.ops) > _FEW_OPS


class ScheduleFront:
    """Schedules of a program for all budgets.

    Args:
        cost: of recomputing each operator; its predicted time if None.
        until: the processor time at which searches end with what they have.
    """

    def __init__(
        self, program: Program, cost: Mapping[int, float] | None = None, until: float = math.inf
    ) -> None:
        self.program, self.until = program, until
        self.cost = cost or {i: op.us for i, op in enumerate(program.ops)}
        self.refiner = Refiner(program, self.cost)
        self.candidates: list[SchedulePoint] = []
        self._add(_COMMON[0], eager_schedule(program))
        self.eager_bytes = self.candidates[0].peak_bytes
        self._stages = linearize(program)
        self._common = _common(program, self._stages)
        self._add_checkpointing(self._stages, self._common)
        self._chained: dict[int, SchedulePoint] = {}
        self._tried_shares: set[float] = set()

    @property
    def _is_over(self) -> bool:
        return time.process_time() > self.until

    @cached_property
    def _chain(self) -> ChainSchedules | None:
        """None if there is no time for it."""
        stages, memory = self._stages, self.eager_bytes
        try:
            return ChainSchedules(self.program, stages, self._common, self.cost, memory, self.until)
        except TimeoutError:
            return None

    @property
    def _chain_budgets(self) -> Sequence[float]:
        return () if self._chain is None else self._chain.budgets

    @cached_property
    def _whole(self) -> StageModel:
        """The whole program as one stage: it sees what stages hide from each other, but not when
        anything is alive."""
        stage = Stage(self.program.forward, self.program.backward, -1, -1, "")
        return StageModel(self.program, stage, self.cost)

    @property
    def _is_long(self) -> bool:
        return has_many_operators(self.program) and len(self._stages) >= _MANY_STAGES

    def point(self, name: str, schedule: Schedule) -> SchedulePoint:
        """Score a schedule."""
        peak = peak_bytes(self.program, schedule)
        cost = schedule.recompute_cost(self.program, self.cost)
        return SchedulePoint(schedule, peak, cost + host_wait_us(self.program, schedule), name)

    def _add(self, name: str, schedule: Schedule) -> SchedulePoint:
        self.candidates.append(self.point(name, schedule))
        return self.candidates[-1]

    def _add_checkpointing(self, stages: Sequence[Stage], common: frozenset[int]) -> None:
        """Common policies: checkpoint every block, every second, √n of them; and save the results
        of matrix products, convolutions and attention."""
        program = self.program
        borders = [s.input for s in stages if s.input >= 0]
        for every in sorted({1, 2, max(1, round(math.sqrt(len(stages))))}):
            self._add(_COMMON[1], schedule_of(program, {*borders[::every], *common}))
        expensive = {
            s
            for i in program.forward
            for s in program.ops[i].makes
            if any(word in program.ops[i].kind for word in _EXPENSIVE)
        }
        self._add(_COMMON[1], schedule_of(program, {*borders, *common, *expensive}))

    def _add_for(self, budget: float) -> None:
        """Add the schedules that may be the best within a budget."""
        if self._is_over:
            return
        chain = self._chain_budgets
        low, high = 0, len(chain)  # the first that fits is between them
        above = 0.0  # by so much the last peak exceeds the chain's budget
        for halves in itertools.cycle((False, False, True)):
            if low == high or self._is_over:
                break
            near = bisect_left(chain, above - budget, low, high - 1, key=operator.neg)
            k = (low + high) // 2 if halves else near
            peak = self._of_chain(k).peak_bytes
            above = peak - chain[k]
            low, high = (low, k) if peak <= budget else (k + 1, high)
        for k in range(max(0, low - _CHAIN_TRIED), min(len(chain), low + _CHAIN_TRIED)):
            self._of_chain(k)
        if self._is_long:
            return
        for share in _SHARES:
            kept = share * self._whole.needed_bytes
            if _LEAST_KEPT * budget <= kept <= _MOST_KEPT * budget and not self._is_over:
                self._add_whole(share)

    def _of_chain(self, k: int) -> SchedulePoint:
        """The schedule for one of the chain's budgets, which is a candidate then."""
        if k not in self._chained:
            assert self._chain is not None
            self._chained[k] = self._add("chain", self._chain.schedule(self._chain.budgets[k]))
        return self._chained[k]

    def _add_whole(self, share: float) -> None:
        """Add the cheapest schedule that keeps at most a share of what eager keeps."""
        if share in self._tried_shares:
            return
        self._tried_shares.add(share)
        kept = self._whole.solve(share * self._whole.needed_bytes, seconds=_SECONDS)
        if kept is not None:
            self._add("global", schedule_of(self.program, kept))

    def solve(
        self, budgets: Sequence[float], through: Sequence[float] = ()
    ) -> list[SchedulePoint | None]:
        """For every budget, the best schedule whose peak is within it; None if there is none.

        Each start is shrunk from the largest budget to the smallest, and abandoned if another one
        is far better.

        Args:
            through: more budgets, that schedules are shrunk to on the way.
        """
        for budget in budgets:
            self._add_for(budget)
        asked, budgets = len(budgets), [*budgets, *through]
        order = sorted(range(len(budgets)), key=lambda k: -budgets[k])
        best: list[SchedulePoint | None] = [
            min((c for c in self.candidates if c.peak_bytes <= b), key=_by_cost, default=None)
            for b in budgets
        ]
        too_large = [c for c in self.candidates if c.peak_bytes > min(budgets)]
        starts = undominated(c for c in too_large if c.name != "chain")
        starts = starts[:: max(1, len(starts) // _STARTS)]
        count = max(1, min(_STARTS, _STARTS * _FEW_OPS // len(self.program.ops)))
        tried = () if self._is_long and None not in best[:asked] else starts[-count:]
        for start in tried:
            schedule = start.schedule
            for k in order:
                smaller = self.refiner.shrink(schedule, budgets[k], until=self.until)
                if smaller is None:
                    break
                schedule = smaller
                point = self.point("refined", schedule)
                now = best[k]
                if now is None or _by_cost(point) < _by_cost(now):
                    best[k] = point
                elif point.cost > _FAR_FROM_BEST * now.cost and k != order[0]:
                    break
        return [
            None if point is None else self.grown(point, budget)
            for point, budget in zip(best[:asked], budgets, strict=False)
        ]

    def grown(self, point: SchedulePoint, budget: float) -> SchedulePoint:
        """The schedule, keeping more as far as the budget allows."""
        limits = (_TOGETHER, _LEAST_GAIN) if has_many_operators(self.program) else (1, 0.0)
        grown = self.refiner.grow(point.schedule, budget, *limits, until=self.until)
        return self.point(point.name, grown)

    def low(self, enough: float = 0.0, until: float = math.inf) -> SchedulePoint:
        """A schedule with a low peak, found quickly: common checkpointing, refined.

        Args:
            enough: bytes; no lower peak is looked for.
            until: the processor time at which refining ends.
        """
        until = min(until, self.until)
        return self._lowered(self.checkpointed(), self.refiner, enough, until)

    def checkpointed(self) -> SchedulePoint:
        """The schedule with the lowest peak by common checkpointing."""
        return min((c for c in self.candidates if c.name in _COMMON), key=_by_peak)

    def smallest(self) -> SchedulePoint:
        """The schedule with the smallest peak that the search can reach."""
        few = not has_many_operators(self.program)
        count = len(self._chain_budgets)
        last = max(0, count - 2 * _CHAIN_TRIED)
        for k in (*range(last, count), *range(0, last if few else 0, max(1, last // _SPREAD))):
            if self._is_over:
                break
            self._of_chain(k)
        for share in _SHARES if few else _SHARES[:2]:
            if self._is_over:
                break
            self._add_whole(share)
        least = min(self.candidates, key=_by_peak)
        # one that does not depend on the budgets that were tried: a peak that is named as the
        # smallest is found again within it
        fixed = min((c for c in self.candidates if c.name in (*_COMMON, "global")), key=_by_peak)
        chained = [self._chained[k] for k in sorted(self._chained) if k >= last]
        starts = [least, self.low(), min((fixed, *chained), key=_by_peak)]
        starts = list({id(start): start for start in starts}.values())
        if self.program.transfers:  # offloading may be a dead end where recomputation is not
            recompute_only = Refiner(replace(self.program, transfers={}), self.cost)
            starts.append(self._lowered(least, recompute_only, until=self.until))
        lowered = [self._lowered(start, self.refiner, until=self.until) for start in starts]
        return min(lowered, key=_by_peak)

    def _lowered(
        self, best: SchedulePoint, refiner: Refiner, enough: float = 0.0, until: float = math.inf
    ) -> SchedulePoint:
        """Refined as far as that lowers the peak."""
        for share in _LOWER:
            while best.peak_bytes > enough:
                limit = share * best.peak_bytes
                smaller = refiner.shrink(best.schedule, limit, steps=400, until=until)
                if smaller is None:
                    break
                best = self.point("refined", smaller)
                self.candidates.append(best)
        return best


def _common(program: Program, stages: Sequence[Stage]) -> frozenset[int]:
    """Storages other than borders that several stages read; refining may drop them."""
    borders = {s.input for s in stages} | {s.output for s in stages}
    of = {s: k for k, g in enumerate(stages) for i in g.forward for s in program.ops[i].makes}
    common = set()
    for k, stage in enumerate(stages):
        for i in (*stage.forward, *stage.backward):
            common |= {s for s in program.ops[i].reads if of.get(s, k) != k}
    return frozenset((common & program.needed) - borders)


def _by_cost(point: SchedulePoint) -> tuple[float, float]:
    return point.cost, point.peak_bytes


def _by_peak(point: SchedulePoint) -> tuple[float, float]:
    return point.peak_bytes, point.cost


def undominated(points: Iterable[SchedulePoint]) -> list[SchedulePoint]:
    """The Pareto front of some points, from the largest peak down."""
    front: list[SchedulePoint] = []
    best = math.inf
    for point in sorted(points, key=_by_peak):
        if point.cost < best:
            front.append(point)
            best = point.cost
    return front[::-1]
