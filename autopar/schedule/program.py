"""The joint graph as plain numbers: operators, the storages they read and make, and their costs.

A view makes no storage and is no operator here: whoever reads a view reads its base. Schedules are
found on a `Program`, without torch; `realize.py` turns a schedule into graphs.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np

INPUT = -1  # stands for the maker of a storage that exists before the step


class Resource(enum.StrEnum):
    """What an operator occupies while it runs."""

    COMPUTE = "compute"
    COMMUNICATION = "communication"
    HOST = "host link"


BY_NAME = tuple(sorted(Resource))  # numbers of resources, for inner loops
SIDE = frozenset((Resource.COMMUNICATION, Resource.HOST))


class Buffers(NamedTuple):
    """Bytes that an operator holds while it runs, besides its operands and results.

    Args:
        beside: if an operand is needed afterwards.
        after: if the operands end with this operator, each where its implementation reads it last.
    """

    beside: int = 0
    after: int = 0


NO_BUFFERS = Buffers()


@dataclass(frozen=True)
class Op:
    """An operator call that makes storages.

    Args:
        name: of its node.
        kind: equal for calls that differ in the values of their operands only.
        reads: storages, each once.
        makes: storages.
        flops: as torch counts them; without a formula, the elements of the largest operand or
            result.
        us: time on its resource, microseconds.
        replays: it may run twice: the same operands give the same results, without side effects.
        overwrites: storages it reads that its one result may be written over.
        takes_over: it may be written over what the forward has saved for it.
        fills: storages it reads that are copied into its one result as soon as they are made, if
            nothing reads them afterwards (parts of a concatenation).
        carries: a gradient flows through it.
        module: path of the module that called it.
        beside: compute goes on while it runs, if the device supports that.
        buffers: that it holds while it runs.
    """

    name: str
    kind: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    flops: float
    us: float
    replays: bool = True
    overwrites: tuple[int, ...] = ()
    takes_over: bool = False
    fills: tuple[int, ...] = ()
    carries: bool = True
    module: str = ""
    resource: Resource = Resource.COMPUTE
    beside: bool = False
    buffers: Buffers = NO_BUFFERS


class Transfer(NamedTuple):
    """The operators that move a storage to the host and back. A schedule runs all or none of them;
    for a parameter, as often as it is offloaded.

    Args:
        offload: starts the copy to the host.
        evict: waits for that copy; then the storage is freed.
        reload: starts the copy back, into a storage that replaces the first.
    """

    offload: int
    evict: int
    reload: int


class Parameter(NamedTuple):
    """The shard of a parameter that may be on the host for a part of the step."""

    name: str
    nbytes: int


class Split(NamedTuple):
    """Two operators that may replace a collective, so that compute runs between them.

    Args:
        start: reads what the collective reads and makes a buffer.
        finish: waits, and makes the results, unless the buffer becomes the result.
    """

    start: int
    finish: int


class Rows(NamedTuple):
    """Storages by operator, as flat arrays.

    Args:
        counts: of each operator's storages.
        starts: where they begin in `storages`.
    """

    counts: np.ndarray
    starts: np.ndarray
    storages: np.ndarray

    @staticmethod
    def of(rows: Sequence[Sequence[int]]) -> Rows:
        counts = np.fromiter(map(len, rows), dtype=np.intp, count=len(rows))
        storages = np.fromiter(chain.from_iterable(rows), dtype=np.intp)
        return Rows(counts, counts.cumsum() - counts, storages)

    def in_sequence(self, ops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in a sequence of operators, which rise, and the storages there."""
        counts = self.counts[ops]
        position = np.repeat(np.arange(len(ops)), counts)
        within = np.arange(len(position)) - (counts.cumsum() - counts)[position]
        return position, self.storages[self.starts[ops][position] + within]


class Tables(NamedTuple):
    """A program as arrays.

    Args:
        reads, makes, fills, overwrites: of `Op`.
        takes_over: of `Op`.
        buffers: [op, 2], of `Buffers`.
        kept: whether a storage is returned.
        may_be_written: whether the memory of a storage may become another one's.
    """

    reads: Rows
    makes: Rows
    fills: Rows
    overwrites: Rows
    takes_over: np.ndarray
    buffers: np.ndarray
    kept: np.ndarray
    may_be_written: np.ndarray


@dataclass(frozen=True)
class Program:
    """A training step.

    Args:
        ops: in the order of the joint graph.
        forward: the operators of the forward, in order; all others belong to the backward.
        nbytes: of every storage that schedules decide about; 0 for inputs of the step and gradients
            of parameters.
        results: storages that the forward returns.
        gradients: storages that the backward returns.
        tangents: gradients of results, with which the backward starts.
        beside: resources that run beside compute; operators of others block compute.
        gradient_bytes: by storage, of gradients of parameters, which stay until the step ends.
        order: the backward's operators as they run, if not as in `ops`.
        transfers: by storage; not in forward or backward unless a schedule uses them.
        parameters: by storage, those that have a transfer. They exist before and after the step, so
            their bytes count only (negatively) while they are offloaded.
        splits: by collective; a schedule may use them instead of it.
        host_bytes: available on the host.
        weights: storages of the step's inputs that have a gradient.
    """

    ops: tuple[Op, ...]
    forward: tuple[int, ...]
    nbytes: tuple[int, ...]
    results: frozenset[int]
    gradients: frozenset[int]
    tangents: frozenset[int] = frozenset()
    beside: frozenset[Resource] = SIDE
    gradient_bytes: Mapping[int, int] = field(default_factory=dict)
    order: tuple[int, ...] = ()
    transfers: Mapping[int, Transfer] = field(default_factory=dict)
    parameters: Mapping[int, Parameter] = field(default_factory=dict)
    splits: Mapping[int, Split] = field(default_factory=dict)
    host_bytes: float = math.inf
    weights: frozenset[int] = frozenset()

    @cached_property
    def tables(self) -> Tables:
        """What operators read, make, fill and may overwrite, as arrays."""
        kept = np.zeros(len(self.nbytes), dtype=bool)
        kept[[*self.results, *self.gradients]] = True
        return Tables(
            Rows.of([op.reads for op in self.ops]),
            Rows.of([op.makes for op in self.ops]),
            Rows.of([op.fills for op in self.ops]),
            Rows.of([op.overwrites for op in self.ops]),
            np.array([op.takes_over for op in self.ops], dtype=bool),
            np.array([op.buffers for op in self.ops], dtype=np.int64).reshape(-1, 2),
            kept,
            ~kept & (np.array(self.nbytes) > 0),
        )

    @cached_property
    def uses(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...], float, int, bool], ...]:
        """What each operator reads and makes, its microseconds, its resource in `BY_NAME`, and
        whether compute waits for it, for the inner loop of times."""
        return tuple(
            (
                op.reads, op.makes, op.us, BY_NAME.index(op.resource),
                not op.beside or op.resource not in self.beside,
            )
            for op in self.ops
        )  # fmt: skip

    @cached_property
    def transferred(self) -> Mapping[int, int]:
        """The storage that each operator of a transfer moves."""
        return {i: s for s, transfer in self.transfers.items() for i in transfer}

    @cached_property
    def started(self) -> Mapping[int, int]:
        """The collective that each start belongs to."""
        return {split.start: i for i, split in self.splits.items()}

    @cached_property
    def halves(self) -> Mapping[int, int]:
        """The collective that each start and each finish belongs to."""
        return {half: i for i, split in self.splits.items() for half in split}

    @cached_property
    def maker(self) -> tuple[int, ...]:
        """The operator that makes each storage, not one that reloads it or half of a collective;
        `INPUT` for those that exist before the step."""
        makers = [INPUT] * len(self.nbytes)
        for i, op in enumerate(self.ops):
            for s in op.makes:
                if makers[s] == INPUT and s not in self.parameters:
                    makers[s] = i
        return tuple(makers)

    @cached_property
    def sizes(self) -> np.ndarray:
        """`nbytes`, `gradient_bytes` and those of `parameters` as an array."""
        sizes = np.array(self.nbytes, dtype=np.float64)
        for s, n in self.gradient_bytes.items():
            sizes[s] += n
        for s, parameter in self.parameters.items():
            sizes[s] += parameter.nbytes
        return sizes

    @cached_property
    def backward(self) -> tuple[int, ...]:
        """The operators of the backward, in order."""
        forward = set(self.forward)
        return self.order or tuple(i for i in range(len(self.ops)) if i not in forward)

    @cached_property
    def backward_readers(self) -> Mapping[int, int]:
        """How many operators of the backward read a storage."""
        return Counter(s for i in self.backward for s in set(self.ops[i].reads))

    @cached_property
    def flows(self) -> frozenset[int]:
        """Operators of the backward through which a gradient flows; the others depend on the
        forward's values alone."""
        carried = set(self.tangents)
        flows: set[int] = set()
        for i in self.backward:
            if any(s in carried for s in self.ops[i].reads):
                flows.add(i)
                carried.update(self.ops[i].makes)
        return frozenset(flows)

    @cached_property
    def forward_storages(self) -> frozenset[int]:
        """Storages that the forward makes."""
        return frozenset(s for i in self.forward for s in self.ops[i].makes)

    @cached_property
    def needed(self) -> frozenset[int]:
        """Storages of the forward that the backward reads."""
        read = {s for i in self.backward for s in self.ops[i].reads}
        return frozenset(read & self.forward_storages)

    @cached_property
    def signature(self) -> str:
        """Equal for programs that one schedule fits: their operators read and make the same
        storages, with the same collectives. The programs of a mesh's ranks differ in sizes, if dims
        are split unevenly, and in a few operators that only the first rank computes."""
        digest = hashlib.sha256(repr((self.forward, sorted(self.results))).encode())
        for op in self.ops:
            kind = op.kind.split()[0] if op.resource is Resource.COMMUNICATION else ""
            digest.update(repr((op.reads, op.makes, op.resource, op.replays, kind)).encode())
        return digest.hexdigest()[:16]

    def same_as(self, other: Program) -> bool:
        """Whether both have the same schedules, and these need the same memory."""
        return (self.signature, self.nbytes, self.parameters) == (
            other.signature, other.nbytes, other.parameters,
        )  # fmt: skip

    def flops(self, sequence: Sequence[int]) -> float:
        """FLOPs of a sequence of operators."""
        return sum(self.ops[i].flops for i in sequence)


@dataclass(frozen=True)
class Schedule:
    """What runs, in order. An operator may occur more than once, and reads what was made last
    before it. The forward saves what the backward reads without making it first.

    Args:
        forward, backward: operators of a `Program`.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]

    def saved(self, program: Program) -> tuple[int, ...]:
        """Storages that the forward makes and the backward needs, in the order of their making."""
        written: set[int] = set()
        needed: set[int] = set()
        for i in self.backward:
            needed.update(s for s in program.ops[i].reads if s not in written)
            written.update(program.ops[i].makes)
        needed |= program.gradients - written
        needed -= program.parameters.keys()
        forward = dict.fromkeys(s for i in self.forward for s in program.ops[i].makes)
        return tuple(s for s in forward if s in needed)

    def offloaded(self, program: Program) -> frozenset[int]:
        """Storages that move to the host."""
        transferred = program.transferred
        sequence = self.forward + self.backward
        return frozenset(transferred[i] for i in sequence if i in transferred)

    def recomputed(self, program: Program) -> tuple[int, ...]:
        """Operators of the backward that ran before, each time they do; without transfers."""
        seen = {program.started.get(i, i) for i in self.forward}
        recomputed = []
        for i in self.backward:
            collective = program.started.get(i, i)
            if collective in seen and i not in program.transferred:
                recomputed.append(i)
            seen.add(collective)
        return tuple(recomputed)

    def recompute_cost(self, program: Program, cost: Mapping[int, float] | None = None) -> float:
        """FLOPs (or `cost`) of what is recomputed."""
        recomputed = self.recomputed(program)
        return program.flops(recomputed) if cost is None else sum(cost[i] for i in recomputed)


def eager_schedule(program: Program) -> Schedule:
    """Keeps everything that the backward needs."""
    return Schedule(program.forward, program.backward)
