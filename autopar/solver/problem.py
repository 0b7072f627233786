"""The SPMD problem as a value.

    minimize    sum_v t_v[x_v] + sum_(u,v) t_uv[x_u, x_v]                    (time, microseconds)
    subject to  sum_v m_v[x_v] + sum_(u,v) m_uv[x_u, x_v]  <=  budget        (bytes per device)

x_v is the strategy chosen for node v. Infinite time forbids a choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Edge:
    """Costs that depend on the choices of two nodes.

    Args:
        source, target: node indices, different from each other.
        time_us: [choices of source, choices of target].
        memory_bytes: the same shape, or None for no memory.
    """

    source: int
    target: int
    time_us: np.ndarray
    memory_bytes: np.ndarray | None = None


@dataclass(frozen=True)
class Problem:
    """One strategy per node, minimal time, bounded memory.

    Args:
        time_us: per node the time of each choice.
        memory_bytes: per node the bytes of each choice.
        edges: pairwise costs; several edges between the same nodes add up.
        budget_bytes: bound on the sum of bytes.
        names: per node, for messages.
    """

    time_us: tuple[np.ndarray, ...]
    memory_bytes: tuple[np.ndarray, ...]
    edges: tuple[Edge, ...]
    budget_bytes: float = np.inf
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for v, (time, memory) in enumerate(zip(self.time_us, self.memory_bytes, strict=True)):
            name = self.names[v] if self.names else f"node {v}"
            if time.shape != memory.shape or time.ndim != 1 or not len(time):
                raise ValueError(
                    f"{name}: time {time.shape} and memory {memory.shape} do not match"
                )
            if np.isnan(time).any() or np.isnan(memory).any() or (memory < 0).any():
                raise ValueError(f"{name}: costs must be numbers, memory not negative")
            if not np.isfinite(time).any():
                raise ValueError(f"{name}: every choice is forbidden")
        for edge in self.edges:
            shape = (len(self.time_us[edge.source]), len(self.time_us[edge.target]))
            if edge.time_us.shape != shape or edge.source == edge.target:
                raise ValueError(
                    f"edge {edge.source}-{edge.target}: {edge.time_us.shape} != {shape}"
                )

    def evaluate(self, choices: Sequence[int]) -> tuple[float, float]:
        """Time in microseconds and memory in bytes of a full assignment."""
        time = sum(float(t[c]) for t, c in zip(self.time_us, choices, strict=True))
        memory = sum(float(m[c]) for m, c in zip(self.memory_bytes, choices, strict=True))
        for edge in self.edges:
            pair = choices[edge.source], choices[edge.target]
            time += float(edge.time_us[pair])
            if edge.memory_bytes is not None:
                memory += float(edge.memory_bytes[pair])
        return time, memory

    def weighted(self, price: float) -> tuple[list[np.ndarray], list[tuple[int, int, np.ndarray]]]:
        """Unary and pairwise costs of time + price * memory (microseconds per byte)."""
        unary = [t + price * m for t, m in zip(self.time_us, self.memory_bytes, strict=True)]
        pairs = [
            (
                e.source,
                e.target,
                e.time_us if e.memory_bytes is None else e.time_us + price * e.memory_bytes,
            )
            for e in self.edges
        ]
        return unary, pairs


@dataclass(frozen=True)
class Solution:
    """A choice per node and how good it is.

    Args:
        choices: per node.
        time_us, memory_bytes: of the choices.
        bound_us: no assignment within the budget is faster than this.
        method: what certified it ("elimination", "ilp (HiGHS)", ...).
    """

    choices: tuple[int, ...]
    time_us: float
    memory_bytes: float
    bound_us: float
    method: str

    @property
    def gap(self) -> float:
        """(incumbent - bound) / incumbent."""
        if self.time_us <= 0:
            return 0.0
        return max(0.0, (self.time_us - self.bound_us) / self.time_us)
