"""The forward as a chain of stages, and which of the backward belongs to each.

A stage ends where all that flows on flows through one operator: a dominator of the result. What
would bridge the whole chain is left out of the flow: values without a gradient (masks, rotary
tables), small ones (a router's logits on their way to the loss), and those that many stages read (a
position bias). They are propagated: whoever needs them finds them kept, or computes them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx

from autopar.schedule.program import GIVEN, Program

# Of all that the forward makes: less than this does not decide where stages end.
_SMALL_SHARE = 1 / 4096
_SOURCE = -2  # of the flow graph, beside the operators
_MOST = 0.6  # of the stages
# A value read at this many places, over this share of the forward, belongs to no stage.
_MANY_READERS, _LONG_SHARE = 4, 0.3


@dataclass(frozen=True)
class Stage:
    """A piece of the chain.

    Args:
        forward, backward: its operators, in order.
        input: the storage it takes from the stage before; -1 for the first.
        output: the storage it hands on; -1 for the last.
        kind: equal for stages that differ in nothing but their storages.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    input: int
    output: int
    kind: str


def join(program: Program, stages: Sequence[Stage]) -> Stage:
    """Consecutive stages as one."""
    forward = tuple(i for s in stages for i in s.forward)
    backward = tuple(i for s in reversed(stages) for i in s.backward)
    border = stages[0].input, stages[-1].output
    return Stage(forward, backward, *border, _kind(program, forward, backward, *border))


def linearize(program: Program) -> tuple[Stage, ...]:
    """Cut the forward at its dominators; stages that repeat together (attention and MLP of a block)
    become one if that is what most of the program consists of."""
    ends = _dominators(program)
    forward = program.forward
    place = {i: k for k, i in enumerate(forward)}
    cuts = [place[i] for i in ends if i in place]
    pieces: list[tuple[int, ...]] = []
    start = 0
    for cut in cuts:
        if cut + 1 < len(forward):
            pieces.append(tuple(forward[start : cut + 1]))
            start = cut + 1
    pieces.append(tuple(forward[start:]))
    pieces = _joined_small(program, pieces)
    stages = _stages(program, pieces)
    period = _period([s.kind for s in stages])
    if period is None or period[1] * period[2] < _MOST * len(stages):
        return stages
    start, length, count = period
    end = start + length * count
    joined = [join(program, stages[k : k + length]) for k in range(start, end, length)]
    return (*stages[:start], *joined, *stages[end:])


def _dominators(program: Program) -> list[int]:
    """Operators through which everything flows, in order."""
    ops, nbytes = program.ops, program.nbytes
    small = sum(nbytes[s] for s in program.forward_made) * _SMALL_SHARE
    forward = list(program.forward)
    place = {i: k for k, i in enumerate(forward)}
    readers: dict[int, list[int]] = {}
    for i in forward:
        for s in ops[i].reads:
            readers.setdefault(s, []).append(i)
    graph = nx.DiGraph()
    graph.add_nodes_from((_SOURCE, *forward))
    for s, users in readers.items():
        maker = program.maker[s]
        if maker == GIVEN or not ops[maker].carries:
            continue
        span = place[users[-1]] - place[maker]
        if len(users) >= _MANY_READERS and span > _LONG_SHARE * len(forward):
            continue
        if nbytes[s] < small and span > 0.05 * len(forward):
            continue
        graph.add_edges_from((maker, user) for user in users)
    results = [s for s in program.results if program.maker[s] in place]
    if not results:
        return []
    sink = max(program.maker[s] for s in results)
    for i in forward:
        makers = {program.maker[s] for s in ops[i].reads} - {GIVEN}
        if ops[i].carries and not any(ops[m].carries for m in makers):
            graph.add_edge(_SOURCE, i)
    if not nx.has_path(graph, _SOURCE, sink):
        return []
    parent = nx.immediate_dominators(graph, _SOURCE)
    chain = []
    node = sink
    while node != _SOURCE:
        chain.append(node)
        node = parent[node]
    return chain[::-1]


def _joined_small(program: Program, pieces: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Pieces that make little are joined to the next: a chain of single operators has no inner
    choice to make."""
    total = sum(program.nbytes[s] for s in program.forward_made)
    enough = total / (8 * max(1, len(pieces)))
    found: list[tuple[int, ...]] = []
    waiting: tuple[int, ...] = ()
    for piece in pieces:
        waiting += piece
        made = sum(program.nbytes[s] for i in waiting for s in program.ops[i].makes)
        if made >= enough and len(waiting) > 1:
            found.append(waiting)
            waiting = ()
    if waiting:
        found.append(waiting)
    return found


def _stages(program: Program, pieces: Sequence[tuple[int, ...]]) -> tuple[Stage, ...]:
    ops = program.ops
    of: dict[int, int] = {s: k for k, p in enumerate(pieces) for i in p for s in ops[i].makes}
    backward = _backward(program, pieces, of)
    borders = [-1]
    for k in range(1, len(pieces)):
        # the largest that is handed over; others are propagated
        handed = {s for p in pieces[k:] for i in p for s in ops[i].reads if of.get(s, k) == k - 1}
        borders.append(max(handed, key=lambda s: (program.nbytes[s], s), default=-1))
    borders.append(-1)
    return tuple(
        Stage(
            piece, backward[k], borders[k], borders[k + 1],
            _kind(program, piece, backward[k], borders[k], borders[k + 1]),
        )
        for k, piece in enumerate(pieces)
    )  # fmt: skip


def _backward(
    program: Program, pieces: Sequence[tuple[int, ...]], of: dict[int, int]
) -> list[tuple[int, ...]]:
    """The stage of every operator of the backward: the last whose values it reads, but never after
    the stage of the operator before it. What needs no gradient
    stands before its first reader, and goes with it."""
    ops, flows = program.ops, program.flows
    given: dict[int, set[int]] = {}
    for k, piece in enumerate(pieces):
        for i in piece:
            for s in ops[i].reads:
                given.setdefault(s, set()).add(k)
    found: list[list[int]] = [[] for _ in pieces]
    now = len(pieces) - 1
    waiting: list[int] = []
    for i in program.backward:
        if i not in flows:
            waiting.append(i)
            continue
        hints: list[int] = []
        for s in ops[i].reads:
            if s in of:
                # what is handed over is read by the next stage
                users = [k for k in given.get(s, ()) if k > of[s]]
                if len(users) <= 1:
                    hints.append(*(users or [of[s]]))
            elif program.maker[s] == GIVEN and len(given.get(s, ())) == 1:
                hints.append(*given[s])
        if hints:
            now = min(now, max(hints))
        found[now] += [*waiting, i]
        waiting = []
    return [tuple(f) for f in found]


def _kind(program: Program, forward: Sequence[int], backward: Sequence[int], *border: int) -> str:
    """A description in which storages are numbered as they appear."""
    numbers: dict[int, int] = {}
    lines = []
    for i in (*forward, *backward):
        op = program.ops[i]
        named = [numbers.setdefault(s, len(numbers)) for s in (*op.reads, *op.makes)]
        lines.append(f"{op.kind} {named} {op.replays}")
    return "\n".join([*lines, str([numbers.get(s, -1) for s in border])])


def _period(kinds: Sequence[str]) -> tuple[int, int, int] | None:
    """Start, length and count of the repetition that covers most stages."""
    best: tuple[int, tuple[int, int, int]] | None = None
    for length in range(2, 9):
        for start in range(len(kinds) - 2 * length + 1):
            count = 1
            while (
                kinds[start + count * length : start + (count + 1) * length]
                == (kinds[start : start + length])
            ):
                count += 1
            covered = count * length
            if count > 1 and (best is None or covered > best[0]):
                best = covered, (start, length, count)
    return best[1] if best is not None else None
