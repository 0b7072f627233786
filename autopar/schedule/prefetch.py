"""Which collectives of a schedule are split, where they start, and where they are waited for.

A gather starts ahead of its place, by as much compute as takes its time, or as far as there is room
for its buffer. A reduction starts in its place and is waited for behind as much compute, at the
latest where its result is read.

Compute hides one of them at a time. Reductions come first, each from where it starts. What then can
hide of every gather is found from the first to the last, one after another as early as can be; and
from the last to the first they are moved as late as this lets them, so that they start in the order
in which they are needed, and hold their buffers no longer than that takes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from autopar.schedule.program import GIVEN, Program, Resource, Schedule
from autopar.schedule.simulate import live_bytes
from autopar.schedule.streams import run_times

_ATTEMPTS = 3
GATHER = "autopar.all_gather"  # begins the kind of all gathers


def step_us(program: Program, schedule: Schedule) -> float:
    """Time of a step, predicted."""
    return run_times(program, schedule.forward + schedule.backward).end


def prefetched(program: Program, schedule: Schedule, budget_bytes: float) -> Schedule:
    """The schedule with its collectives split where that hides them, its peak within the budget.

    Args:
        schedule: with no collective split.
        budget_bytes: at least the peak of the schedule.
    """
    if not program.splits or Resource.COMMUNICATION not in program.beside:
        return schedule
    before = step_us(program, schedule)
    allowed = budget_bytes
    for _ in range(_ATTEMPTS):
        found = _Placing(program, schedule, allowed).placed()
        # what is written over what may have changed, and the peak with it
        over = live_bytes(program, found).max(initial=0) - budget_bytes
        if over <= 0:
            return found if step_us(program, found) < before else schedule
        allowed -= over
    return schedule


class _Placing:
    """A schedule while its collectives are split.

    Attributes:
        hides: at every position, the time of compute that hides nothing yet.
        wanted: of every gather, the time that is to hide.
        room: at every position, bytes that are free.
    """

    def __init__(self, program: Program, schedule: Schedule, budget_bytes: float) -> None:
        self.program = program
        self.first = len(schedule.forward)
        self.sequence = schedule.forward + schedule.backward
        self.ops = [program.ops[i] for i in self.sequence]
        self.hides = [op.us if op.resource is Resource.COMPUTE else 0.0 for op in self.ops]
        self.room = budget_bytes - live_bytes(program, schedule)
        self.made: dict[int, list[int]] = defaultdict(list)
        self.read: dict[int, list[int]] = defaultdict(list)
        for p, op in enumerate(self.ops):
            for s in op.reads:
                self.read[s].append(p)
            for s in op.makes:
                self.made[s].append(p)
        self.late: dict[int, int] = {}  # of a reduction, before which position it is waited for
        # what runs in the place of an operator; and before it, by the part and the position
        self.instead: dict[int, tuple[int, ...]] = {}
        self.ahead: dict[tuple[bool, int], list[int]] = defaultdict(list)

    def placed(self) -> Schedule:
        gathers = []
        for p, i in enumerate(self.sequence):
            if i in self.program.splits:
                if self.ops[p].kind.startswith(GATHER):
                    gathers.append(p)
                else:
                    self._wait_later(p)
        self.wanted = self._hidden_at_most(gathers)
        for p in reversed(gathers):
            if p not in self.instead:
                self._start_earlier(p, p, along=False)
        return Schedule(
            tuple(self._written(range(self.first), False)),
            tuple(self._written(range(self.first, len(self.sequence)), True)),
        )

    def _written(self, positions: range, backward: bool) -> Iterable[int]:
        for p in positions:
            yield from self.ahead.get((backward, p), ())
            yield from self.instead.get(p, (self.sequence[p],))
        yield from self.ahead.get((backward, positions.stop), ())

    def _hidden_at_most(self, gathers: Iterable[int]) -> dict[int, float]:
        """Of every gather the time that hides, if each starts as soon as the one before it ends."""
        left, q = list(self.hides), 0
        found = {}
        for p in gathers:
            wanted = self.ops[p].us
            q = max(q, min(p, max(self._earliest(k) for k in (p, *self._chain(p)))))
            while q < p and wanted > 0:
                hidden = min(left[q], wanted)
                left[q] -= hidden
                wanted -= hidden
                q += wanted > 0
            found[p] = self.ops[p].us - wanted
        return found

    def _buffer_bytes(self, p: int) -> float:
        """What is alive besides the result at the finish: nothing, where the buffer becomes it."""
        program, i = self.program, self.sequence[p]
        (buffer,) = program.ops[program.splits[i].start].makes
        return 0.0 if buffer in program.ops[i].makes else float(program.sizes[buffer])

    def _bytes(self, p: int) -> float:
        return float(sum(self.program.sizes[s] for s in self.ops[p].makes))

    def _hidden(self, p: int, us: float) -> float:
        """What a position hides of a time."""
        found = min(self.hides[p], us)
        self.hides[p] -= found
        return found

    def _wait_later(self, p: int) -> None:
        """Split a reduction, if compute is behind it before its result is read."""
        op, split, backward = self.ops[p], self.program.splits[self.sequence[p]], p >= self.first
        end = len(self.sequence) if backward else self.first
        until = min(_next(at[s], p, end) for at in (self.read, self.made) for s in op.makes)
        nbytes, wanted, q = self._buffer_bytes(p), op.us, p + 1
        if self.room[p] < nbytes:
            return
        while q < until and wanted > 0 and self.room[q] >= nbytes:
            wanted -= self._hidden(q, wanted)
            q += 1
        if wanted < op.us:
            self.room[p:q] -= nbytes
            self.instead[p] = (split.start,)
            self.ahead[backward, q].append(split.finish)
            self.late[p] = q

    def _start_earlier(self, p: int, at: int, *, along: bool) -> None:
        """Split a gather, if compute is ahead of it and there is room.

        Args:
            at: before which position it is to be done.
            along: it leaves its place for that, along with what reads it; else that is its place.
        """
        i, backward = self.sequence[p], p >= self.first
        chain = self._chain(p)
        start = self._start(p, at, chain) if i in self.program.splits else at
        if along:
            self.instead[p] = ()
            self.room[at:p] -= self._bytes(p)
        if start == at:
            if along:
                self.ahead[backward, at].insert(0, i)
        else:
            split, extra = self.program.splits[i], self._buffer_bytes(p)
            self.room[start:at] -= extra or self._bytes(p)
            self.room[at] -= extra
            if along:
                self.ahead[backward, at].insert(0, split.finish)
            else:
                self.instead[p] = (split.finish,)
            self.ahead[backward, start].insert(0, split.start)
        if chain and start <= chain[0]:
            self._start_earlier(chain[0], start, along=True)

    def _start(self, p: int, at: int, chain: Sequence[int]) -> int:
        """Where a gather starts; `at` if nothing hides it.

        Args:
            chain: what makes its operand, and comes along.
        """
        extra = self._buffer_bytes(p)
        nbytes, wanted, q, start = extra or self._bytes(p), self.wanted[p], at, at
        if self.room[at] < extra:
            return at
        earliest = max(self._earliest(k) for k in (p, *chain))
        if chain and earliest > chain[0]:
            earliest = max(self._earliest(p), chain[0] + 1)
        while q > earliest and wanted > 0:
            q -= 1
            if self.room[q] < nbytes + (self._bytes(chain[0]) if chain and q <= chain[0] else 0.0):
                break
            hidden = 0.0 if q in chain else self._hidden(q, wanted)
            wanted -= hidden
            start = q if hidden else start
        return start

    def _maker(self, p: int) -> int | None:
        """The position of what makes an operator's only operand, for it alone, and may move."""
        operand, *more = self.ops[p].reads or (GIVEN,)
        program, end = self.program, len(self.sequence)
        if more or operand == GIVEN or program.maker[operand] == GIVEN:
            return None
        m = _last(self.made[operand], p)
        read, made = self.read[operand], self.made[operand]
        alone = _next(read, m, end) == p and _next(read, p, end) >= _next(made, p, end)
        held = operand in program.results | program.gradients
        op, same_part = self.ops[m], (m >= self.first) == (p >= self.first)
        moves = op.replays and len(op.reads) == len(op.makes) == 1 and m not in self.instead
        return m if alone and not held and same_part and moves else None

    def _chain(self, p: int) -> tuple[int, ...]:
        """The positions of what makes an operator's operand for it alone, the last one first."""
        maker = self._maker(p)
        return () if maker is None else (maker, *self._chain(maker))

    def _earliest(self, p: int) -> int:
        """The first position at which operands are there that come not along, and what was in the
        place of the results is read no more."""
        op = self.ops[p]
        bounds = [self.first if p >= self.first else 0]
        if self._maker(p) is None:
            made = [_last(self.made[s], p) for s in op.reads]
            bounds += [self.late.get(m, m) + 1 for m in made]
        for s in op.makes:
            bounds += [_last(self.made[s], p) + 1, _last(self.read[s], p) + 1]
        return max(bounds)


def _last(positions: list[int], before: int) -> int:
    """The last of the positions before one; -1 if there is none."""
    k = bisect_left(positions, before)
    return positions[k - 1] if k else -1


def _next(positions: list[int], behind: int, end: int) -> int:
    """The first of the positions behind one, at most `end`."""
    k = bisect_right(positions, behind)
    return min(positions[k], end) if k < len(positions) else end


def exposed_share(program: Program, eager: Schedule, again: Schedule) -> float:
    """The share of its time that a gather costs if it is run again in the backward, on the whole:
    the rest hides.

    Args:
        eager: without any run again.
        again: with all run again.
    """
    times = [program.ops[i].us for i in again.again(program) if i in program.splits]
    if not times:
        return 1.0
    longer = step_us(program, prefetched(program, again, np.inf)) - step_us(
        program, prefetched(program, eager, np.inf)
    )
    return min(1.0, max(0.0, longer / sum(times)))
