"""The front of a program: for every budget the schedule that computes least again.

Candidates come from the chain (options per stage, composed by the rotor program, at two
granularities) and from what users do by hand; all are scored by the same simulation, and the best
of them are refined to the budget. So no candidate is better than the front.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from autopar.schedule.build import schedule_of
from autopar.schedule.chained import chain_schedules
from autopar.schedule.offload import waited_us
from autopar.schedule.options import Model
from autopar.schedule.program import Program, Schedule, eager_schedule
from autopar.schedule.refine import Refiner
from autopar.schedule.simulate import peak_bytes
from autopar.schedule.stages import Stage, linearize

_STARTS = 6  # choices for the whole program that are refined
_DEAR = ("mm.", "bmm", "convolution", "attention")
_LOWER = (0.8, 0.9, 0.97)  # steps in which the smallest peak is sought
_FAR_FROM_BEST = 1.3
_SHARES = tuple(k / 24 for k in range(24))  # of what eager keeps
_SECONDS = 0.3  # for each program over all operators


@dataclass(frozen=True)
class Point:
    """A schedule, scored.

    Args:
        peak_bytes: simulated.
        cost: of what is computed again, in the unit that was asked for, and of waiting for copies
            to the host, in microseconds.
        name: of the method.
    """

    schedule: Schedule
    peak_bytes: int
    cost: float
    name: str


class Front:
    """Schedules of a program for all budgets.

    Args:
        cost: of running each operator again; its predicted time if None.
    """

    def __init__(self, program: Program, cost: Mapping[int, float] | None = None) -> None:
        self.program = program
        self.cost = cost or {i: op.us for i, op in enumerate(program.ops)}
        self.refiner = Refiner(program, self.cost)
        self.candidates: list[Point] = []
        self._add("keep everything", eager_schedule(program))
        self.eager_bytes = self.candidates[0].peak_bytes
        stages = linearize(program)
        self._baselines(stages)
        common = self._common(stages)
        for schedule in chain_schedules(program, stages, common, self.cost, self.eager_bytes):
            self._add("chain", schedule)
        self._whole()

    def _point(self, name: str, schedule: Schedule) -> Point:
        peak = peak_bytes(self.program, schedule)
        cost = schedule.added(self.program, self.cost) + waited_us(self.program, schedule)
        return Point(schedule, peak, cost, name)

    def _add(self, name: str, schedule: Schedule) -> None:
        self.candidates.append(self._point(name, schedule))

    def _baselines(self, stages: Sequence[Stage]) -> None:
        """What users do: checkpoint every block, every second, √n of them; keep matrix products."""
        program = self.program
        borders = [s.input for s in stages if s.input >= 0]
        common = self._common(stages)
        for every in sorted({1, 2, max(1, round(math.sqrt(len(stages))))}):
            self._add("by hand", schedule_of(program, {*borders[::every], *common}))
        expensive = {
            s
            for i in program.forward
            for s in program.ops[i].makes
            if any(word in program.ops[i].kind for word in _DEAR)
        }
        self._add("by hand", schedule_of(program, {*borders, *common, *expensive}))

    def _common(self, stages: Sequence[Stage]) -> frozenset[int]:
        """Storages other than borders that several stages read; refining may drop them."""
        program = self.program
        inside = {s.input for s in stages} | {s.output for s in stages}
        of = {s: k for k, g in enumerate(stages) for i in g.forward for s in program.ops[i].makes}
        found = set()
        for k, stage in enumerate(stages):
            for i in (*stage.forward, *stage.backward):
                found |= {s for s in program.ops[i].reads if of.get(s, k) != k}
        return frozenset((found & program.needed) - inside)

    def _whole(self) -> None:
        """Choices for the whole program as one stage: they see what stages hide from each other,
        and not when anything is alive."""
        program = self.program
        stage = Stage(program.forward, program.backward, -1, -1, "")
        model = Model(program, stage, self.cost)
        everything = sum(program.nbytes[s] for s in model.direct)
        for share in _SHARES:
            kept = model.solve(share * everything, seconds=_SECONDS)
            if kept is not None:
                self._add("whole", schedule_of(program, kept))

    def solve(self, budgets: Sequence[float]) -> list[Point | None]:
        """For every budget the best schedule found whose peak is within it; None if there is none.

        Every start is shrunk from the largest budget to the smallest, and given up where another
        one is better by far.
        """
        order = sorted(range(len(budgets)), key=lambda k: -budgets[k])
        best: list[Point | None] = [
            min((c for c in self.candidates if c.peak_bytes <= b), key=_by_cost, default=None)
            for b in budgets
        ]
        for start in self._starts():
            schedule = start.schedule
            for k in order:
                smaller = self.refiner.shrink(schedule, budgets[k])
                if smaller is None:
                    break
                schedule = smaller
                point = self._point("refined", schedule)
                now = best[k]
                if now is None or _by_cost(point) < _by_cost(now):
                    best[k] = point
                elif point.cost > _FAR_FROM_BEST * now.cost and k != order[0]:
                    break
        return [
            None if point is None else self.grown(point, budget)
            for point, budget in zip(best, budgets, strict=True)
        ]

    def grown(self, point: Point, budget: float) -> Point:
        """With what the budget leaves spent on keeping more."""
        return self._point(point.name, self.refiner.grow(point.schedule, budget))

    def _starts(self) -> list[Point]:
        whole = undominated(c for c in self.candidates if c.name != "chain")
        step = max(1, len(whole) // _STARTS)
        return whole[::step]

    def smallest(self) -> Point:
        """The schedule of the smallest peak that is found."""
        least = min(self.candidates, key=_by_peak)
        starts = [least]
        if self.program.transfers:  # a step that moves a value may end where others would go on
            alone = Refiner(replace(self.program, transfers={}), self.cost)
            starts.append(self._lowered(least, alone))
        return min((self._lowered(start, self.refiner) for start in starts), key=_by_peak)

    def _lowered(self, best: Point, refiner: Refiner) -> Point:
        """Refined as far as that lowers the peak."""
        for share in _LOWER:
            smaller = refiner.shrink(best.schedule, share * best.peak_bytes, steps=400)
            while smaller is not None:
                best = self._point("refined", smaller)
                self.candidates.append(best)
                smaller = refiner.shrink(smaller, share * best.peak_bytes, steps=400)
        return best


def _by_cost(point: Point) -> tuple[float, float]:
    return point.cost, point.peak_bytes


def _by_peak(point: Point) -> tuple[float, float]:
    return point.peak_bytes, point.cost


def undominated(points: Iterable[Point]) -> list[Point]:
    """Points that no other one beats, from the largest peak down."""
    found: list[Point] = []
    best = math.inf
    for point in sorted(points, key=_by_peak):
        if point.cost < best:
            found.append(point)
            best = point.cost
    return found[::-1]
