"""Exact reductions: each turns a problem into a smaller one and reads its solution back."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from autopar.solver.problem import Choices, Edge, Problem, Row


class Shared:
    """Nodes of one class take the same choice (repeated blocks): their costs add up.

    Exact for the restricted problem in which classes agree. Nodes of a class must have equally many
    choices.

    Args:
        problem: over all nodes.
        classes: per node.

    Attributes:
        problem: over the classes, in the order in which they first occur.
    """

    def __init__(self, problem: Problem, classes: Sequence[Hashable]) -> None:
        order = {c: i for i, c in enumerate(dict.fromkeys(classes))}
        self._whole = problem
        self._index = [order[c] for c in classes]
        # per edge: the class edge (None within a class), and whether it is turned around
        self._edge_of: list[tuple[int | None, bool]] = []
        ends: dict[tuple[int, int], int] = {}
        for edge in problem.edges:
            a, b = self._index[edge.source], self._index[edge.target]
            key = (min(a, b), max(a, b))
            self._edge_of.append((None if a == b else ends.setdefault(key, len(ends)), a > b))
        nodes, edges = self._sum(
            dict(enumerate(problem.time_us)), {e: x.time_us for e, x in enumerate(problem.edges)}
        )
        names = dict(zip(self._index[::-1], problem.names[::-1], strict=False))
        self.problem = Problem(
            tuple(nodes[i] for i in range(len(order))),
            tuple(Edge(a, b, edges[e]) for (a, b), e in ends.items()),
            tuple(map(self.row, problem.rows)),
            tuple(names[i] for i in range(len(order))) if problem.names else (),
        )

    def _sum(
        self, nodes: Mapping[int, np.ndarray], edges: Mapping[int, np.ndarray]
    ) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        summed: dict[int, np.ndarray] = {}
        pairs: dict[int, np.ndarray] = {}
        for v, terms in nodes.items():
            _accumulate(summed, self._index[v], terms)
        for e, terms in edges.items():
            target, turned = self._edge_of[e]
            if target is None:  # the same choice on both ends: a node cost
                _accumulate(summed, self._index[self._whole.edges[e].source], np.diagonal(terms))
            else:
                _accumulate(pairs, target, terms.T if turned else terms)
        return summed, pairs

    def row(self, row: Row) -> Row:
        """The row over the classes."""
        nodes, edges = self._sum(row.nodes, row.edges)
        return replace(row, nodes=nodes, edges=edges)

    def expand(self, choices: Sequence[int]) -> Choices:
        """The choice of every node, from that of every class."""
        return tuple(choices[i] for i in self._index)

    def contract(self, choices: Sequence[int]) -> Choices:
        """The choice of every class, from those of nodes that agree."""
        found = dict(zip(self._index[::-1], choices[::-1], strict=True))
        return tuple(found[i] for i in range(len(found)))


def _accumulate(total: dict[int, np.ndarray], key: int, terms: np.ndarray) -> None:
    total[key] = total[key] + terms if key in total else terms.astype(np.float64)


class Kept:
    """Only the choices `kept[v]` (indices) of each node remain.

    Attributes:
        problem: over the choices kept.
    """

    def __init__(self, problem: Problem, kept: Sequence[np.ndarray]) -> None:
        self._ends = [(e.source, e.target) for e in problem.edges]
        self._kept = kept
        self.problem = Problem(
            tuple(t[k] for t, k in zip(problem.time_us, kept, strict=True)),
            tuple(
                replace(e, time_us=e.time_us[np.ix_(kept[e.source], kept[e.target])])
                for e in problem.edges
            ),
            tuple(map(self.row, problem.rows)),
            problem.names,
        )

    def row(self, row: Row) -> Row:
        """The row over the choices kept."""
        nodes = {v: terms[self._kept[v]] for v, terms in row.nodes.items()}
        edges = {}
        for e, terms in row.edges.items():
            a, b = self._ends[e]
            edges[e] = terms[np.ix_(self._kept[a], self._kept[b])]
        return replace(row, nodes=nodes, edges=edges)

    def expand(self, choices: Sequence[int]) -> Choices:
        """Indices among all choices, from those among the kept."""
        return tuple(int(self._kept[v][c]) for v, c in enumerate(choices))


def undominated(problem: Problem) -> list[np.ndarray]:
    """Per node the choices that are left when j goes wherever some choice i of the node is never
    worse, whatever the neighbours do:

        c_v[i] - c_v[j] + sum_e max_k (c_e[i, k] - c_e[j, k])  <=  0

    for time and for every row alike. Each node works on what the ones before it kept.
    """
    kept = [np.flatnonzero(np.isfinite(t)) for t in problem.time_us]
    touching: list[list[tuple[int, bool]]] = [[] for _ in kept]
    for e, edge in enumerate(problem.edges):
        touching[edge.source].append((e, False))
        touching[edge.target].append((e, True))
    costs = [
        (dict(enumerate(problem.time_us)), {e: x.time_us for e, x in enumerate(problem.edges)})
    ]
    costs += [(dict(row.nodes), dict(row.edges)) for row in problem.rows]
    for v in range(len(kept)):
        mine = kept[v]
        replaces = ~np.eye(len(mine), dtype=bool)
        for nodes, edges in costs:
            worse = _worse(nodes[v][mine]) if v in nodes else np.zeros(replaces.shape)
            scale = np.abs(worse).max(initial=0.0)
            for e, turned in touching[v]:
                if e in edges:
                    table = edges[e].T if turned else edges[e]
                    edge = problem.edges[e]
                    other = edge.source if turned else edge.target
                    worse = worse + _worst_difference(table[np.ix_(mine, kept[other])])
            replaces &= worse <= 1e-12 * max(1.0, float(scale))
        # i can stand for j; among equals the first one stays
        mutual = replaces & replaces.T
        replaces &= ~mutual | (np.arange(len(mine))[:, None] < np.arange(len(mine))[None, :])
        # rounding makes near ties that go round in circles: what stands for others stays
        alive = np.ones(len(mine), dtype=bool)
        for j in np.flatnonzero(replaces.any(axis=0)):
            alive[j] = not (replaces[:, j] & alive).any()
        kept[v] = mine[alive]
    return kept


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
