"""When storages are alive in a schedule, of all operators at once.

A position is an operator's place in the sequence: forward, then backward. Accesses are flat arrays
of (position, storage), so that a range is looked up by bisection in (storage, start) and nothing
is done operator by operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from autopar.schedule.program import Program, Rows, Schedule


class LiveRanges(NamedTuple):
    """From every making of a storage to its last use; parallel arrays. Parameters with a transfer
    come first; they are alive from the first position until they are evicted, and from their reload
    to the last position.

    Args:
        storage: of the program.
        start, end: positions in the sequence.
        over: the live range that it overwrites; -1 if it has memory of its own.
        buffers: by position, of operators that hold any while they run; not parallel.
    """

    storage: np.ndarray
    start: np.ndarray
    end: np.ndarray
    over: np.ndarray
    buffers: dict[int, int]

    def each(self) -> Iterator[tuple[int, int, int]]:
        """Storage, start and end of every live range."""
        return zip(self.storage.tolist(), self.start.tolist(), self.end.tolist(), strict=True)


class _Operands(NamedTuple):
    """Operands of operators; parallel arrays.

    Args:
        at: position of the operator.
        range: of the operand; -1 for what exists before the step.
        made: the first range that the operator makes.
        ends: whether the operand's range ends with the operator.
        same_part: whether it was made in the operator's part of the step: forward or backward.
    """

    at: np.ndarray
    range: np.ndarray
    made: np.ndarray
    ends: np.ndarray
    same_part: np.ndarray


class _Accesses:
    """The ranges of a schedule, while their ends are sought.

    Args:
        program, schedule: that the ranges are of.

    Attributes:
        sequence: operators by position.
        first: the backward's first position.
        storage, start, end: of the ranges. At first, each ends with its last reader.
        read_at, of_read: position and range of every read; -1 for what exists before the step.
    """

    def __init__(self, program: Program, schedule: Schedule) -> None:
        self.program, self.first = program, len(schedule.forward)
        self.sequence = np.array(schedule.forward + schedule.backward, dtype=np.intp)
        made_at, made = program.tables.makes.in_sequence(self.sequence)
        parameters = _array(program.parameters)
        begin = np.zeros(len(parameters), dtype=np.intp)
        self.storage = np.concatenate([parameters, made])
        self.start = np.concatenate([begin, made_at])
        # sorted by storage, then by the first position that may read the range
        self._stride = len(self.sequence) + 2
        keys = self.storage * self._stride + np.concatenate([begin, made_at + 1])
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        counts = program.tables.makes.counts[self.sequence]
        self._first_made = counts.cumsum() - counts + len(parameters)

        self.read_at, read = program.tables.reads.in_sequence(self.sequence)
        self.of_read = self.ranges(read, self.read_at)
        known = self.of_read >= 0
        self.end = self.start.copy()
        self.end[self.of_read[known]] = self.read_at[known]  # positions rise: the last one stays

    def ranges(self, storage: np.ndarray, position: np.ndarray | int) -> np.ndarray:
        """Of each storage the latest range that a position may read; -1 if there is none."""
        if not len(self._keys):
            return np.full(len(storage), -1)
        place = np.searchsorted(self._keys, storage * self._stride + position, side="right") - 1
        k = self._order[place]
        return np.where((place >= 0) & (self.storage[k] == storage), k, -1)

    def last_until(self, storages: Iterable[int], position: int, last: int) -> None:
        """The ranges that a position may read last until another one at least."""
        k = self.ranges(_array(storages), position)
        k = k[k >= 0]
        self.end[k] = np.maximum(self.end[k], last)

    def operands(self, rows: Rows) -> _Operands:
        """Some operands of the operators of the sequence."""
        at, storage = rows.in_sequence(self.sequence)
        k = self.ranges(storage, at)
        same_part = (self.start[k] >= self.first) == (at >= self.first)
        return _Operands(at, k, self._first_made[at], (k >= 0) & (self.end[k] == at), same_part)


def live_ranges(program: Program, schedule: Schedule) -> LiveRanges:
    """The live ranges of a schedule."""
    accesses, tables = _Accesses(program, schedule), program.tables
    count = len(accesses.sequence)
    if accesses.first:
        accesses.last_until(program.results, accesses.first, accesses.first - 1)
    accesses.last_until({*program.gradient_bytes, *program.parameters}, count + 1, count - 1)
    _fill(accesses)
    over = _overwritten(accesses)
    held = tables.buffers[accesses.sequence]
    k, end = accesses.of_read, accesses.end
    outlives = (k < 0) | (end[k] != accesses.read_at)  # the operator that reads it
    some = np.bincount(accesses.read_at[outlives], minlength=count) > 0
    nbytes = np.where(some, held[:, 0], held[:, 1])
    holds = np.flatnonzero(held.any(axis=1))
    buffers = dict(zip(holds.tolist(), nbytes[holds].tolist(), strict=True))
    return LiveRanges(accesses.storage, accesses.start, end, over, buffers)


def _array(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, dtype=np.intp)


def _fill(accesses: _Accesses) -> None:
    """Parts of a concatenation lie in it from when they are made, and end when it reads them."""
    tables = accesses.program.tables
    at, k, whole, ends, same_part = accesses.operands(tables.fills)
    moves = ends & same_part & ~tables.kept[accesses.storage[k]]
    begins = accesses.start[k[moves]]
    for part, made, position in zip(k[moves], begins, at[moves], strict=True):
        accesses.end[part] = _read_before(accesses, part, made, position)
    np.minimum.at(accesses.start, whole[moves], begins)


def _read_before(accesses: _Accesses, part: int, made: int, at: int) -> int:
    """The last position before another one that reads a range; where it is made if none does."""
    storage = int(accesses.storage[part])
    for k in range(at - 1, made, -1):
        if storage in accesses.program.ops[accesses.sequence[k]].reads:
            return k
    return made


def _overwritten(accesses: _Accesses) -> np.ndarray:
    """The live range that each one is written over, or -1: the first of the operator's operands
    that die with it."""
    tables = accesses.program.tables
    over = np.full(len(accesses.storage), -1, dtype=np.intp)
    at, k, writer, ends, same_part = accesses.operands(tables.overwrites)
    may = same_part | tables.takes_over[accesses.sequence[at]]
    free = ends & may & tables.may_be_written[accesses.storage[k]]
    over[writer[free][::-1]] = k[free][::-1]  # of several, the first stays
    return over
