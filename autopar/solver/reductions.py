"""Exact reductions: each turns a problem into a smaller one and says how to read its solution back.

`reduce(problem) -> (smaller, inverse)`, where `inverse(choices)` gives choices of the original.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from autopar.solver.problem import Edge, Problem

Inverse = Callable[[Sequence[int]], tuple[int, ...]]


def share(problem: Problem, classes: Sequence[int]) -> tuple[Problem, Inverse]:
    """Nodes of one class take the same choice (repeated blocks): their costs add up.

    Exact for the restricted problem in which classes agree. Nodes of a class must have equally many
    choices.
    """
    order = {c: i for i, c in enumerate(dict.fromkeys(classes))}
    index = [order[c] for c in classes]
    count = len(order)
    time: list[np.ndarray | None] = [None] * count
    memory: list[np.ndarray | None] = [None] * count
    names = [""] * count

    def plus(total: np.ndarray | None, more: np.ndarray) -> np.ndarray:
        return more.astype(np.float64) if total is None else total + more

    for v, i in enumerate(index):
        time[i] = plus(time[i], problem.time_us[v])
        memory[i] = plus(memory[i], problem.memory_bytes[v])
        names[i] = names[i] or (problem.names[v] if problem.names else "")
    edge_time: dict[tuple[int, int], np.ndarray | None] = defaultdict(lambda: None)
    edge_memory: dict[tuple[int, int], np.ndarray | None] = defaultdict(lambda: None)
    for edge in problem.edges:
        a, b = index[edge.source], index[edge.target]
        t, m = edge.time_us, edge.memory_bytes
        if a == b:  # the same choice on both ends: a node cost
            time[a] = plus(time[a], np.diagonal(t))
            if m is not None:
                memory[a] = plus(memory[a], np.diagonal(m))
            continue
        if a > b:
            a, b, t, m = b, a, t.T, None if m is None else m.T
        edge_time[a, b] = plus(edge_time[a, b], t)
        if m is not None:
            edge_memory[a, b] = plus(edge_memory[a, b], m)
    edges = tuple(
        Edge(a, b, t, edge_memory[a, b]) for (a, b), t in edge_time.items() if t is not None
    )
    smaller = Problem(
        tuple(t for t in time if t is not None),
        tuple(m for m in memory if m is not None),
        edges,
        problem.budget_bytes,
        tuple(names),
    )
    return smaller, lambda choices: tuple(choices[i] for i in index)


def keep_choices(problem: Problem, kept: Sequence[np.ndarray]) -> tuple[Problem, Inverse]:
    """Only the choices `kept[v]` (indices) of each node remain."""
    smaller = Problem(
        tuple(t[k] for t, k in zip(problem.time_us, kept, strict=True)),
        tuple(m[k] for m, k in zip(problem.memory_bytes, kept, strict=True)),
        tuple(
            Edge(
                e.source,
                e.target,
                e.time_us[np.ix_(kept[e.source], kept[e.target])],
                None
                if e.memory_bytes is None
                else e.memory_bytes[np.ix_(kept[e.source], kept[e.target])],
            )
            for e in problem.edges
        ),
        problem.budget_bytes,
        problem.names,
    )
    return smaller, lambda choices: tuple(int(kept[v][c]) for v, c in enumerate(choices))


def drop_dominated(problem: Problem) -> tuple[Problem, Inverse]:
    """Drop choice j of a node where some choice i is never worse, whatever the neighbours do:

        c_v[i] - c_v[j] + sum_e max_k (c_e[i, k] - c_e[j, k])  <=  0

    for time and for memory alike. Each pass works on what the previous nodes kept.
    """
    kept = [np.flatnonzero(np.isfinite(t)) for t in problem.time_us]
    touching: list[list[tuple[np.ndarray, np.ndarray | None, int]]] = [[] for _ in kept]
    for e in problem.edges:
        m = e.memory_bytes
        touching[e.source].append((e.time_us, m, e.target))
        touching[e.target].append((e.time_us.T, None if m is None else m.T, e.source))
    for v in range(len(kept)):
        mine = kept[v]
        worse = [_worse(problem.time_us[v][mine]), _worse(problem.memory_bytes[v][mine])]
        for time, memory, other in touching[v]:
            block = np.ix_(mine, kept[other])
            worse[0] += _worst_difference(time[block])
            if memory is not None:
                worse[1] += _worst_difference(memory[block])
        # replaces[i, j]: i can stand for j; among equals the first one stays
        replaces = (worse[0] <= 1e-12) & (worse[1] <= 1e-6)
        np.fill_diagonal(replaces, False)
        mutual = replaces & replaces.T
        replaces &= ~mutual | (np.arange(len(mine))[:, None] < np.arange(len(mine))[None, :])
        # rounding makes near ties that go round in circles: what stands for others stays
        alive = np.ones(len(mine), dtype=bool)
        for j in np.flatnonzero(replaces.any(axis=0)):
            alive[j] = not (replaces[:, j] & alive).any()
        kept[v] = mine[alive]
    return keep_choices(problem, kept)


def _worse(cost: np.ndarray) -> np.ndarray:
    return cost[:, None] - cost[None, :]


def _worst_difference(cost: np.ndarray) -> np.ndarray:
    """[i, j]: max over k of cost[i, k] - cost[j, k], where j may be forbidden but i may not."""
    unique, position = np.unique(cost, axis=0, return_inverse=True)
    position = position.reshape(-1)
    finite = np.where(np.isfinite(unique), unique, 1e30)
    small = np.empty((len(unique), len(unique)))
    for i in range(len(unique)):
        small[i] = (finite[i] - finite).max(axis=1)
    return small[np.ix_(position, position)]
