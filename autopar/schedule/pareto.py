"""The Pareto front of a program: for every budget, the schedule that costs least.

Candidates come from the chain (options per stage, composed by the rotor program), from one integer
program over the whole step, and from common checkpointing policies. The same simulation scores all
of them, and the best are refined to the budget. So no candidate is better than the front.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from autopar.schedule.build import schedule_of
from autopar.schedule.chained import chain_schedules
from autopar.schedule.options import StageModel
from autopar.schedule.program import Program, Schedule, eager_schedule
from autopar.schedule.refine import Refiner
from autopar.schedule.simulate import peak_bytes
from autopar.schedule.stages import Stage, linearize
from autopar.schedule.streams import host_wait_us

_STARTS = 6  # candidates that are refined
_EXPENSIVE = ("mm.", "bmm", "convolution", "attention")
_LOWER = (0.8, 0.9, 0.97)  # steps in which the smallest peak is sought
_FAR_FROM_BEST = 1.3
_SHARES = tuple(k / 24 for k in range(24))  # of the bytes that eager keeps
_SECONDS = 0.3  # for each integer program over all operators


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


class ScheduleFront:
    """Schedules of a program for all budgets.

    Args:
        cost: of recomputing each operator; its predicted time if None.
    """

    def __init__(self, program: Program, cost: Mapping[int, float] | None = None) -> None:
        self.program = program
        self.cost = cost or {i: op.us for i, op in enumerate(program.ops)}
        self.refiner = Refiner(program, self.cost)
        self.candidates: list[SchedulePoint] = []
        self._add("keep everything", eager_schedule(program))
        self.eager_bytes = self.candidates[0].peak_bytes
        stages = linearize(program)
        common = _common(program, stages)
        self._add_checkpointing(stages, common)
        for schedule in chain_schedules(program, stages, common, self.cost, self.eager_bytes):
            self._add("chain", schedule)
        self._add_global()

    def point(self, name: str, schedule: Schedule) -> SchedulePoint:
        """Score a schedule."""
        peak = peak_bytes(self.program, schedule)
        cost = schedule.recompute_cost(self.program, self.cost)
        return SchedulePoint(schedule, peak, cost + host_wait_us(self.program, schedule), name)

    def _add(self, name: str, schedule: Schedule) -> None:
        self.candidates.append(self.point(name, schedule))

    def _add_checkpointing(self, stages: Sequence[Stage], common: frozenset[int]) -> None:
        """Common policies: checkpoint every block, every second, √n of them; and save the results
        of matrix products, convolutions and attention."""
        program = self.program
        borders = [s.input for s in stages if s.input >= 0]
        for every in sorted({1, 2, max(1, round(math.sqrt(len(stages))))}):
            self._add("checkpointing", schedule_of(program, {*borders[::every], *common}))
        expensive = {
            s
            for i in program.forward
            for s in program.ops[i].makes
            if any(word in program.ops[i].kind for word in _EXPENSIVE)
        }
        self._add("checkpointing", schedule_of(program, {*borders, *common, *expensive}))

    def _add_global(self) -> None:
        """Choices for the whole program as one stage: they see what stages hide from each other,
        but not when anything is alive."""
        program = self.program
        model = StageModel(program, Stage(program.forward, program.backward, -1, -1, ""), self.cost)
        for share in _SHARES:
            kept = model.solve(share * model.needed_bytes, seconds=_SECONDS)
            if kept is not None:
                self._add("global", schedule_of(program, kept))

    def solve(self, budgets: Sequence[float]) -> list[SchedulePoint | None]:
        """For every budget, the best schedule whose peak is within it; None if there is none.

        Each start is shrunk from the largest budget to the smallest, and abandoned if another one
        is far better.
        """
        order = sorted(range(len(budgets)), key=lambda k: -budgets[k])
        best: list[SchedulePoint | None] = [
            min((c for c in self.candidates if c.peak_bytes <= b), key=_by_cost, default=None)
            for b in budgets
        ]
        starts = undominated(c for c in self.candidates if c.name != "chain")
        for start in starts[:: max(1, len(starts) // _STARTS)]:
            schedule = start.schedule
            for k in order:
                smaller = self.refiner.shrink(schedule, budgets[k])
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
            for point, budget in zip(best, budgets, strict=True)
        ]

    def grown(self, point: SchedulePoint, budget: float) -> SchedulePoint:
        """The schedule, keeping more as far as the budget allows."""
        return self.point(point.name, self.refiner.grow(point.schedule, budget))

    def smallest(self) -> SchedulePoint:
        """The schedule with the smallest peak that the search can reach."""
        least = min(self.candidates, key=_by_peak)
        starts = [least]
        if self.program.transfers:  # offloading may be a dead end where recomputation is not
            recompute_only = Refiner(replace(self.program, transfers={}), self.cost)
            starts.append(self._lowered(least, recompute_only))
        return min((self._lowered(start, self.refiner) for start in starts), key=_by_peak)

    def _lowered(self, best: SchedulePoint, refiner: Refiner) -> SchedulePoint:
        """Refined as far as that lowers the peak."""
        for share in _LOWER:
            while True:
                smaller = refiner.shrink(best.schedule, share * best.peak_bytes, steps=400)
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
