"""The forward as a chain of stages, and the operators of the backward that belong to each.

A stage ends at an operator that everything flows through: a dominator of the result. Values that
would bridge the whole chain are left out of the flow: those without a gradient (masks, rotary
tables), small ones (a router's logits on their way to the loss), and those that many stages read (a
position bias). They are kept, or recomputed where they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx

from autopar.schedule.program import INPUT, Program

# Of all bytes that the forward makes; smaller values do not decide where stages end.
_SMALL_SHARE = 1 / 4096
_SOURCE = -2  # of the flow graph; all other nodes are operators
_MOST_STAGES = 0.6  # the share of stages that a repetition must cover
_MOST_BLOCKS = 40  # in a chain, whose solution takes time; two or more become one beyond
# A value read by this many operators, over this share of the forward, belongs to no stage.
_MANY_READERS, _LONG_SHARE = 4, 0.3


@dataclass(frozen=True)
class Stage:
    """A piece of the chain.

    Args:
        forward, backward: its operators, in order.
        input: the storage it reads from the stage before; -1 for the first.
        output: the storage that the next stage reads; -1 for the last.
        kind: equal for stages that differ in their storages only.
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
    """Cut the forward at its dominators. Stages that repeat together (attention and MLP of a block)
    become one if most of the program consists of them."""
    forward = program.forward
    position = {i: k for k, i in enumerate(forward)}
    pieces: list[tuple[int, ...]] = []
    start = 0
    for end in (position[i] + 1 for i in _dominators(program)):
        if end < len(forward):
            pieces.append(forward[start:end])
            start = end
    pieces.append(forward[start:])
    stages = _stages(program, _joined_small(program, pieces))
    period = _period([s.kind for s in stages])
    if period is None or period[1] * period[2] < _MOST_STAGES * len(stages):
        return stages
    start, length, count = period
    end = start + length * count
    length *= -(-count // _MOST_BLOCKS)
    joined = [join(program, stages[k : min(k + length, end)]) for k in range(start, end, length)]
    return (*stages[:start], *joined, *stages[end:])


def _dominators(program: Program) -> list[int]:
    """Operators of the forward that everything flows through, in order. What is computed from
    weights alone (their gathers and casts) enters everywhere and does not flow; unless nothing else
    does, where the batch itself has a gradient."""
    return _flow_through(program, program.weights) or _flow_through(program, frozenset())


def _flow_through(program: Program, weights: frozenset[int]) -> list[int]:
    """The dominators of the flow that does not come from these inputs."""
    ops, nbytes, forward = program.ops, program.nbytes, program.forward
    small = sum(nbytes[s] for s in program.forward_storages) * _SMALL_SHARE
    position = {i: k for k, i in enumerate(forward)}
    readers: dict[int, list[int]] = {}
    of_weights, flowing = set(weights), set[int]()
    for i in forward:
        if ops[i].reads and of_weights.issuperset(ops[i].reads):
            of_weights.update(ops[i].makes)
        elif ops[i].carries:
            flowing.add(i)
        for s in ops[i].reads:
            readers.setdefault(s, []).append(i)
    graph = nx.DiGraph()
    graph.add_nodes_from((_SOURCE, *forward))
    for s, users in readers.items():
        maker = program.maker[s]
        if maker not in flowing:
            continue
        span = position[users[-1]] - position[maker]
        if len(users) >= _MANY_READERS and span > _LONG_SHARE * len(forward):
            continue
        if nbytes[s] < small and span > 0.05 * len(forward):
            continue
        graph.add_edges_from((maker, user) for user in users)
    results = [s for s in program.results if program.maker[s] in position]
    if not results:
        return []
    sink = max(program.maker[s] for s in results)
    for i in flowing:
        if flowing.isdisjoint(program.maker[s] for s in ops[i].reads):
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
    """Join pieces that make little to the next one: a stage of one operator has no options."""
    total = sum(program.nbytes[s] for s in program.forward_storages)
    enough = total / (8 * max(1, len(pieces)))
    joined: list[tuple[int, ...]] = []
    waiting: tuple[int, ...] = ()
    for piece in pieces:
        waiting += piece
        nbytes = sum(program.nbytes[s] for i in waiting for s in program.ops[i].makes)
        if nbytes >= enough and len(waiting) > 1:
            joined.append(waiting)
            waiting = ()
    if waiting:
        joined.append(waiting)
    return joined


def _stages(program: Program, pieces: Sequence[tuple[int, ...]]) -> tuple[Stage, ...]:
    ops = program.ops
    of: dict[int, int] = {s: k for k, p in enumerate(pieces) for i in p for s in ops[i].makes}
    backward = _backward(program, pieces, of)
    borders = [-1]
    for k in range(1, len(pieces)):
        # the largest storage that later stages read; others are propagated
        read = {s for p in pieces[k:] for i in p for s in ops[i].reads if of.get(s, k) == k - 1}
        borders.append(max(read, key=lambda s: (program.nbytes[s], s), default=-1))
    borders.append(-1)
    stages = []
    for k, piece in enumerate(pieces):
        border = borders[k], borders[k + 1]
        kind = _kind(program, piece, backward[k], *border)
        stages.append(Stage(piece, backward[k], *border, kind))
    return tuple(stages)


def _backward(
    program: Program, pieces: Sequence[tuple[int, ...]], of: dict[int, int]
) -> list[tuple[int, ...]]:
    """The operators of the backward, by stage: that of the last values they read, but never after
    the stage of the operator before. Operators without a gradient go with their first reader."""
    ops, flows = program.ops, program.flows
    readers: dict[int, set[int]] = {}  # stages, by storage
    for k, piece in enumerate(pieces):
        for i in piece:
            for s in ops[i].reads:
                readers.setdefault(s, set()).add(k)
    backward: list[list[int]] = [[] for _ in pieces]
    now = len(pieces) - 1
    waiting: list[int] = []
    for i in program.backward:
        if i not in flows:
            waiting.append(i)
            continue
        hints: list[int] = []
        for s in ops[i].reads:
            if s in of:
                users = [k for k in readers.get(s, ()) if k > of[s]]
                if len(users) <= 1:
                    hints.append(*(users or [of[s]]))
            elif program.maker[s] == INPUT and len(readers.get(s, ())) == 1:
                hints.append(*readers[s])
        if hints:
            now = min(now, max(hints))
        backward[now] += [*waiting, i]
        waiting = []
    return [tuple(piece) for piece in backward]


def _kind(program: Program, forward: Sequence[int], backward: Sequence[int], *border: int) -> str:
    """A description that numbers storages in the order of their appearance."""
    numbers: dict[int, int] = {}
    lines = []
    for i in (*forward, *backward):
        op = program.ops[i]
        storages = [numbers.setdefault(s, len(numbers)) for s in (*op.reads, *op.makes)]
        lines.append(f"{op.kind} {storages} {op.replays}")
    return "\n".join([*lines, str([numbers.get(s, -1) for s in border])])


def _period(kinds: Sequence[str]) -> tuple[int, int, int] | None:
    """Start, length and count of the repetition that covers most stages."""
    best: tuple[int, int, int] | None = None
    for length in range(2, 9):
        for start in range(len(kinds) - 2 * length + 1):
            pattern, count = kinds[start : start + length], 1
            while kinds[start + count * length : start + (count + 1) * length] == pattern:
                count += 1
            if count > 1 and (best is None or length * count > best[1] * best[2]):
                best = start, length, count
    return best
