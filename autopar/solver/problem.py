"""The SPMD problem as a value.

    minimize    sum_v t_v[x_v] + sum_(u,v) t_uv[x_u, x_v] + sum_s slack_s       (microseconds)
    subject to  sum_v a_v[x_v] + sum_e a_e[x_u, x_v]  <=  limit                 for each hard row
                sum_v a_v[x_v] + sum_e a_e[x_u, x_v]  <=  limit + slack_s       for each soft row

x_v is the choice of node v; infinite time forbids a choice. A hard row bounds the memory at one
program point of the step. A soft row is communication that overlaps with compute: the excess over
the limit is exposed. Rows that share a slack are different program points, and the largest excess
counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Choices = tuple[int, ...]


@dataclass(frozen=True)
class PairCost:
    """Time that depends on the choices of two nodes.

    Args:
        source, target: node indices, different from each other.
        time_us: [choices of source, choices of target].
    """

    source: int
    target: int
    time_us: np.ndarray


@dataclass(frozen=True)
class Row:
    """A linear expression in the choices, and its limit.

    Args:
        name: unique.
        limit: bound on the expression, in its own unit (bytes; microseconds for soft rows).
        nodes: terms [choices] per node.
        edges: terms [source, target] per edge (an index into `Problem.edges`), finite.
        slack: empty for a hard row; else the slack that absorbs the excess, at one microsecond per
            unit.
    """

    name: str
    limit: float
    nodes: Mapping[int, np.ndarray]
    edges: Mapping[int, np.ndarray] = field(default_factory=dict)
    slack: str = ""


# A separation oracle: the rows that choices violate most, of each kind. Rows need not be listed.
Separate = Callable[[Choices], Sequence[Row]]


@dataclass(frozen=True)
class Problem:
    """One choice per node, minimal time, within the rows.

    Args:
        time_us: per node the time of each choice.
        edges: pairwise times; several edges between the same nodes add up.
        rows: limits.
        names: per node, for error messages.
    """

    time_us: tuple[np.ndarray, ...]
    edges: tuple[PairCost, ...] = ()
    rows: tuple[Row, ...] = ()
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for v, time in enumerate(self.time_us):
            if time.ndim != 1 or not len(time):
                raise ValueError(f"{self.name(v)}: time of shape {time.shape}, not [choices]")
            if np.isnan(time).any():
                raise ValueError(f"{self.name(v)}: costs must be numbers")
            if not np.isfinite(time).any():
                raise ValueError(f"{self.name(v)}: every choice is forbidden")
        for e, edge in enumerate(self.edges):
            shape = self._shape(e)
            if edge.time_us.shape != shape or edge.source == edge.target:
                raise ValueError(
                    f"edge {edge.source}-{edge.target}: {edge.time_us.shape} != {shape}"
                )
        for row in self.rows:
            self.check(row)

    def check(self, row: Row) -> None:
        """Raises ValueError where a row does not fit the problem."""
        for v, terms in row.nodes.items():
            if terms.shape != self.time_us[v].shape or not np.isfinite(terms).all():
                raise ValueError(f"{row.name}: terms of {self.name(v)} do not match its choices")
        for e, terms in row.edges.items():
            if terms.shape != self._shape(e) or not np.isfinite(terms).all():
                raise ValueError(f"{row.name}: terms of edge {e} do not match its choices")

    def name(self, v: int) -> str:
        return self.names[v] if self.names else f"node {v}"

    def _shape(self, e: int) -> tuple[int, int]:
        return len(self.time_us[self.edges[e].source]), len(self.time_us[self.edges[e].target])

    def pairs(self) -> list[tuple[int, int, np.ndarray]]:
        """Edges as (source, target, times)."""
        return [(e.source, e.target, e.time_us) for e in self.edges]

    def usage(self, row: Row, choices: Sequence[int]) -> float:
        """The row's expression less its limit."""
        total = sum(float(terms[choices[v]]) for v, terms in row.nodes.items())
        for e, terms in row.edges.items():
            total += float(terms[choices[self.edges[e].source], choices[self.edges[e].target]])
        return total - row.limit

    def choices_us(self, choices: Sequence[int]) -> float:
        """Time of a full assignment, without slacks."""
        time = sum(float(t[c]) for t, c in zip(self.time_us, choices, strict=True))
        return time + sum(
            float(e.time_us[choices[e.source], choices[e.target]]) for e in self.edges
        )


@dataclass(frozen=True)
class Branch:
    """A node of the branching tree.

    Args:
        decided: per node that was branched on, its choices in this part (indices).
        prices: that bounded this part, by row name.
        parts: its children.
    """

    decided: Mapping[int, np.ndarray]
    prices: Mapping[str, float]
    parts: tuple[Branch, ...] = ()

    @property
    def leaves(self) -> int:
        """The number of its parts that are not divided."""
        return sum(part.leaves for part in self.parts) or 1


@dataclass(frozen=True)
class Solution:
    """A choice per node and how good it is.

    Args:
        choices: per node.
        time_us: of the choices, slacks included.
        bound_us: no assignment within the rows is faster.
        method: what certified the gap ("elimination", "Lagrangian prices", "ilp (HiGHS)").
        prices: Lagrangian prices, by row name.
        relaxed_us: the bound at these prices alone.
        near: if that does not close the gap, the visited assignments that are faster than this one
            at these prices.
        tree: of branching, if there was any.
        visited: assignments that were evaluated.
    """

    choices: Choices
    time_us: float
    bound_us: float
    method: str
    prices: Mapping[str, float] = field(default_factory=dict)
    relaxed_us: float = -math.inf
    near: tuple[Choices, ...] = ()
    tree: Branch | None = None
    visited: tuple[Choices, ...] = ()

    @property
    def gap(self) -> float:
        """(incumbent - bound) / incumbent."""
        if self.time_us <= 0:
            return 0.0
        return max(0.0, (self.time_us - self.bound_us) / self.time_us)
