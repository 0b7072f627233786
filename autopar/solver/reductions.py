"""Smaller problems: each is made from one, and reads its choices back."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopar.solver.problem import Choices, PairCost, Problem, Row


@dataclass(frozen=True)
class Target:
    """Where the terms of a node or of an edge are added when nodes are tied.

    Args:
        is_edge: to an edge between classes; else to a class.
        index: of the edge, or of the class.
        transposed: the edge between the classes points the other way.
        diagonal: an edge inside a class, both ends of which take the same choice.
    """

    is_edge: bool
    index: int
    transposed: bool = False
    diagonal: bool = False

    def project(self, terms: np.ndarray) -> np.ndarray:
        """The terms over the choices of the class, or of the two classes."""
        return np.diagonal(terms) if self.diagonal else terms.T if self.transposed else terms


@dataclass(frozen=True)
class TiedProblem:
    """A problem, and which of its nodes may be tied.

    Args:
        problem: over all nodes.
        classes: per node; nodes of one class may be tied.
        node_costs, edge_costs: as for `TiedVariables`.
    """

    problem: Problem
    classes: tuple[int, ...]
    node_costs: tuple[int, ...] | None = None
    edge_costs: tuple[int, ...] | None = None

    def tied(self, classes: Sequence[Hashable] | None = None) -> TiedVariables:
        """The problem with its classes, or with others, tied."""
        if classes is None:
            classes = self.classes
        return TiedVariables(self.problem, classes, self.node_costs, self.edge_costs)


class TiedVariables:
    """Nodes of one class take the same choice (repeated blocks): their costs add up.

    Exact for the restricted problem in which the nodes of a class agree. They must have equally
    many choices.

    Args:
        problem: over all nodes.
        classes: per node.
        node_costs, edge_costs: per node and per edge an integer; those with equal integers have
            equal costs, which are then counted instead of added one by one.

    Attributes:
        problem: over the classes, in the order in which they first occur.
    """

    def __init__(
        self,
        problem: Problem,
        classes: Sequence[Hashable],
        node_costs: Sequence[int] | None = None,
        edge_costs: Sequence[int] | None = None,
    ) -> None:
        order = {c: i for i, c in enumerate(dict.fromkeys(classes))}
        self._index = [order[c] for c in classes]
        self._node_targets = [Target(False, i) for i in self._index]
        self._edge_targets: list[Target] = []
        ends: dict[tuple[int, int], int] = {}
        for edge in problem.edges:
            a, b = self._index[edge.source], self._index[edge.target]
            if a == b:
                self._edge_targets.append(Target(False, a, diagonal=True))
            else:
                index = ends.setdefault((min(a, b), max(a, b)), len(ends))
                self._edge_targets.append(Target(True, index, transposed=a > b))
        nodes, edges = self._sum(
            enumerate(problem.time_us),
            ((e, edge.time_us) for e, edge in enumerate(problem.edges)),
            node_costs or range(len(problem.time_us)),
            edge_costs or range(len(problem.edges)),
        )
        names = dict(zip(self._index[::-1], problem.names[::-1], strict=False))
        self.problem = Problem(
            tuple(nodes[i] for i in range(len(order))),
            tuple(PairCost(a, b, edges[e]) for (a, b), e in ends.items()),
            tuple(map(self.row, problem.rows)),
            tuple(names[i] for i in range(len(order))) if problem.names else (),
        )

    def _sum(
        self,
        nodes: Iterable[tuple[int, np.ndarray]],
        edges: Iterable[tuple[int, np.ndarray]],
        node_costs: Sequence[int],
        edge_costs: Sequence[int],
    ) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        terms = [(self._node_targets[v], ("node", node_costs[v]), terms) for v, terms in nodes]
        terms += [(self._edge_targets[e], ("edge", edge_costs[e]), terms) for e, terms in edges]
        return TermGroups(terms).sums(np.ones(len(terms), dtype=bool))

    def target(self, index: int, is_edge: bool) -> Target:
        """Where the terms of a node or of an edge are added."""
        return (self._edge_targets if is_edge else self._node_targets)[index]

    def row(self, row: Row) -> Row:
        """The row over the classes."""
        each = range(len(self._index)), range(len(self._edge_targets))
        nodes, edges = self._sum(row.nodes.items(), row.edges.items(), *each)
        return replace(row, nodes=nodes, edges=edges)

    def expand(self, choices: Sequence[int]) -> Choices:
        """The choice of every node, from that of every class."""
        return tuple(choices[i] for i in self._index)

    def contract(self, choices: Sequence[int]) -> Choices:
        """The choice of every class, from those of nodes that agree."""
        by_class = dict(zip(self._index[::-1], choices[::-1], strict=True))
        return tuple(by_class[i] for i in range(len(by_class)))


class TermGroups:
    """Terms with equal values and the same target, counted, so that copies of a block cost nothing.

    Args:
        terms: (target, key, values) of each; equal keys have equal values.
        restrict: applied to projected values, such as leaving out choices.
    """

    def __init__(
        self,
        terms: Iterable[tuple[Target, Hashable, np.ndarray]],
        restrict: Callable[[Target, np.ndarray], np.ndarray] = lambda target, values: values,
    ) -> None:
        groups: dict[tuple[Target, Hashable], int] = {}
        self._distinct: list[tuple[Target, np.ndarray]] = []
        group_of = []
        for target, key, values in terms:
            group = groups.setdefault((target, key), len(groups))
            if group == len(self._distinct):
                self._distinct.append((target, restrict(target, target.project(values))))
            group_of.append(group)
        self._group_of = np.array(group_of, dtype=np.int64)

    def sums(self, included: np.ndarray) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """Per class, and per edge between classes, the sum of its included terms ([terms] mask)."""
        counts = np.bincount(self._group_of[included], minlength=len(self._distinct))
        nodes: dict[int, np.ndarray] = {}
        edges: dict[int, np.ndarray] = {}
        for g in np.flatnonzero(counts):
            target, values = self._distinct[g]
            sums, more = (edges if target.is_edge else nodes), values * float(counts[g])
            sums[target.index] = sums[target.index] + more if target.index in sums else more
        return nodes, edges


class RestrictedDomains:
    """Only the choices `domains[v]` (indices) of each node remain.

    Attributes:
        problem: over the choices that remain.
    """

    def __init__(self, problem: Problem, domains: Sequence[np.ndarray]) -> None:
        self._ends = [(e.source, e.target) for e in problem.edges]
        self._domains = domains
        self.problem = Problem(
            tuple(t[d] for t, d in zip(problem.time_us, domains, strict=True)),
            tuple(
                replace(e, time_us=self._select(e.time_us, e.source, e.target))
                for e in problem.edges
            ),
            tuple(map(self.row, problem.rows)),
            problem.names,
        )

    def row(self, row: Row) -> Row:
        """The row over the choices that remain."""
        nodes = {v: self._select(terms, v) for v, terms in row.nodes.items()}
        edges = {e: self._select(terms, *self._ends[e]) for e, terms in row.edges.items()}
        return replace(row, nodes=nodes, edges=edges)

    def _select(self, terms: np.ndarray, *nodes: int) -> np.ndarray:
        return terms[np.ix_(*(self._domains[v] for v in nodes))]

    def restrict(self, target: Target, terms: np.ndarray) -> np.ndarray:
        """Terms of a node, or of the ends of an edge, over the choices that remain."""
        nodes = self._ends[target.index] if target.is_edge else (target.index,)
        return self._select(terms, *nodes)

    def expand(self, choices: Sequence[int]) -> Choices:
        """Indices among all choices, from those among the choices that remain."""
        return tuple(int(self._domains[v][c]) for v, c in enumerate(choices))

    def contract(self, choices: Sequence[int]) -> Choices:
        """Indices among the choices that remain, from those among all choices."""
        pairs = zip(self._domains, choices, strict=True)
        return tuple(int(np.searchsorted(domain, c)) for domain, c in pairs)
