"""A model captured for a batch, and for the microbatches of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from autopar.errors import PlanError
from autopar.ir.graph import ModelGraph
from autopar.ir.precision import Precision
from autopar.passes.microbatches import (
    Microbatches,
    exact_microbatches,
    independent_microbatches,
)
from autopar.planner.planner import captured, trainable_inputs
from autopar.planner.work import batch_dims
from autopar.progress import Progress
from autopar.tracer import ColoTracer


@dataclass(frozen=True)
class TracedBatch:
    """
    Args:
        args, kwargs: of the batch.
        graph: of the batch.
        samples: of the batch.
        dims: by position among the tensor inputs, the dim that holds samples.
    """

    model: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    graph: ModelGraph
    samples: int
    dims: Mapping[int, int]
    precision: Precision | None

    @staticmethod
    def of(
        model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any],
        batch_dim: Mapping[str, int | None] | int, precision: Precision | None, progress: Progress,
    ) -> TracedBatch:  # fmt: skip
        """Capture a model for a batch.

        Raises:
            CaptureError: the model cannot be captured.
            PlanError: no input holds samples.
        """
        with progress.stage("trace") as running:
            graph = ColoTracer(precision=precision).trace(model, args, kwargs)
            running.done = captured(model, graph)
        return TracedBatch.of_graph(model, args, kwargs, graph, batch_dim, precision)

    @staticmethod
    def of_graph(
        model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], graph: ModelGraph,
        batch_dim: Mapping[str, int | None] | int = 0, precision: Precision | None = None,
    ) -> TracedBatch:  # fmt: skip
        """A batch of which the graph is known.

        Raises:
            PlanError: no input holds samples.
        """
        names = [name for name in graph.inputs if name is not None]
        shapes = [tuple(graph.placeholders[name].meta["val"].shape) for name in names]
        samples, dims = batch_dims(names, shapes, batch_dim)
        if not dims:
            raise PlanError(
                "no tensor among the inputs holds samples, so there is no batch to split into "
                "microbatches; pass the batch as an argument of the model, or batch_dim="
            )
        return TracedBatch(model, tuple(args), dict(kwargs), graph, samples, dims, precision)

    def exact(self) -> Microbatches:
        """Microbatches that give what the batch gives."""
        names = [name for name in self.graph.inputs if name is not None]
        dims = {names[k]: dim for k, dim in self.dims.items()}
        trainable = trainable_inputs(self.graph, self.model)
        return exact_microbatches(self.graph, dims, self.samples, trainable)

    def independent(self, count: int | None) -> Microbatches:
        """Microbatches that are batches of their own.

        Raises:
            PlanError: their number is open.
        """
        if count is None:
            raise PlanError(
                "microbatch='independent' changes with the number of microbatches: give it, as "
                "microbatches=8"
            )
        return independent_microbatches(self.graph, -(-self.samples // count), self._part)

    def _part(self, size: int) -> ModelGraph:
        """The graph of a microbatch."""
        position = itertools.count()

        def part(x: torch.Tensor) -> torch.Tensor:
            k = next(position)
            return x.narrow(self.dims[k], 0, size) if k in self.dims else x

        args, kwargs = pytree.tree_map_only(torch.Tensor, part, (self.args, self.kwargs))
        return ColoTracer(precision=self.precision).trace(self.model, args, kwargs)
