"""The joint graph as plain numbers: operators, the storages they read and make, what they cost.

A view makes no storage, so it is no operator here: whoever reads a view reads its base. All that
schedules (`simulate.py`, `search.py`, ...) works on a `Program` and knows no torch;
`realize.py` turns the schedule found back into graphs.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

GIVEN = -1  # the maker of a storage that was there before the step


class Resource(enum.StrEnum):
    """What an operator occupies while it runs."""

    COMPUTE = "compute"
    COMMUNICATION = "communication"
    HOST = "host link"


SIDE = frozenset((Resource.COMMUNICATION, Resource.HOST))


@dataclass(frozen=True)
class Op:
    """An operator call that makes storages.

    Args:
        name: of its node.
        kind: equal for calls that differ in their operands' values only.
        reads: storages, each once.
        makes: storages.
        flops: as torch counts them; of an operator without a formula, its largest operand's or
            result's elements.
        us: time on its resource, microseconds.
        replays: run again on the same operands it gives the same results, and does nothing else.
        overwrites: storages it reads in whose place its one result may be written.
        carries: a gradient flows through it.
        module: path of the module that called it.
        resource: what it occupies.
        beside: compute goes on while it runs, where the device can; what reads its results waits.
    """

    name: str
    kind: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    flops: float
    us: float
    replays: bool = True
    overwrites: tuple[int, ...] = ()
    carries: bool = True
    module: str = ""
    resource: Resource = Resource.COMPUTE
    beside: bool = False


class Transfer(NamedTuple):
    """The operators that move a storage to the host and back; schedules run all or none, for a
    parameter as often as it leaves.

    Args:
        out: starts the copy to the host.
        left: it is done, and the storage may go.
        back: starts the copy back, into a storage that takes the place of the first.
    """

    out: int
    left: int
    back: int


class Parameter(NamedTuple):
    """A shard of a parameter that may be on the host for a part of the step.

    Args:
        name: of the parameter.
        nbytes: of the shard.
    """

    name: str
    nbytes: int


class Split(NamedTuple):
    """A collective in two operators, which stand for it where compute is to go on between them.

    Args:
        start: reads what the collective reads; it makes the buffer that is under way.
        finish: waits for that, and makes what the collective makes, if that is not the buffer.
    """

    start: int
    finish: int


@dataclass(frozen=True)
class Program:
    """A training step.

    Args:
        ops: in the order in which the joint graph has them.
        forward: the operators of the forward, in order; all others are the backward's.
        nbytes: of every storage that schedules decide about; 0 for given ones and gradients of
            parameters.
        results: storages that the forward returns.
        gradients: storages that the backward returns.
        tangents: gradients of results, with which the backward starts.
        beside: resources that run beside compute; operators of others occupy compute as well.
        stays: bytes by storage of what stays until the step ends, once it is made: gradients of
            parameters.
        terms: storages that are summed to a gradient of a parameter and nothing else.
        order: the backward's operators as they run, if not as `ops` has them.
        transfers: by storage, the operators that move it to the host; no part of forward or
            backward unless a schedule takes them in.
        parameters: by storage, those that have a transfer. They are there before the step and after
            it, so their bytes count only where they are missing.
        splits: by collective, the operators that a schedule may have in its place.
        host_bytes: of the host, for what is moved.
    """

    ops: tuple[Op, ...]
    forward: tuple[int, ...]
    nbytes: tuple[int, ...]
    results: frozenset[int]
    gradients: frozenset[int]
    tangents: frozenset[int] = frozenset()
    beside: frozenset[Resource] = SIDE
    stays: Mapping[int, int] = field(default_factory=dict)
    terms: frozenset[int] = frozenset()
    order: tuple[int, ...] = ()
    transfers: Mapping[int, Transfer] = field(default_factory=dict)
    parameters: Mapping[int, Parameter] = field(default_factory=dict)
    splits: Mapping[int, Split] = field(default_factory=dict)
    host_bytes: float = math.inf

    @cached_property
    def touched(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...]:
        """What each operator reads, makes and may overwrite, for the simulation's inner loop."""
        return tuple((op.reads, op.makes, op.overwrites) for op in self.ops)

    @cached_property
    def moves(self) -> Mapping[int, int]:
        """The storage that each operator of a transfer moves."""
        return {i: s for s, transfer in self.transfers.items() for i in transfer}

    @cached_property
    def started(self) -> Mapping[int, int]:
        """The collective that each start of one stands for."""
        return {split.start: i for i, split in self.splits.items()}

    @cached_property
    def halves(self) -> Mapping[int, int]:
        """The collective that each start and finish of one belongs to."""
        return {half: i for i, split in self.splits.items() for half in split}

    @cached_property
    def maker(self) -> tuple[int, ...]:
        """The operator that makes each storage, not one that brings it back or stands for that;
        `GIVEN` for those that were there."""
        found = [GIVEN] * len(self.nbytes)
        for i, op in enumerate(self.ops):
            for s in op.makes:
                if found[s] == GIVEN and s not in self.parameters:
                    found[s] = i
        return tuple(found)

    @cached_property
    def sizes(self) -> np.ndarray:
        """`nbytes`, `stays` and those of `parameters` as an array."""
        found = np.array(self.nbytes, dtype=np.float64)
        for s, n in self.stays.items():
            found[s] += n
        for s, parameter in self.parameters.items():
            found[s] += parameter.nbytes
        return found

    def without_gradients(self) -> Program:
        """The same where gradients of parameters are there before and after, and do not count, nor
        do the terms that they are sums of."""
        counted = (0 if s in self.terms else n for s, n in enumerate(self.nbytes))
        return replace(self, nbytes=tuple(counted), stays={})

    @cached_property
    def backward(self) -> tuple[int, ...]:
        """The operators of the backward, in order."""
        mine = set(self.forward)
        return self.order or tuple(i for i in range(len(self.ops)) if i not in mine)

    @cached_property
    def flows(self) -> frozenset[int]:
        """Operators of the backward through which a gradient flows; the others compute something
        from the forward's values alone."""
        carried = set(self.tangents)
        found: set[int] = set()
        for i in self.backward:
            if any(s in carried for s in self.ops[i].reads):
                found.add(i)
                carried.update(self.ops[i].makes)
        return frozenset(found)

    @cached_property
    def forward_made(self) -> frozenset[int]:
        """Storages that the forward makes."""
        return frozenset(s for i in self.forward for s in self.ops[i].makes)

    @cached_property
    def needed(self) -> frozenset[int]:
        """Storages of the forward that operators of the backward read: what may be kept."""
        return frozenset(
            s for i in self.backward for s in self.ops[i].reads if s in self.forward_made
        )

    @cached_property
    def signature(self) -> str:
        """Equal for programs that one schedule fits: operators that read and make the same
        storages, and communicate alike. Those of the ranks of a mesh differ in sizes, where dims
        are split unevenly, and in a few operators that only the first rank computes."""
        digest = hashlib.sha256(repr((self.forward, sorted(self.results))).encode())
        for op in self.ops:
            what = op.kind.split()[0] if op.resource is Resource.COMMUNICATION else ""
            digest.update(repr((op.reads, op.makes, op.resource, op.replays, what)).encode())
        return digest.hexdigest()[:16]

    def same_as(self, other: Program) -> bool:
        """Whether the schedules of one, and what they need, are those of the other."""
        mine, theirs = ((p.signature, p.nbytes, p.parameters) for p in (self, other))
        return mine == theirs

    def flops(self, sequence: Sequence[int]) -> float:
        """FLOPs of a sequence of operators."""
        return sum(self.ops[i].flops for i in sequence)


@dataclass(frozen=True)
class Schedule:
    """What runs, in order. An operator may occur more than once: every operator reads what was made
    last before it, so that what is computed again need not be kept until then. What the backward
    reads and does not make before is kept from the forward.

    Args:
        forward, backward: operators of a `Program`.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]

    def kept(self, program: Program) -> tuple[int, ...]:
        """Storages handed from the forward to the backward, in the order of their making; without
        what was there before."""
        before = {s for i in self.forward for s in program.ops[i].makes}
        before -= program.parameters.keys()
        made: set[int] = set()
        found: set[int] = set()
        for i in self.backward:
            op = program.ops[i]
            found.update(s for s in op.reads if s not in made and s in before)
            made.update(op.makes)
        found |= {s for s in program.gradients if s not in made and s in before}
        made_in_order = (s for i in self.forward for s in program.ops[i].makes)
        return tuple(dict.fromkeys(s for s in made_in_order if s in found))

    def moved(self, program: Program) -> frozenset[int]:
        """Storages that go to the host."""
        sequence = self.forward + self.backward
        return frozenset(program.moves[i] for i in sequence if i in program.moves)

    def again(self, program: Program) -> tuple[int, ...]:
        """Operators of the backward that ran before, as often as they do; copies are no such."""
        seen = {program.started.get(i, i) for i in self.forward}
        found = []
        for i in self.backward:
            whole = program.started.get(i, i)
            if whole in seen and i not in program.moves:
                found.append(i)
            seen.add(whole)
        return tuple(found)

    def added(self, program: Program, cost: Mapping[int, float] | None = None) -> float:
        """FLOPs (or `cost`) of what is computed again."""
        again = self.again(program)
        return program.flops(again) if cost is None else sum(cost[i] for i in again)


def eager_schedule(program: Program) -> Schedule:
    """Everything is kept that the backward needs."""
    return Schedule(program.forward, program.backward)
