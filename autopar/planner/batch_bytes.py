"""What a rank holds of a batch beside the microbatch that runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch.fx as fx

from autopar.ir.aliasing import tensors_of
from autopar.ir.graph import producer, shape_of
from autopar.ir.spec import local_shape
from autopar.plan_records import MemoryEstimate
from autopar.planner.planner import Planned


@dataclass(frozen=True)
class BatchBytes:
    """Of one microbatch, on the first rank.

    Args:
        inputs: all of them are there from the beginning.
        results: without scalars; those of all microbatches are there at the end, with a gradient of
            each.
    """

    inputs: float
    results: float

    @staticmethod
    def of(planned: Planned) -> BatchBytes:
        """Those of a microbatch with a plan."""
        space, graph = planned.space, planned.graph
        layouts = {
            decision.node: decision.candidates[choice].outputs
            for decision, choice in zip(space.decisions, planned.choices, strict=True)
            if decision.kind not in ("shared", "output")
        }

        def nbytes(node: fx.Node, result: int) -> float:
            value = tensors_of(node.meta["val"])[result]
            if not value.ndim:
                return 0.0
            coords = (0,) * len(space.mesh)
            shape = local_shape(shape_of(value), layouts[node][result], space.mesh, coords)
            return float(math.prod(shape) * value.element_size())

        inputs = [graph.placeholders[name] for name in graph.inputs if name is not None]
        returned: Any = graph.output.args[0]
        results = {producer(n) for n in returned[len(graph.mutations) :] if isinstance(n, fx.Node)}
        return BatchBytes(
            sum(nbytes(node, 0) for node in inputs if node in layouts),
            sum(nbytes(*result) for result in results if result[0] in layouts),
        )

    def added_to(self, memory: MemoryEstimate, microbatches: float) -> MemoryEstimate:
        """The memory of a microbatch, with the other inputs and all results of so many."""
        inputs = memory.buffers_bytes + (microbatches - 1) * self.inputs
        return replace(self.with_results(memory, microbatches), buffers_bytes=inputs)

    def with_results(self, memory: MemoryEstimate, microbatches: float) -> MemoryEstimate:
        """The same, where the inputs of all are counted already."""
        results = memory.activations_bytes + 2 * microbatches * self.results
        return replace(memory, activations_bytes=results)
