"""A program with many copies of a block, from one with few.

Reading a joint graph takes time for every operator, and the copies of a block differ in their
storages only. So a short program is read, of a model without most of the copies, and unrolled: the
missing copies are like the two around the gap, with storages of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby

from autopar.ir.repeats import by_position, number_in
from autopar.schedule.program import INPUT, Op, Program, Split, Transfer

# An operator or a storage of the short program, and which missing copy it is in: 1 for the first;
# 0 for all that the short program has.
Placed = tuple[int, int]


@dataclass(frozen=True)
class Gap:
    """Copies of a block that a short program leaves out.

    Args:
        blocks: the name of the list of blocks, with its dot: "model.layers.".
        before, after: numbers of the copies around the gap. They and their other neighbours are
            like the missing ones.
    """

    blocks: str
    before: int
    after: int

    @property
    def count(self) -> int:
        """How many copies are missing."""
        return self.after - self.before - 1

    def moved(self, name: str, by: int) -> str:
        """The name of what is in a later copy as this is in its own."""
        number = number_in(self.blocks, name)
        if number is None:
            return name
        return f"{self.blocks}{number + by}{name.removeprefix(f'{self.blocks}{number}')}"


class NotPeriodicError(Exception):
    """The copies around the gap differ, or operators outside read what is in them."""


def unrolled(program: Program, gap: Gap) -> Program | None:
    """The program with the missing copies; None if those around the gap differ in more than their
    storages, or if operators outside read what is in them (buckets of all blocks' gradients)."""
    try:
        return _Unroller(program, gap).run()
    except NotPeriodicError:
        return None


def _require(condition: bool) -> None:
    if not condition:
        raise NotPeriodicError


@dataclass
class _Unroller:
    """
    Attributes:
        label: the number of its copy, per operator, by its position among those of forward or
            backward; None outside of the blocks.
        of: the same per storage: that of the operator that makes it, or reads it first.
        pair: by operator after the gap, its twin before it.
        twin: by storage before the gap, its twin after it.
    """

    program: Program
    gap: Gap
    label: list[int | None] = field(init=False)
    of: list[int | None] = field(init=False)
    pair: dict[int, int] = field(default_factory=dict)
    twin: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        program = self.program
        numbers = [number_in(self.gap.blocks, op.module) for op in program.ops]
        self.label = [None] * len(numbers)
        forward = set(program.forward)
        steps = len(forward) + len(program.backward)
        for part in (program.forward, [i for i in range(steps) if i not in forward]):
            for i, copy in zip(part, by_position([numbers[i] for i in part]), strict=True):
                self.label[i] = copy
        self.of = [None if m == INPUT or m >= steps else self.label[m] for m in program.maker]
        for op, label in zip(reversed(program.ops[:steps]), reversed(self.label[:steps])):  # noqa: B905
            for s in op.reads:
                if program.maker[s] == INPUT:
                    self.of[s] = label
        # the halves of collectives and the copies of storages are where these are
        for i, split in program.splits.items():
            for half in split:
                self.label[half] = self.label[i]
        for s, transfer in program.transfers.items():
            for i in transfer:
                self.label[i] = self.of[s]
        for i in range(steps, len(program.ops)):
            for s in program.ops[i].makes:
                if program.maker[s] == i:
                    self.of[s] = self.label[i]

    @cached_property
    def _before(self) -> dict[int, int]:
        """By storage after the gap, its twin before it."""
        return {after: before for before, after in self.twin.items()}

    def run(self) -> Program:
        """The long program."""
        self._match()
        self._check_readers()
        program, forward = self.program, set(self.program.forward)
        steps = len(forward) + len(program.order or program.backward)
        _require(not program.order or list(program.order) == [
            i for i in range(steps) if i not in forward
        ])  # fmt: skip
        placed = list(self._spread(range(len(program.ops)), self.label))
        at = {op: k for k, op in enumerate(placed)}
        numbers = self._numbered(placed)
        sizes = {number: program.nbytes[s] for (s, _), number in numbers.items()}

        def storages(short: Iterable[int]) -> list[Placed]:
            copies = {self.gap.after: range(self.gap.count + 1)}
            every = [(s, c) for s in short for c in copies.get(self.of[s] or -1, (0,))]
            return sorted(every, key=numbers.__getitem__)

        def renumbered(short: Iterable[int]) -> frozenset[int]:
            return frozenset(numbers[p] for p in storages(short))

        return replace(
            program,
            ops=tuple(self._op(op, numbers) for op in placed),
            forward=tuple(at[op] for op in placed if op[0] in forward),
            nbytes=tuple(sizes[k] for k in range(len(sizes))),
            results=renumbered(program.results),
            gradients=renumbered(program.gradients),
            tangents=renumbered(program.tangents),
            weights=renumbered(program.weights),
            gradient_bytes={
                numbers[p]: program.gradient_bytes[p[0]] for p in storages(program.gradient_bytes)
            },
            order=tuple(
                at[op] for op in placed if op[0] < steps and op[0] not in forward
            ) if program.order else (),
            transfers={
                numbers[s, c]: Transfer(*(at[i, c] for i in program.transfers[s]))
                for s, c in storages(program.transfers)
            },
            parameters={
                numbers[s, c]: program.parameters[s]._replace(
                    name=self._name(program.parameters[s].name, c)
                )
                for s, c in storages(program.parameters)
            },
            splits={
                k: Split(*(at[half, c] for half in program.splits[i]))
                for k, (i, c) in enumerate(placed)
                if i in program.splits
            },
        )  # fmt: skip

    def _match(self) -> None:
        """Pair the operators of the two copies around the gap, and the storages they make."""
        ops, gap = self.program.ops, self.gap
        numbers = range(len(ops))
        before = [i for i in numbers if self.label[i] == gap.before]
        after = [i for i in numbers if self.label[i] == gap.after]
        _require(len(before) == len(after) > 0)
        for i, j in zip(before, after, strict=True):
            a, b = ops[i], ops[j]
            _require(
                replace(b, name=a.name, module=a.module, reads=a.reads, makes=a.makes,
                        overwrites=a.overwrites, fills=a.fills) == a
                and list(map(b.reads.index, b.fills)) == list(map(a.reads.index, a.fills))
                and gap.moved(b.module, -gap.count - 1) == self._own_name(i)
                and len(a.reads) == len(b.reads) and len(a.makes) == len(b.makes)
            )  # fmt: skip
            self.pair[j] = i
            own = [
                (r, s) for r, s in zip(a.reads, b.reads, strict=True)
                if self.of[r] == gap.before and self.of[s] == gap.after
            ]  # fmt: skip
            for r, s in (*own, *zip(a.makes, b.makes, strict=True)):
                same_size = self.program.sizes[r] == self.program.sizes[s]
                _require(self.twin.setdefault(r, s) == s and same_size)

    def _check_readers(self) -> None:
        """Only their neighbours read what is in the two copies."""
        gap = self.gap
        allowed = {gap.before: {gap.before - 1, gap.before, gap.after},
                   gap.after: {gap.before, gap.after, gap.after + 1}}  # fmt: skip
        for op, label in zip(self.program.ops, self.label, strict=True):
            for s in op.reads:
                _require(self.of[s] not in allowed or label in allowed[self.of[s]])  # type: ignore[index]

    def _spread(self, items: Sequence[int], label: Sequence[int | None]) -> Iterator[Placed]:
        """The items with those of the missing copies, between those of the two around the gap."""
        gap = self.gap
        runs = [(key, list(run)) for key, run in groupby(items, key=label.__getitem__)]
        while runs:
            key, run = runs.pop(0)
            yield from ((i, 0) for i in run)
            if key not in (gap.before, gap.after):
                continue
            _require(bool(runs) and {key, runs[0][0]} == {gap.before, gap.after})
            _, other = runs.pop(0)
            _require(len(run) == len(other))
            copies = range(1, gap.count + 1)
            after = other if key == gap.before else run
            for copy in copies if key == gap.before else reversed(copies):
                yield from ((i, copy) for i in after)
            yield from ((i, 0) for i in other)

    def _numbered(self, placed: Sequence[Placed]) -> dict[Placed, int]:
        """The storages in the order in which they would have been read."""
        maker = self.program.maker
        inputs = [s for s in range(len(maker)) if maker[s] == INPUT]
        numbers: dict[Placed, int] = {}
        for s in self._spread(inputs, self.of):
            numbers[s] = len(numbers)
        for i, copy in placed:
            for made in self.program.ops[i].makes:
                numbers.setdefault((made, copy), len(numbers))
        return numbers

    def _op(self, placed: Placed, numbers: dict[Placed, int]) -> Op:
        i, copy = placed
        op = self.program.ops[i]
        reads = self._reads_in(placed) if copy else [self._beside(i, s) for s in op.reads]
        renumbered = dict(zip(op.reads, (numbers[s] for s in reads), strict=True))
        return replace(
            op,
            name=f"{op.name}.{self.gap.before + copy}" if copy else op.name,
            module=self._name(op.module, copy) if copy else self._own_name(i),
            reads=tuple(renumbered.values()),
            makes=tuple(numbers[s, copy] for s in op.makes),
            overwrites=tuple(renumbered[s] for s in op.overwrites),
            fills=tuple(renumbered[s] for s in op.fills),
        )

    def _name(self, name: str, copy: int) -> str:
        """In a missing copy, of what is in the copy after the gap."""
        return self.gap.moved(name, copy - self.gap.count - 1) if copy else name

    def _own_name(self, i: int) -> str:
        """The module of an operator of the short program: one across the gap is in a missing copy
        now."""
        gap, name = self.gap, self.program.ops[i].module
        where = self.label[i], number_in(gap.blocks, name)
        if where == (gap.before, gap.after):
            return gap.moved(name, -gap.count)
        return gap.moved(name, gap.count) if where == (gap.after, gap.before) else name

    def _beside(self, i: int, s: int) -> Placed:
        """A storage that an operator of the short program reads: where that was across the gap, it
        is now in a missing copy."""
        where = self.label[i], self.of[s]
        if where == (self.gap.before, self.gap.after):
            return self._in_copy(s, 1)
        if where == (self.gap.after, self.gap.before):
            return self._in_copy(self._twin(s), self.gap.count)
        return s, 0

    def _reads_in(self, placed: Placed) -> list[Placed]:
        """What an operator of a missing copy reads: the same as the two around the gap, or what is
        to its copy as their operands are to theirs."""
        i, copy = placed
        gap, ops = self.gap, self.program.ops
        reads: list[Placed] = []
        for r, s in zip(ops[self.pair[i]].reads, ops[i].reads, strict=True):
            where = self.of[r], self.of[s]
            if r == s:
                _require(where[0] not in (gap.before, gap.after))
                reads.append((s, 0))
            elif where == (gap.before, gap.after):
                reads.append(self._in_copy(s, copy))
            elif where == (gap.before - 1, gap.before):
                reads.append(self._in_copy(self._twin(s), copy - 1))
            else:
                _require(where == (gap.after, gap.after + 1))
                reads.append(self._in_copy(r, copy + 1))
        return reads

    def _twin(self, s: int) -> int:
        _require(s in self.twin)
        return self.twin[s]

    def _in_copy(self, s: int, copy: int) -> Placed:
        """The storage of a copy that is like one after the gap."""
        if copy == 0:
            _require(s in self._before)
            return self._before[s], 0
        return s, copy if copy <= self.gap.count else 0
