"""Makes a schedule fit a budget, and spends what the budget leaves, an operator at a time.

`shrink` takes a value that is alive at the peak and not used there, and recomputes or reloads it
before its next use. `grow` leaves out recomputation and transfers if there is room to keep the
value. Both follow the simulated peak, which repairs what the models before them leave out.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autopar.schedule.live_ranges import LiveRanges, live_ranges
from autopar.schedule.offload import (
    BEFORE,
    IdleInterval,
    host_bytes,
    with_offload,
    without_offload,
)
from autopar.schedule.program import INPUT, Op, Program, Schedule
from autopar.schedule.simulate import occupancy
from autopar.schedule.streams import host_wait_us, run_times

_MOST_OPS = 64  # a value that takes more operators to recompute is not tried
_TRIED = 4  # candidates per step, by bytes per cost


@dataclass(frozen=True)
class _Simulated:
    """A schedule with its live ranges and the bytes alive at every position."""

    program: Program
    schedule: Schedule
    ranges: LiveRanges
    live: np.ndarray

    @cached_property
    def spans(self) -> Mapping[int, list[tuple[int, int]]]:
        """Start and end of every live range, by storage."""
        spans: dict[int, list[tuple[int, int]]] = {}
        for s, start, end in self.ranges.each():
            spans.setdefault(s, []).append((start, end))
        return spans

    @cached_property
    def uses(self) -> Mapping[int, list[int]]:
        """Positions that read a storage, in order."""
        uses: dict[int, list[int]] = {}
        for at, i in enumerate(self.schedule.forward + self.schedule.backward):
            for s in self.program.ops[i].reads:
                uses.setdefault(s, []).append(at)
        return uses

    def next_use(self, s: int, at: int) -> int:
        """The first position at or after another one that reads a storage."""
        uses = self.uses[s]
        return uses[bisect_left(uses, at)]

    def alive_before(self, s: int, at: int) -> bool:
        """Whether a storage exists when a position begins."""
        return any(start < at <= end for start, end in self.spans.get(s, ()))


class Refiner:
    """Refines schedules of one program.

    Args:
        cost: of recomputing each operator.
    """

    def __init__(self, program: Program, cost: Mapping[int, float]) -> None:
        self.program, self.cost = program, cost
        self._least_cost = 1e-6 * sum(cost.values()) / max(1, len(cost))

    def _simulated(self, schedule: Schedule) -> _Simulated:
        ranges = live_ranges(self.program, schedule)
        live = occupancy(self.program, schedule, ranges)
        return _Simulated(self.program, schedule, ranges, live)

    def shrink(
        self, schedule: Schedule, budget: float, *, steps: int = 60, until: float = math.inf
    ) -> Schedule | None:
        """Recompute or offload more until the peak is within the budget; None if that fails.

        Args:
            until: the processor time at which it fails.
        """
        now = self._simulated(schedule)
        for _ in range(steps):
            if time.process_time() > until:
                return None
            excess = np.maximum(now.live - budget, 0)
            if not excess.any():
                return now.schedule
            best: tuple[float, _Simulated] | None = None
            at = int(excess.argmax())
            candidates = self._with_recomputation(now, at)
            if self.program.transfers:
                candidates += self._with_offload(now, budget, at)
            for added, candidate in candidates:
                new = self._simulated(candidate)
                remaining = np.maximum(new.live - budget, 0)
                gain = float(excess.max() - remaining.max())
                # of a plateau: fewer positions at the top
                gain += float(excess.sum() - remaining.sum()) / len(now.live)
                if gain > 0 and (best is None or gain / added > best[0]):
                    best = gain / added, new
            if best is None:
                return None
            now = best[1]
        return None

    def _with_recomputation(self, now: _Simulated, at: int) -> list[tuple[float, Schedule]]:
        """Schedules in which a value is recomputed, and so not alive at a position; with the cost
        that each adds."""
        program, schedule = self.program, now.schedule
        forward, sequence = len(schedule.forward), schedule.forward + schedule.backward
        ranked = []
        alive = (now.ranges.start < at) & (at < now.ranges.end)
        for s in now.ranges.storage[alive].tolist():
            if not program.nbytes[s] or s in program.results:
                continue
            maker = program.maker[s]
            if not program.ops[maker].replays or s in program.ops[sequence[at]].reads:
                continue
            use = now.next_use(s, at)
            if use < forward:
                continue
            ops = self._recomputation(now, s, use)
            if ops is not None:
                added = sum(self.cost[i] for i in ops) + self._least_cost
                ranked.append((program.nbytes[s] / added, added, use, ops))
        ranked.sort(key=lambda r: -r[0])
        return [
            (added, Schedule(schedule.forward, (*sequence[forward:use], *ops, *sequence[use:])))
            for _, added, use, ops in ranked[:_TRIED]
        ]

    def _with_offload(
        self, now: _Simulated, budget: float, at: int
    ) -> list[tuple[float, Schedule]]:
        """Schedules in which a value or a parameter is on the host at a position, and how much
        longer each waits."""
        program, schedule = self.program, now.schedule
        ops = [program.ops[i] for i in schedule.forward + schedule.backward]
        offloaded = schedule.offloaded(program)
        room = program.host_bytes - host_bytes(program, schedule)
        ranked = []
        for s, start, end in now.ranges.each():
            if s not in program.transfers or not start <= at <= end:
                continue
            if program.sizes[s] <= room if s not in offloaded else s in program.parameters:
                interval = self.idle_interval(ops, len(schedule.forward), s, start, end, at)
                if interval is not None:
                    ranked.append((program.sizes[s], s, interval))
        times = run_times(program, schedule.forward + schedule.backward)
        full, before = np.flatnonzero(now.live > budget), host_wait_us(program, schedule)
        candidates = []
        for _, s, interval in sorted(ranked, reverse=True)[:_TRIED]:
            candidate = with_offload(program, schedule, times, s, interval, full)
            if candidate is not None:
                waits = host_wait_us(program, candidate) - before
                candidates.append((max(waits, 0.0) + self._least_cost, candidate))
        return candidates

    def idle_interval(
        self, ops: Sequence[Op], forward: int, s: int, start: int, end: int, at: int
    ) -> IdleInterval | None:
        """The interval around a position in which a storage is not used: for a value, from forward
        to backward; for a parameter, anywhere.

        Args:
            ops: of the schedule; the first `forward` of them are the forward's.
            start, end: the live range of the storage that contains the position.
        """
        use = next((p for p in range(at, end + 1) if s in ops[p].reads), len(ops))
        if use == at:
            return None
        if s not in self.program.parameters:
            # a concatenation has memory before it runs, for the parts that are copied into it
            made = next(p for p in range(start, end + 1) if s in ops[p].makes)
            spans = made < min(at, forward) and forward < use < len(ops)
            return IdleInterval(made, at, use) if spans else None
        written = start or BEFORE
        if written != BEFORE and not any(s in op.reads for op in ops[written + 1 : at]):
            return None  # it was reloaded for this use
        return IdleInterval(written, at, use)

    def _recomputation(self, now: _Simulated, storage: int, use: int) -> list[int] | None:
        """The operators that recompute a storage right before a position; None if that is not
        possible."""
        program, ops = self.program, dict[int, None]()

        def add(i: int) -> bool:
            if i in ops:
                return True
            if len(ops) > _MOST_OPS:
                return False
            for s in program.ops[i].reads:
                source = program.maker[s]
                if s != storage and now.alive_before(s, use):
                    continue
                if s in program.parameters:  # on the host
                    return False
                if source == INPUT or not program.ops[source].replays:
                    continue
                if not add(source):
                    return False
            ops[i] = None
            return True

        return list(ops) if add(program.maker[storage]) else None

    def grow(
        self, schedule: Schedule, budget: float, together: int = 1, least_gain: float = 0.0,
        until: float = math.inf,
    ) -> Schedule:  # fmt: skip
        """Keep what is recomputed or offloaded, the most expensive first, within the budget.

        Args:
            together: results of so many operators are kept at once, and simulated once.
            least_gain: share of the schedule's cost; it ends when keeping them saves less.
            until: the processor time at which it ends.
        """
        program = self.program
        for s in sorted(schedule.offloaded(program), key=lambda s: -program.sizes[s]):
            candidate = without_offload(program, schedule, s)
            if self._simulated(candidate).live.max() <= budget:
                schedule = candidate
        rejected: set[tuple[int, int]] = set()
        now, cost = self._simulated(schedule), self._cost(schedule)
        while (larger := self._with_less(now, budget, rejected, together)) is not None:
            before, now, cost = cost, larger, self._cost(larger.schedule)
            if before - cost < least_gain * before or time.process_time() > until:
                break
        return now.schedule

    def _cost(self, schedule: Schedule) -> float:
        return sum(self.cost[i] for i in schedule.forward + schedule.backward)

    def _with_less(
        self, now: _Simulated, budget: float, rejected: set[tuple[int, int]], together: int
    ) -> _Simulated | None:
        """Leave out recomputed operators.

        Args:
            rejected: operators, with their position from the end, that need not be tried; those
                tried here are added.
        """
        program, schedule = self.program, now.schedule
        forward = len(schedule.forward)
        previous: dict[int, int] = {}  # the end of the live range before, by storage
        idle: dict[int, list[tuple[int, int]]] = {}  # by start: end of the range before, bytes
        for s, start, end in now.ranges.each():
            if s in previous and end > start:
                idle.setdefault(start, []).append((previous[s], program.nbytes[s]))
            previous[s] = end
        seen = set(schedule.forward)
        recomputed = []
        for k, i in enumerate(schedule.backward):
            if i in seen and i not in program.transferred:
                recomputed.append((self.cost[i], k))
            seen.add(i)

        def key(k: int) -> tuple[int, int]:
            return schedule.backward[k], len(schedule.backward) - k

        waiting = [k for _, k in sorted(recomputed, reverse=True) if key(k) not in rejected]
        while waiting:
            chosen, seen_to = set[int](), len(waiting)
            live = now.live.astype(float)
            for position, k in enumerate(waiting):
                at = forward + k
                spans = [(slice(end + 1, at), nbytes) for end, nbytes in idle.get(at, ())]
                for span, nbytes in spans:
                    live[span] += nbytes
                if max((live[span].max(initial=0) for span, _ in spans), default=0) <= budget:
                    chosen.add(k)
                    if len(chosen) == together:
                        seen_to = position + 1
                        break
                else:
                    for span, nbytes in spans:
                        live[span] -= nbytes
            if chosen:
                backward = tuple(i for k, i in enumerate(schedule.backward) if k not in chosen)
                larger = self._simulated(self._without_unread(Schedule(schedule.forward, backward)))
                fits = larger.live.max() <= budget
                if not fits and len(chosen) > 1:
                    together = len(chosen) // 2
                    continue
            rejected.update(map(key, waiting[:seen_to]))
            if chosen and fits:
                return larger
            waiting = waiting[seen_to:]
        return None

    def _without_unread(self, schedule: Schedule) -> Schedule:
        """Leave out what is recomputed or reloaded and never read."""
        program = self.program
        needed = set(program.gradients) | program.parameters.keys()
        required = set(program.backward) | {t.evict for t in program.transfers.values()}
        backward: list[int] = []
        for i in reversed(schedule.backward):
            op = program.ops[i]
            if i not in required and needed.isdisjoint(op.makes):
                continue
            backward.append(i)
            needed.difference_update(op.makes)
            needed.update(op.reads)
        schedule = Schedule(schedule.forward, tuple(reversed(backward)))
        for s in schedule.offloaded(program):
            if program.transfers[s].reload not in schedule.forward + schedule.backward:
                schedule = without_offload(program, schedule, s)
        return schedule
