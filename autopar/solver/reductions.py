"""Smaller problems: each is made from one and reads its choices back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from autopar.solver.problem import Choices, Edge, Problem, Row

_Key = TypeVar("_Key", bound=Hashable)


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
        # per edge: the class edge, and whether it is turned around; or, with the same choice on
        # both ends, None and the class whose cost it is
        self._of: list[tuple[int | None, int]] = []
        ends: dict[tuple[int, int], int] = {}
        for edge in problem.edges:
            a, b = self._index[edge.source], self._index[edge.target]
            key = (min(a, b), max(a, b))
            inside = a == b
            self._of.append((None, a) if inside else (ends.setdefault(key, len(ends)), a > b))
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
        for v, times, terms in _counted((self._index[v], terms) for v, terms in nodes.items()):
            _accumulate(summed, v, times, terms)
        for (target, node), times, terms in _counted((self._of[e], t) for e, t in edges.items()):
            if target is None:
                _accumulate(summed, node, times, np.diagonal(terms))
            else:
                _accumulate(pairs, target, times, terms.T if node else terms)
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


def _counted(terms: Iterable[tuple[_Key, np.ndarray]]) -> list[tuple[_Key, int, np.ndarray]]:
    """How often each array occurs under a key. Copies have the same arrays, not equal ones."""
    given = [*terms]
    times = Counter((key, id(values)) for key, values in given)
    distinct = {(key, id(values)): (key, values) for key, values in given}
    return [(key, times[at], values) for at, (key, values) in distinct.items()]


def _accumulate(total: dict[int, np.ndarray], key: int, times: int, terms: np.ndarray) -> None:
    terms = terms * float(times)
    total[key] = total[key] + terms if key in total else terms


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
