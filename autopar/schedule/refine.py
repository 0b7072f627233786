"""Makes a schedule fit a budget, and spends what the budget leaves, an operator at a time.

`shrink` takes a value that is alive at the peak and not used there, and computes it again before
its next use, or has it on the host until then. `grow` leaves out what is computed again or moved
where the room to keep it is there. Both look at the simulated peak, so what the models before them
round or leave out is repaired here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from autopar.schedule.offload import BEFORE, Gap, host_bytes, moved, waited_us, without
from autopar.schedule.program import GIVEN, Op, Program, Schedule
from autopar.schedule.simulate import Lives, lives, occupancy
from autopar.schedule.streams import run_times

_CONE = 64  # a value that takes more operators to compute again is not tried
_TRIED = 4  # candidates per step, by bytes for their cost


class _Simulated(NamedTuple):
    """A schedule with its lives and the bytes alive at every position."""

    schedule: Schedule
    found: Lives
    live: np.ndarray


class Refiner:
    """Refines schedules of one program.

    Args:
        cost: of running each operator.
    """

    def __init__(self, program: Program, cost: Mapping[int, float]) -> None:
        self.program, self.cost = program, cost
        self._free = 1e-6 * sum(cost.values()) / max(1, len(cost))

    def shrink(
        self, schedule: Schedule, budget: float, *, most: float = np.inf, steps: int = 60
    ) -> Schedule | None:
        """Compute more again until the peak is within the budget.

        Args:
            most: give up when what is added costs more.

        Returns:
            None if that does not succeed.
        """
        found = lives(self.program, schedule)
        live = occupancy(self.program, schedule, found)
        spent = 0.0
        for _ in range(steps):
            excess = np.maximum(live - budget, 0)
            if not excess.any():
                return schedule
            best: tuple[float, float, Schedule, Lives, np.ndarray] | None = None
            at = int(excess.argmax())
            candidates = self._dropped(schedule, found, at)
            if self.program.transfers:
                candidates += self._moved(schedule, found, live, budget, at)
            for added, candidate in candidates:
                if spent + added > most:
                    continue
                new = lives(self.program, candidate)
                trace = occupancy(self.program, candidate, new)
                left = np.maximum(trace - budget, 0)
                gain = float(excess.max() - left.max())
                # of a plateau: fewer places at the top
                gain += float(excess.sum() - left.sum()) / len(live)
                if gain > 0 and (best is None or gain / added > best[0]):
                    best = gain / added, added, candidate, new, trace
            if best is None:
                return None
            _, added, schedule, found, live = best
            spent += added
        return None

    def _dropped(self, schedule: Schedule, found: Lives, at: int) -> list[tuple[float, Schedule]]:
        """Schedules in which a value is not alive at a position, and what they cost more."""
        program, forward = self.program, len(schedule.forward)
        sequence = schedule.forward + schedule.backward
        ranked = []
        alive: dict[int, set[int]] = {}  # before a position
        for s, start, end in zip(*found[:3], strict=True):
            if not start < at < end or not program.nbytes[s] or s in program.results:
                continue
            maker = program.maker[s]
            if not program.ops[maker].replays or s in program.ops[sequence[at]].reads:
                continue
            use = at
            while s not in program.touched[sequence[use]][0]:
                use += 1
            if use < forward:
                continue
            if use not in alive:
                alive[use] = {
                    s for s, start, end in zip(*found[:3], strict=True) if start < use <= end
                }
            cone = self._cone(alive[use] - {s}, maker)
            if cone is not None:
                added = sum(self.cost[i] for i in cone) + self._free
                ranked.append((program.nbytes[s] / added, added, use, cone))
        ranked.sort(key=lambda r: -r[0])
        return [
            (added, Schedule(schedule.forward, (*sequence[forward:use], *cone, *sequence[use:])))
            for _, added, use, cone in ranked[:_TRIED]
        ]

    def _moved(
        self, schedule: Schedule, found: Lives, live: np.ndarray, budget: float, at: int
    ) -> list[tuple[float, Schedule]]:
        """Schedules in which a value or a parameter is on the host at a position, and how much
        longer they wait."""
        program = self.program
        ops = [program.ops[i] for i in schedule.forward + schedule.backward]
        gone, room = schedule.moved(program), program.host_bytes - host_bytes(program, schedule)
        ranked = []
        for s, start, end in zip(*found[:3], strict=True):
            if s not in program.transfers or not start <= at <= end:
                continue
            if program.sizes[s] <= room if s not in gone else s in program.parameters:
                gap = self.gap(ops, len(schedule.forward), s, start, end, at)
                if gap is not None:
                    ranked.append((program.sizes[s], s, gap))
        busy = run_times(program, schedule.forward + schedule.backward)
        crowded, before = np.flatnonzero(live > budget), waited_us(program, schedule)
        candidates = []
        for _, s, gap in sorted(ranked, reverse=True)[:_TRIED]:
            candidate = moved(program, schedule, busy, s, gap, crowded)
            if candidate is not None:
                waits = waited_us(program, candidate) - before
                candidates.append((max(waits, 0.0) + self._free, candidate))
        return candidates

    def gap(
        self, ops: Sequence[Op], forward: int, s: int, start: int, end: int, at: int
    ) -> Gap | None:
        """Around a position, where a storage is not used: of a value from forward to backward, of a
        parameter anywhere.

        Args:
            ops: of the schedule, the first of them the forward's.
            start, end: a life of the storage that goes on at the position.
        """
        use = next((p for p in range(at, end + 1) if s in ops[p].reads), len(ops))
        if use == at:
            return None
        if s not in self.program.parameters:
            between = start < min(at, forward) and forward < use < len(ops)
            return Gap(start, at, use) if between else None
        made = start or BEFORE
        if made != BEFORE and not any(s in op.reads for op in ops[made + 1 : at]):
            return None  # it is back for this use
        return Gap(made, at, use)

    def _cone(self, alive: set[int], maker: int) -> list[int] | None:
        """Operators to run for one operator's results to be there.

        Args:
            alive: storages that are.
        """
        program, cone = self.program, dict[int, None]()

        def need(i: int) -> bool:
            if i in cone:
                return True
            if len(cone) > _CONE:
                return False
            for s in program.ops[i].reads:
                source = program.maker[s]
                if s in alive:
                    continue
                if s in program.parameters:  # on the host
                    return False
                if source == GIVEN or not program.ops[source].replays:
                    continue
                if not need(source):
                    return False
            cone[i] = None
            return True

        return list(cone) if need(maker) else None

    def grow(self, schedule: Schedule, budget: float) -> Schedule:
        """Keep what is computed again or moved, the dearest first, as far as the budget allows."""
        rejected: set[tuple[int, int]] = set()
        for s in sorted(schedule.moved(self.program), key=lambda s: -self.program.sizes[s]):
            candidate = without(self.program, schedule, s)
            if occupancy(self.program, candidate, lives(self.program, candidate)).max() <= budget:
                schedule = candidate
        found = lives(self.program, schedule)
        now: _Simulated | None = _Simulated(
            schedule, found, occupancy(self.program, schedule, found)
        )
        while now is not None:
            schedule = now.schedule
            now = self._grown(now, budget, rejected)
        return schedule

    def _grown(
        self, now: _Simulated, budget: float, rejected: set[tuple[int, int]]
    ) -> _Simulated | None:
        """One operator less.

        Args:
            rejected: operators, with the position from the end, that were tried in vain; added to.
        """
        program, (schedule, found, live) = self.program, now
        forward = len(schedule.forward)
        before: dict[int, int] = {}
        gaps: dict[int, list[tuple[int, int, int]]] = {}
        for life, (s, start, end) in enumerate(zip(*found[:3], strict=True)):
            if s in before and end > start:
                gaps.setdefault(start, []).append((found.end[before[s]], start, program.nbytes[s]))
            before[s] = life
        seen = set(schedule.forward)
        again = []
        for k, i in enumerate(schedule.backward):
            if i in seen:
                again.append((self.cost[i], k))
            seen.add(i)
        for _, k in sorted(again, reverse=True):
            i, at = schedule.backward[k], forward + k
            key = (i, len(schedule.backward) - k)
            if key in rejected:
                continue
            rejected.add(key)
            need = np.zeros(len(live))
            for end, start, nbytes in gaps.get(at, ()):
                need[end + 1 : start] += nbytes
            if (live + need)[:at].max(initial=0) > budget:
                continue
            backward = (*schedule.backward[:k], *schedule.backward[k + 1 :])
            candidate = self.without_unread(Schedule(schedule.forward, backward))
            new = lives(program, candidate)
            trace = occupancy(program, candidate, new)
            if trace.max() <= budget:
                return _Simulated(candidate, new, trace)
        return None

    def without_unread(self, schedule: Schedule) -> Schedule:
        """Leave out what is computed again or comes back, and is read by nobody."""
        program = self.program
        wanted = set(program.gradients) | program.parameters.keys()
        own = set(program.backward) | {t.left for t in program.transfers.values()}
        kept: list[int] = []
        for i in reversed(schedule.backward):
            op = program.ops[i]
            if i not in own and wanted.isdisjoint(op.makes):
                continue
            kept.append(i)
            wanted.difference_update(op.makes)
            wanted.update(op.reads)
        schedule = Schedule(schedule.forward, tuple(reversed(kept)))
        for s in schedule.moved(program):
            if program.transfers[s].back not in (*schedule.forward, *kept):
                schedule = without(program, schedule, s)
        return schedule
