"""Smaller problems: each is made from one and reads its choices back."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopar.solver.problem import Choices, PairCost, Problem, Row


@dataclass(frozen=True)
class Place:
    """Where the terms of a node or of an edge go when copies share their choices.

    Args:
        is_edge: to an edge between classes, or else to a class.
        index: of the edge, or of the class.
        turned: the edge's ends are the other way around.
        inside: an edge between copies, which make the same choice on both ends.
    """

    is_edge: bool
    index: int
    turned: bool = False
    inside: bool = False

    def seen(self, terms: np.ndarray) -> np.ndarray:
        """The terms over the choices of the class, or of the two classes."""
        return np.diagonal(terms) if self.inside else terms.T if self.turned else terms


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
        ends: dict[tuple[int, int], int] = {}
        classes_at = [Place(False, i) for i in range(len(order))]
        self._nodes = [classes_at[i] for i in self._index]
        self._edges: list[Place] = []
        for edge in problem.edges:
            a, b = self._index[edge.source], self._index[edge.target]
            if a == b:
                self._edges.append(Place(False, a, inside=True))
            else:
                index = ends.setdefault((min(a, b), max(a, b)), len(ends))
                self._edges.append(Place(True, index, turned=a > b))
        nodes, edges = self._sum(
            dict(enumerate(problem.time_us)), {e: x.time_us for e, x in enumerate(problem.edges)}
        )
        names = dict(zip(self._index[::-1], problem.names[::-1], strict=False))
        self.problem = Problem(
            tuple(nodes[i] for i in range(len(order))),
            tuple(PairCost(a, b, edges[e]) for (a, b), e in ends.items()),
            tuple(map(self.row, problem.rows)),
            tuple(names[i] for i in range(len(order))) if problem.names else (),
        )

    def _sum(
        self, nodes: Mapping[int, np.ndarray], edges: Mapping[int, np.ndarray]
    ) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        places = [(self._nodes[v], terms) for v, terms in nodes.items()]
        places += [(self._edges[e], terms) for e, terms in edges.items()]
        groups = Groups(places)
        return groups.sums(groups.counts(np.arange(len(places))))

    def place(self, index: int, is_edge: bool) -> Place:
        """Where the terms of a node or of an edge go."""
        return (self._edges if is_edge else self._nodes)[index]

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


class Groups:
    """Terms with their places, by what they add where: what adds the same is counted, so that
    copies cost nothing. Copies have the same arrays, not equal ones.

    Args:
        terms: (place, values) of each.
        cut: what is done to values where they go, such as leaving some out.
    """

    def __init__(
        self,
        terms: Iterable[tuple[Place, np.ndarray]],
        cut: Callable[[Place, np.ndarray], np.ndarray] = lambda place, seen: seen,
    ) -> None:
        known: dict[tuple[Place, int], int] = {}
        self._distinct: list[tuple[Place, np.ndarray]] = []
        of = []
        for place, values in terms:
            key = place, id(values)
            if key not in known:
                known[key] = len(known)
                self._distinct.append((place, cut(place, place.seen(values))))
            of.append(known[key])
        self._of = np.array(of, dtype=np.int64)

    def counts(self, some: np.ndarray) -> np.ndarray:
        """[groups]: how many of some terms (their indices, or a mask) are of each group."""
        return np.bincount(self._of[some], minlength=len(self._distinct))

    def sums(self, counts: np.ndarray) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """Per class and per edge between classes, what so many of each group add up to."""
        nodes: dict[int, np.ndarray] = {}
        edges: dict[int, np.ndarray] = {}
        for g in np.flatnonzero(counts):
            place, seen = self._distinct[g]
            found, more = (edges if place.is_edge else nodes), seen * float(counts[g])
            found[place.index] = found[place.index] + more if place.index in found else more
        return nodes, edges


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
        nodes = {v: self._cut(terms, v) for v, terms in row.nodes.items()}
        edges = {e: self._cut(terms, *self._ends[e]) for e, terms in row.edges.items()}
        return replace(row, nodes=nodes, edges=edges)

    def _cut(self, terms: np.ndarray, *nodes: int) -> np.ndarray:
        return terms[np.ix_(*(self._kept[v] for v in nodes))]

    def cut(self, place: Place, terms: np.ndarray) -> np.ndarray:
        """Terms over all choices of a node, or of the ends of an edge, over the choices kept."""
        nodes = self._ends[place.index] if place.is_edge else (place.index,)
        return self._cut(terms, *nodes)

    def expand(self, choices: Sequence[int]) -> Choices:
        """Indices among all choices, from those among the kept."""
        return tuple(int(self._kept[v][c]) for v, c in enumerate(choices))

    def contract(self, choices: Sequence[int]) -> Choices:
        """Indices among the kept, from those among all choices."""
        return tuple(int(np.searchsorted(k, c)) for k, c in zip(self._kept, choices, strict=True))
