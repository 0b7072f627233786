"""Costs of converting a value, for every pair of candidates of the two decisions it connects."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from autopar.comm.cost import ASYNC_SUM_BYTES
from autopar.ir.spec import ShardingSpec
from autopar.planner.decisions import Decision, Edge
from autopar.planner.op_costs import OpCosts
from autopar.sharding.conversion.converter import LayoutConverter


@dataclass(frozen=True)
class CopyBytes:
    """Bytes that a conversion takes beside its source, all [source candidate, target candidate].

    Args:
        result: of the copy that is made.
        working: more than that while it runs, as a gather reorders what has arrived.
        dying: the same if the source is freed before.
    """

    result: np.ndarray
    working: np.ndarray
    dying: np.ndarray


@dataclass(frozen=True)
class EdgeCosts:
    """Costs of the conversions on an edge, all [source candidate, target candidate].

    Args:
        cost_class: edges with equal integers have equal costs.
        forward_us, backward_us: of the value and of its gradient; infinite without a conversion.
        again_us: of the second gather of a parameter, before its backward.
        memory_bytes: of the converted copy, where one is kept.
        copies: what a conversion makes, of a forward.
    """

    cost_class: int
    forward_us: np.ndarray
    backward_us: np.ndarray
    again_us: np.ndarray
    memory_bytes: np.ndarray | None
    copies: CopyBytes | None = None

    @cached_property
    def time_us(self) -> np.ndarray:
        return self.forward_us + self.backward_us + self.again_us

    @cached_property
    def hidden_us(self) -> np.ndarray:
        """Times where conversions overlap with compute: zero, or infinite without a conversion."""
        return np.where(np.isfinite(self.time_us), 0.0, np.inf)

    @cached_property
    def queued_us(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Forward, backward and again; zero where a conversion does not exist."""
        parts = (self.forward_us, self.backward_us, self.again_us)
        forward, backward, again = (np.where(np.isfinite(us), us, 0.0) for us in parts)
        return forward, backward, again

    @cached_property
    def released_us(self) -> np.ndarray:
        """Backward and again."""
        _, backward, again = self.queued_us
        return backward + again


class EdgeCostTable:
    """Costs of edges, computed once per class."""

    def __init__(self, converter: LayoutConverter, costs: OpCosts, *, forward: bool) -> None:
        self._converter, self._costs, self._forward = converter, costs, forward
        self._known: dict[Hashable, EdgeCosts] = {}

    def of(self, edge: Edge, source: Decision, target: Decision) -> EdgeCosts:
        """Costs of one edge."""
        key = (
            source.candidates_class, edge.result, target.candidates_class, edge.operand,
            edge.shape, edge.itemsize, edge.grad, edge.saved, edge.weight, target.kind == "output",
            edge.grad_itemsize, edge.cast,
        )  # fmt: skip
        if key not in self._known:
            self._known[key] = self._computed(len(self._known), edge, source, target)
        return self._known[key]

    def _computed(
        self, cost_class: int, edge: Edge, source: Decision, target: Decision
    ) -> EdgeCosts:
        rows, row_of = _unique(c.outputs[edge.result] for c in source.candidates)
        columns, column_of = _unique(c.inputs[edge.operand] for c in target.candidates)
        every = np.ix_(row_of, column_of)
        specs = [rows[0] if spec is None else spec for spec in columns]

        def convert(grad: bool) -> np.ndarray:
            costs = self._converter.costs_us(
                edge.shape, edge.itemsize, rows, specs, grad=grad, weight=edge.weight,
                grad_itemsize=edge.grad_itemsize,
            )  # fmt: skip
            return costs[every]

        forward = convert(grad=False)
        possible = np.where(np.isfinite(forward), forward, 0.0)
        forbidden = np.where(np.isfinite(forward), 0.0, np.inf)
        backward = convert(grad=True) - possible if edge.grad else forbidden
        # a small sum that is only returned (the loss) runs asynchronously
        small = edge.itemsize * prod(edge.shape) <= ASYNC_SUM_BYTES
        if target.kind == "output" and edge.grad and small:
            sums = np.array([[bool(a.partial) and a.dims == b.dims for b in specs] for a in rows])
            forward = np.where(sums[every], self._costs.cluster.device.launch_us, forward)
        reshards = np.array([[c.reshard_after_forward] for c in source.candidates])
        memory = copies = None
        local_bytes = [
            0 if spec is None else self._costs.local_bytes(edge.shape, edge.itemsize, spec)
            for spec in columns
        ]
        if self._forward:
            copies = self._copies(edge, rows, columns, every)
        if edge.saved or target.kind == "output":
            converts = np.array([[edge.cast or a.dims != b.dims for b in specs] for a in rows])
            # a copy that is dropped after the forward is not kept; the caller keeps results
            keeps = (target.kind == "output") | ~reshards
            memory = keeps * (converts * np.array(local_bytes, dtype=np.float64))[every]
        again = reshards * possible + forbidden
        return EdgeCosts(cost_class, forward, backward, again, memory, copies)

    def _copies(
        self,
        edge: Edge,
        rows: Sequence[ShardingSpec],
        columns: Sequence[ShardingSpec | None],
        every: tuple[np.ndarray, ...],
    ) -> CopyBytes:
        specs = [rows[0] if spec is None else spec for spec in columns]
        made = np.array([self._costs.local_bytes(edge.shape, edge.itemsize, s) for s in specs])
        held = np.array([self._costs.local_bytes(edge.shape, edge.itemsize, s) for s in rows])
        known: dict[Hashable, int] = {}
        before, after = (
            np.array([known.setdefault((s.dims, s.partial), len(known)) for s in each])
            for each in (rows, specs)
        )
        converts = (before[:, None] != after) | edge.cast
        converts &= np.array([spec is not None for spec in columns])
        split, kept = (
            np.array([_axes_of_dims(s) for s in each], dtype=np.int64) for each in (rows, specs)
        )
        lost = np.where(converts[..., None], split[:, None] & ~kept, 0)
        share = self._received_share(edge.shape, rows, lost)
        result = converts * made.astype(float)
        working = share * made.astype(float)
        dying = np.maximum(0.0, working - held[:, None])
        return CopyBytes(result[every], working[every], dying[every])

    def _received_share(
        self, shape: Sequence[int], rows: Sequence[ShardingSpec], lost: np.ndarray
    ) -> np.ndarray:
        """What a gather holds besides its result, as a share of it [source, target]. Rows join
        along another dim than the first. Along the first they arrive in place, one axis after
        the other, the outermost last.

        Args:
            lost: [source, target, dim], the axes of each dim that are gathered, as bits.
        """
        share = lost.any(axis=-1).astype(float)
        if not shape:
            return share
        sizes = [[self._costs.mesh[axis] for axis in spec.dims[0]] for spec in rows]
        outermost = np.array([each[0] if each else 1 for each in sizes])
        axes = lost[..., 0]
        in_place = (axes != 0) & (lost.sum(axis=-1) == axes)
        several = (axes & (axes - 1)) != 0
        return np.where(in_place, several / outermost[:, None], share)


def _axes_of_dims(spec: ShardingSpec) -> list[int]:
    """The mesh axes that split each dim, as bits."""
    return [sum(1 << axis for axis in axes) for axes in spec.dims]


def _unique(items: Iterable[Any]) -> tuple[list[Any], list[int]]:
    seen: dict[Any, int] = {}
    position = [seen.setdefault(item, len(seen)) for item in items]
    return list(seen), position
