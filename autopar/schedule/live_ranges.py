"""When storages are alive in a schedule, of all operators at once.

A position is an operator's place in the sequence: forward, then backward. Accesses are flat arrays
of (position, storage), so that a range is looked up by bisection in (storage, start) and nothing
is done operator by operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from autopar.schedule.program import Program, Schedule


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


class _Index:
    """Finds the live range of a storage that exists at a position.

    Args:
        storage, first: of the ranges, and the first positions that may read them.
        count: of positions.
    """

    def __init__(self, storage: np.ndarray, first: np.ndarray, count: int) -> None:
        self._stride = count + 2
        keys = storage * self._stride + first
        self._order = np.argsort(keys, kind="stable")
        self._keys, self._storage = keys[self._order], storage

    def at(self, storage: np.ndarray, position: np.ndarray | int) -> np.ndarray:
        """The latest range that a position may read; -1 if there is none."""
        if not len(self._keys):
            return np.full(len(storage), -1)
        place = np.searchsorted(self._keys, storage * self._stride + position, side="right") - 1
        k = self._order[place]
        return np.where((place >= 0) & (self._storage[k] == storage), k, -1)


def live_ranges(program: Program, schedule: Schedule) -> LiveRanges:
    """The live ranges of a schedule."""
    tables, first = program.tables, len(schedule.forward)
    sequence = np.array(schedule.forward + schedule.backward, dtype=np.intp)
    count = len(sequence)
    made_at, made = tables.makes.in_sequence(sequence)
    parameters = _array(program.parameters)
    storage = np.concatenate([parameters, made])
    start = np.concatenate([np.zeros(len(parameters), dtype=np.intp), made_at])
    ranges = _Index(storage, np.concatenate([start[: len(parameters)], made_at + 1]), count)

    read_at, read = tables.reads.in_sequence(sequence)
    of_read = ranges.at(read, read_at)
    known = of_read >= 0
    end = start.copy()
    end[of_read[known]] = read_at[known]  # positions rise: the last one stays
    if first:
        returned = ranges.at(_array(program.results), first)
        returned = returned[returned >= 0]
        end[returned] = np.maximum(end[returned], first - 1)
    lasting = ranges.at(_array({*program.gradient_bytes, *program.parameters}), count + 1)
    end[lasting[lasting >= 0]] = count - 1

    _fill(program, sequence, first, ranges, LiveRanges(storage, start, end, end, {}))
    over = _overwritten(program, sequence, first, ranges, LiveRanges(storage, start, end, end, {}))
    held = tables.buffers[sequence]
    lasts = np.bincount(read_at[~known | (end[of_read] != read_at)], minlength=count) > 0
    nbytes = np.where(lasts, held[:, 0], held[:, 1])  # some operand lives on, or all die
    holds = np.flatnonzero(held.any(axis=1))
    buffers = dict(zip(holds.tolist(), nbytes[holds].tolist(), strict=True))
    return LiveRanges(storage, start, end, over, buffers)


def _array(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, dtype=np.intp)


def _fill(
    program: Program, sequence: np.ndarray, first: int, index: _Index, ranges: LiveRanges
) -> None:
    """Parts of a concatenation lie in it from when they are made, and end when it reads them."""
    storage, start, end = ranges[:3]
    at, part = program.tables.fills.in_sequence(sequence)
    if not len(at):
        return
    counts = program.tables.makes.counts[sequence]
    whole = (counts.cumsum() - counts + len(program.parameters))[at]
    k = index.at(part, at)
    same_part = (start[k] >= first) == (at >= first)
    free = (k >= 0) & (end[k] == at) & same_part & ~program.tables.kept[storage[k]]
    begins = start[k[free]]
    for r, made, position in zip(k[free], begins, at[free], strict=True):
        end[r] = _read_before(program, sequence, int(storage[r]), int(made), int(position))
    np.minimum.at(start, whole[free], begins)


def _read_before(program: Program, sequence: np.ndarray, storage: int, made: int, at: int) -> int:
    """The last position before another one that reads a storage; where it is made if none does."""
    for k in range(at - 1, made, -1):
        if storage in program.ops[sequence[k]].reads:
            return k
    return made


def _overwritten(
    program: Program, sequence: np.ndarray, first: int, index: _Index, ranges: LiveRanges
) -> np.ndarray:
    """The live range that each one is written over, or -1: the first of the operator's operands
    that die with it."""
    storage, start, end = ranges[:3]
    over = np.full(len(storage), -1, dtype=np.intp)
    at, operand = program.tables.overwrites.in_sequence(sequence)
    counts = program.tables.makes.counts[sequence]
    writer = (counts.cumsum() - counts + len(program.parameters))[at]
    k = index.at(operand, at)
    same_part = (start[k] >= first) == (at >= first)
    own = same_part | program.tables.takes_over[sequence[at]]
    free = (k >= 0) & (end[k] == at) & own & program.tables.may_be_written[storage[k]]
    over[writer[free][::-1]] = k[free][::-1]  # of several, the first stays
    return over
