"""Live ranges of random programs, against a loop over their operators."""

import random
from collections import defaultdict

import pytest

from autopar.schedule.live_ranges import live_ranges
from autopar.schedule.program import Buffers, Op, Parameter, Program, Schedule, Transfer


def random_program(draw: random.Random) -> tuple[Program, Schedule]:
    """Operators that read what exists, and make one to three storages, some of them again."""
    given, count = 4, draw.randint(4, 40)
    nbytes = [0] * given
    ops: list[Op] = []
    exists = list(range(given))
    for k in range(count):
        reads = tuple(draw.sample(exists, draw.randint(1, min(4, len(exists)))))
        makes = []
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            makes.append(len(nbytes))
            nbytes.append(draw.choice([0, 8, 16, 64]))
        some = {s for s in reads if draw.random() < 0.4}
        buffers = Buffers(draw.randint(1, 50), draw.randint(1, 50))
        ops.append(
            Op(
                f"op{k}", "op", reads, tuple(makes), 1.0, 1.0,
                overwrites=tuple(s for s in reads if s in some and draw.random() < 0.5),
                takes_over=draw.random() < 0.3, fills=tuple(s for s in reads if s not in some),
                buffers=buffers if draw.random() < 0.3 else Buffers(),
            )
        )  # fmt: skip
        exists += makes
    half = draw.randint(0, count)
    forward = tuple(range(half))
    made = exists[given:]
    results = {s for i in forward for s in ops[i].makes if draw.random() < 0.2}
    gradients = {s for s in made if draw.random() < 0.1}
    program = Program(
        tuple(ops), forward, tuple(nbytes), frozenset(results), frozenset(gradients),
        gradient_bytes={s: 8 for s in gradients if draw.random() < 0.5},
        transfers={0: Transfer(0, 0, 0)}, parameters={0: Parameter("p", 32)},
    )  # fmt: skip
    again = [draw.randrange(count) for _ in range(draw.randint(0, 8))]
    backward = list(range(half, count))
    for i in again:  # recomputation, wherever that is: a range begins anew
        backward.insert(draw.randint(0, len(backward)), i)
    return program, Schedule(forward, tuple(backward))


def by_loop(program: Program, schedule: Schedule) -> tuple[list, dict[int, int]]:
    """Storage, start, end and what is overwritten of every range; and buffers by position."""
    forward, sequence = len(schedule.forward), schedule.forward + schedule.backward
    ranges = [[s, 0, 0, -1] for s in program.parameters]
    current = {s: k for k, s in enumerate(program.parameters)}
    used: dict[int, list[int]] = defaultdict(list)
    at_op: list[tuple[int, int, Op, dict[int, int]]] = []
    for at, i in enumerate(sequence):
        op = program.ops[i]
        operands = {s: current[s] for s in op.reads if s in current}
        for k in operands.values():
            used[k].append(at)
            ranges[k][2] = at
        at_op.append((at, len(ranges), op, operands))
        for s in op.makes:
            current[s] = len(ranges)
            ranges.append([s, at, at, -1])
        if at == forward - 1:
            for s in program.results & current.keys():
                ranges[current[s]][2] = at
    for s in {*program.gradient_bytes, *program.parameters} & current.keys():
        ranges[current[s]][2] = len(sequence) - 1
    made = [r[1] for r in ranges]
    returned = program.results | program.gradients
    for at, whole, op, operands in at_op:
        for k in (operands[s] for s in op.fills if s in operands):
            alike = (made[k] >= forward) == (at >= forward)
            if ranges[k][2] == at and alike and ranges[k][0] not in returned:
                ranges[k][2] = max([made[k], *(t for t in used[k] if t < at)])
                ranges[whole][1] = min(ranges[whole][1], made[k])
    for at, whole, op, operands in at_op:
        for s in op.overwrites:
            k = operands.get(s)
            if k is None or ranges[k][2] != at or not program.nbytes[s] or s in returned:
                continue
            if op.takes_over or (ranges[k][1] >= forward) == (at >= forward):
                ranges[whole][3] = k
                break
    buffers = {}
    for at, _, op, operands in at_op:
        if any(op.buffers):
            dies = all(s in operands and ranges[operands[s]][2] == at for s in op.reads)
            buffers[at] = op.buffers.after if dies else op.buffers.beside
    return ranges, buffers


@pytest.mark.parametrize("seed", range(40))
def test_ranges_are_those_of_a_loop(seed):
    draw = random.Random(seed)
    for _ in range(25):
        program, schedule = random_program(draw)
        ranges = live_ranges(program, schedule)
        expected, buffers = by_loop(program, schedule)
        columns = (ranges.storage, ranges.start, ranges.end, ranges.over)
        assert [list(row) for row in zip(*(c.tolist() for c in columns), strict=True)] == expected
        assert ranges.buffers == buffers
        assert list(ranges.each()) == [tuple(row[:3]) for row in expected]
