"""Which collectives of a schedule are split, where they start, and where they are waited for.

A gather starts ahead of its place, by as much compute as it takes time, or as far as there is room
for its buffer. A reduction starts in its place and is waited for after as much compute, at the
latest where its result is read.

Compute hides one collective at a time. Reductions are placed first, each from where it starts. Then
the time of every gather that can be hidden is computed from the first to the last, each as early as
possible. From the last to the first, gathers are placed as late as this allows: they start in the
order in which they are needed, and hold their buffers no longer than that takes.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from autopar.schedule.program import INPUT, Program, Resource, Schedule
from autopar.schedule.simulate import live_bytes
from autopar.schedule.streams import step_us

_ATTEMPTS = 3
# What the kinds of gathers, and of fetches from the host, begin with.
GATHERS = ("autopar.all_gather", "autopar.fetch")


def prefetched(program: Program, schedule: Schedule, budget_bytes: float) -> Schedule:
    """The schedule with its collectives split where that hides them, its peak within the budget.

    Args:
        schedule: with no collective split.
        budget_bytes: at least the peak of the schedule.
    """
    if not program.splits or Resource.COMMUNICATION not in program.beside:
        return schedule
    before = step_us(program, schedule)
    if math.isinf(budget_bytes):  # no need to know what is alive
        candidate = _Placement(program, schedule, budget_bytes).placed()
        return candidate if step_us(program, candidate) < before else schedule
    allowed = budget_bytes
    for _ in range(_ATTEMPTS):
        candidate = _Placement(program, schedule, allowed).placed()
        # the operands that are written over may have changed, and the peak with them
        excess = live_bytes(program, candidate).max(initial=0) - budget_bytes
        if excess <= 0:
            return candidate if step_us(program, candidate) < before else schedule
        allowed -= excess
    return schedule


class _Placement:
    """A schedule while its collectives are split.

    Attributes:
        free_us: at every position, the time of compute that hides nothing yet.
        hideable_us: of every gather, the time that can be hidden.
        room: at every position, bytes that are free.
        wait_at: of a reduction, the position before which it is waited for.
        replaced: by position, the operators that run instead of the one there.
        inserted: by (whether in the backward, position), the operators that run before that one.
    """

    def __init__(self, program: Program, schedule: Schedule, budget_bytes: float) -> None:
        self.program = program
        self.first = len(schedule.forward)
        self.sequence = schedule.forward + schedule.backward
        self.ops = [program.ops[i] for i in self.sequence]
        self.free_us = [op.us if op.resource is Resource.COMPUTE else 0.0 for op in self.ops]
        self.room = np.full(len(self.ops), float(budget_bytes))
        if math.isfinite(budget_bytes):
            self.room -= live_bytes(program, schedule)
        self.written: dict[int, list[int]] = defaultdict(list)
        self.read: dict[int, list[int]] = defaultdict(list)
        for p, op in enumerate(self.ops):
            for s in op.reads:
                self.read[s].append(p)
            for s in op.makes:
                self.written[s].append(p)
        self.movable_maker = lru_cache(maxsize=None)(self._movable_maker)
        self.wait_at: dict[int, int] = {}
        self.replaced: dict[int, tuple[int, ...]] = {}
        self.inserted: dict[tuple[bool, int], list[int]] = defaultdict(list)

    def placed(self) -> Schedule:
        gathers = []
        for p, i in enumerate(self.sequence):
            if i in self.program.splits:
                if self.ops[p].kind.startswith(GATHERS):
                    gathers.append(p)
                else:
                    self._wait_later(p)
        self.hideable_us = self._hideable_us(gathers)
        for p in reversed(gathers):
            if p not in self.replaced:
                self._start_earlier(p, p, moves=False)
        return Schedule(
            tuple(self._written(range(self.first), False)),
            tuple(self._written(range(self.first, len(self.sequence)), True)),
        )

    def _written(self, positions: range, backward: bool) -> Iterable[int]:
        for p in positions:
            yield from self.inserted.get((backward, p), ())
            yield from self.replaced.get(p, (self.sequence[p],))
        yield from self.inserted.get((backward, positions.stop), ())

    def _hideable_us(self, gathers: Iterable[int]) -> dict[int, float]:
        """Per gather, the time that is hidden if each starts when the one before it ends."""
        free_us, q = list(self.free_us), 0
        hideable_us = {}
        for p in gathers:
            exposed = self.ops[p].us
            q = max(q, min(p, max(self._earliest(k) for k in (p, *self._chain(p)))))
            while q < p and exposed > 0:
                hidden = min(free_us[q], exposed)
                free_us[q] -= hidden
                exposed -= hidden
                q += exposed > 0
            hideable_us[p] = self.ops[p].us - exposed
        return hideable_us

    def _buffer_bytes(self, p: int) -> float:
        """Bytes alive besides the result at the finish: none if the buffer becomes the result."""
        program, i = self.program, self.sequence[p]
        (buffer,) = program.ops[program.splits[i].start].makes
        if buffer in program.ops[i].makes:  # a store reads its operand until then
            read = set(program.ops[program.splits[i].finish].reads) - {buffer}
            return float(sum(program.sizes[s] for s in read))
        return float(program.sizes[buffer])

    def _bytes(self, p: int) -> float:
        return float(sum(self.program.sizes[s] for s in self.ops[p].makes))

    def _hide(self, p: int, us: float) -> float:
        """Let a position hide as much of a time as it can."""
        hidden = min(self.free_us[p], us)
        self.free_us[p] -= hidden
        return hidden

    def _wait_later(self, p: int) -> None:
        """Split a reduction, if there is compute between it and the first reader of its result."""
        op, split, backward = self.ops[p], self.program.splits[self.sequence[p]], p >= self.first
        end = len(self.sequence) if backward else self.first
        until = min(_next(at[s], p, end) for at in (self.read, self.written) for s in op.makes)
        nbytes, exposed, q = self._buffer_bytes(p), op.us, p + 1
        if self.room[p] < nbytes:
            return
        while q < until and exposed > 0 and self.room[q] >= nbytes:
            exposed -= self._hide(q, exposed)
            q += 1
        if exposed < op.us:
            self.room[p:q] -= nbytes
            self.replaced[p] = (split.start,)
            self.inserted[backward, q].append(split.finish)
            self.wait_at[p] = q

    def _start_earlier(self, p: int, at: int, *, moves: bool) -> None:
        """Split a gather, if there is room and compute ahead of it.

        Args:
            at: the position before which it must be done.
            moves: it moves there with its reader; if not, that is its own position.
        """
        i, backward = self.sequence[p], p >= self.first
        chain = self._chain(p)
        start = self._start(p, at, chain) if p in self.hideable_us else at
        if moves:
            self.replaced[p] = ()
            self.room[at:p] -= self._bytes(p)
        if start == at:
            if moves:
                self.inserted[backward, at].insert(0, i)
        else:
            split, buffer = self.program.splits[i], self._buffer_bytes(p)
            self.room[start:at] -= buffer or self._bytes(p)
            self.room[at] -= buffer
            if moves:
                self.inserted[backward, at].insert(0, split.finish)
            else:
                self.replaced[p] = (split.finish,)
            self.inserted[backward, start].insert(0, split.start)
        if chain and start <= chain[0]:
            self._start_earlier(chain[0], start, moves=True)

    def _start(self, p: int, at: int, chain: Sequence[int]) -> int:
        """The position at which a gather starts; `at` if nothing hides it.

        Args:
            chain: the positions that make its operand, and move with it.
        """
        buffer = self._buffer_bytes(p)
        nbytes, exposed, q, start = buffer or self._bytes(p), self.hideable_us[p], at, at
        if self.room[at] < buffer:
            return at
        earliest = max(self._earliest(k) for k in (p, *chain))
        if chain and earliest > chain[0]:
            earliest = max(self._earliest(p), chain[0] + 1)
        while q > earliest and exposed > 0:
            q -= 1
            if self.room[q] < nbytes + (self._bytes(chain[0]) if chain and q <= chain[0] else 0.0):
                break
            hidden = 0.0 if q in chain else self._hide(q, exposed)
            exposed -= hidden
            start = q if hidden else start
        return start

    def _maker(self, p: int) -> int | None:
        """As `_movable_maker`, unless it has moved already."""
        m = self.movable_maker(p)
        return None if m in self.replaced else m

    def _movable_maker(self, p: int) -> int | None:
        """The position that makes an operator's only operand, if no other one reads it and it may
        move."""
        operand, *more = self.ops[p].reads or (INPUT,)
        program, end = self.program, len(self.sequence)
        if more or operand == INPUT or program.maker[operand] == INPUT:
            return None
        m = _last(self.written[operand], p)
        read, written = self.read[operand], self.written[operand]
        only_reader = _next(read, m, end) == p and _next(read, p, end) >= _next(written, p, end)
        returned = operand in program.results | program.gradients
        op, same_part = self.ops[m], (m >= self.first) == (p >= self.first)
        movable = op.replays and len(op.reads) == len(op.makes) == 1
        return m if only_reader and not returned and same_part and movable else None

    def _chain(self, p: int) -> tuple[int, ...]:
        """The positions that make an operator's operand for it alone, the last one first."""
        maker = self._maker(p)
        return () if maker is None else (maker, *self._chain(maker))

    def _earliest(self, p: int) -> int:
        """The first position at which an operator may run: after the operands that do not move
        with it are made, and its results' storages are no longer read."""
        op = self.ops[p]
        bounds = [self.first if p >= self.first else 0]
        if self._maker(p) is None:
            written = [_last(self.written[s], p) for s in op.reads]
            bounds += [self.wait_at.get(m, m) + 1 for m in written]
        for s in op.makes:
            bounds += [_last(self.written[s], p) + 1, _last(self.read[s], p) + 1]
        return max(bounds)


def _last(positions: list[int], before: int) -> int:
    """The last of the positions before one; -1 if there is none."""
    k = bisect_left(positions, before)
    return positions[k - 1] if k else -1


def _next(positions: list[int], after: int, end: int) -> int:
    """The first of the positions after one, at most `end`."""
    k = bisect_right(positions, after)
    return min(positions[k], end) if k < len(positions) else end


def exposed_share(program: Program, eager: Schedule, resharded: Schedule) -> float:
    """The share of its time that re-gathering in the backward costs on average; the rest is hidden.

    Args:
        eager: re-gathers nothing.
        resharded: re-gathers everything.
    """
    times = [program.ops[i].us for i in resharded.recomputed(program) if i in program.splits]
    if not times:
        return 1.0
    longer = step_us(program, prefetched(program, resharded, np.inf)) - step_us(
        program, prefetched(program, eager, np.inf)
    )
    return min(1.0, max(0.0, longer / sum(times)))
