"""What converting a value costs, for every pair of candidates of the two decisions it joins."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from autopar.comm.cost import ASYNC_SUM_BYTES
from autopar.planner.decisions import Decision, Edge
from autopar.planner.op_costs import OpCosts
from autopar.sharding.conversion.converter import LayoutConverter


@dataclass(frozen=True)
class EdgeCosts:
    """Conversions on a edge, all [source candidate, target candidate].

    Args:
        forward_us, backward_us: of the value and of its gradient; infinite where there is no way.
        again_us: of the value once more, before backward.
        memory_bytes: of the copy that the conversion makes, where one is kept.
    """

    forward_us: np.ndarray
    backward_us: np.ndarray
    again_us: np.ndarray
    memory_bytes: np.ndarray | None

    @cached_property
    def time_us(self) -> np.ndarray:
        return self.forward_us + self.backward_us + self.again_us

    @cached_property
    def hidden_us(self) -> np.ndarray:
        """Of a conversion that hides behind compute: nothing, where there is a way."""
        return np.where(np.isfinite(self.time_us), 0.0, np.inf)

    @cached_property
    def queued_us(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Forward, backward and again; nothing where there is no way, which is forbidden anyway."""
        forward, backward, again = (
            np.where(np.isfinite(us), us, 0.0)
            for us in (self.forward_us, self.backward_us, self.again_us)
        )
        return forward, backward, again

    @cached_property
    def released_us(self) -> np.ndarray:
        """Backward and again, in one queue."""
        _, backward, again = self.queued_us
        return backward + again


class EdgeCostTable:
    """Memoized costs of links.

    Args:
        converter: of the cluster.
        costs: of the operators, for what a layout leaves on one device.
    """

    def __init__(self, converter: LayoutConverter, costs: OpCosts) -> None:
        self._converter, self._costs = converter, costs
        self._known: dict[Hashable, EdgeCosts] = {}

    def of(self, edge: Edge, source: Decision, target: Decision) -> EdgeCosts:
        """Of one edge. Sites that are alike have the same candidates, not equal ones, so links of
        repeated blocks are priced once."""
        key = (
            id(source.candidates), edge.result, id(target.candidates), edge.operand,
            edge.shape, edge.itemsize, edge.grad, edge.saved, edge.weight, target.kind == "output",
        )  # fmt: skip
        if key not in self._known:
            self._known[key] = self._priced(edge, source, target)
        return self._known[key]

    def _priced(self, edge: Edge, source: Decision, target: Decision) -> EdgeCosts:
        rows, row_of = _unique(c.outputs[edge.result] for c in source.candidates)
        columns, column_of = _unique(c.inputs[edge.operand] for c in target.candidates)
        every = np.ix_(row_of, column_of)
        wanted = [rows[0] if spec is None else spec for spec in columns]

        def convert(grad: bool) -> np.ndarray:
            found = self._converter.costs_us(
                edge.shape, edge.itemsize, rows, wanted, grad=grad, weight=edge.weight
            )
            return found[every]

        forward = convert(grad=False)
        possible = np.where(np.isfinite(forward), forward, 0.0)
        nowhere = np.where(np.isfinite(forward), 0.0, np.inf)
        backward = convert(grad=True) - possible if edge.grad else nowhere
        # nobody waits for the sum of a loss that is only returned
        if (
            target.kind == "output"
            and edge.grad
            and edge.itemsize * prod(edge.shape) <= ASYNC_SUM_BYTES
        ):
            late = np.array([[bool(a.partial) and a.dims == b.dims for b in wanted] for a in rows])
            forward = np.where(late[every], self._costs.cluster.device.launch_us, forward)
        reshards = np.array([[c.reshard_after_forward] for c in source.candidates])
        memory = None
        if edge.saved or target.kind == "output":
            held = [
                0 if spec is None else self._costs.local_bytes(edge.shape, edge.itemsize, spec)
                for spec in columns
            ]
            moved = np.array([[a.dims != b.dims for b in wanted] for a in rows])
            # gathered for forward and dropped, the copy is not kept; the caller keeps results
            kept = (target.kind == "output") | ~reshards
            memory = kept * (moved * np.array(held, dtype=np.float64))[every]
        return EdgeCosts(forward, backward, reshards * possible + nowhere, memory)


def _unique(items: Iterable[Any]) -> tuple[list[Any], list[int]]:
    seen: dict[Any, int] = {}
    position = [seen.setdefault(item, len(seen)) for item in items]
    return list(seen), position
