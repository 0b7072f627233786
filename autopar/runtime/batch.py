"""How a batch enters and leaves: the same on every rank, or each rank its own samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.cluster.cluster import ClusterInfo
from autopar.comm.steps import linear
from autopar.errors import MeshError
from autopar.ir.graph import ModelGraph, shape_of
from autopar.ir.spec import ShardingSpec, local_shape
from autopar.runtime.distribute import shard_of


def _differentiated(x: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


@dataclass(frozen=True)
class BatchLayout:
    """Args:
    local: every rank passes its own samples, split over all mesh axes along dim 0.
    cluster: the mesh.
    shapes: of the tensor inputs as the user passes them.
    samples: extent of dim 0 that counts as the batch (None: no input has one).
    """

    local: bool
    cluster: ClusterInfo
    shapes: tuple[tuple[int, ...], ...]
    samples: int | None

    @staticmethod
    def of(batch: str, cluster: ClusterInfo, inputs: Any) -> BatchLayout:
        """Raises:
        MeshError: local batches of different sizes.
        """
        tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)]
        shapes = tuple(tuple(x.shape) for x in tensors)
        samples = next((s[0] for s in shapes if s), None)
        if batch == "local" and cluster.world_size > 1:
            everyone: list[Any] = [None] * cluster.world_size
            dist.all_gather_object(everyone, shapes)
            if len(set(everyone)) > 1:
                sizes = [s[0][0] if s and s[0] else None for s in everyone]
                raise MeshError(
                    f"local batches must have equal shapes on all ranks, got batch sizes {sizes}; "
                    "drop the last incomplete batch (drop_last=True) or pass global batches"
                )
        return BatchLayout(batch == "local", cluster, shapes, samples)

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(a for a, n in enumerate(self.cluster.mesh) if n > 1)

    @property
    def joined(self) -> list[int]:
        """Numbers of the tensor inputs of which every rank passes its samples."""
        if not self.local or self.samples is None or self.cluster.world_size == 1:
            return []
        return [k for k, shape in enumerate(self.shapes) if shape and shape[0] == self.samples]

    def _split(self, shape: Sequence[int], samples: int | None) -> ShardingSpec:
        """Dim 0 over all axes if it is the batch."""
        if not shape or shape[0] != samples:
            return ShardingSpec.replicated(len(shape))
        return ShardingSpec((self._axes, *((),) * (len(shape) - 1)))

    def global_inputs(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Inputs of global shape to trace with."""
        if not self.local:
            return args, kwargs

        return pytree.tree_map_only(torch.Tensor, self.gather, (args, kwargs))

    def whole_shapes(self) -> list[tuple[int, ...]]:
        """Of the tensor inputs over all ranks."""
        joined, ranks = self.joined, self.cluster.world_size
        return [
            (shape[0] * ranks, *shape[1:]) if k in joined else shape
            for k, shape in enumerate(self.shapes)
        ]

    def gather(self, x: Any) -> Any:
        """The global input of which every rank passes a part."""
        if not self.local or not x.ndim or x.shape[0] != self.samples:
            return x
        parts = [torch.empty_like(x) for _ in range(self.cluster.world_size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def fixed_inputs(self) -> tuple[ShardingSpec | None, ...] | None:
        if not self.local:
            return None
        return tuple(self._split(shape, self.samples) for shape in self.shapes)

    def fixed_outputs(self, graph: ModelGraph) -> tuple[ShardingSpec, ...] | None:
        """Results are replicated, or with local batches this rank's samples."""
        if not self.local or self.samples is None:
            return None
        total = self.samples * self.cluster.world_size
        values = graph.output.args[0][len(graph.mutations) :]  # type: ignore[index]
        return tuple(
            self._split(shape_of(v.meta["val"]), total)  # type: ignore[union-attr]
            for v in values  # type: ignore[union-attr]
            if hasattr(v, "meta")
        )

    def take(
        self,
        tensors: Sequence[torch.Tensor],
        specs: Sequence[ShardingSpec],
        mesh: DeviceMesh,
        coords: tuple[int, ...],
        device: torch.device,
    ) -> list[torch.Tensor]:
        """This rank's part of every tensor input; gradients flow back to the whole ones."""
        if self.local:
            return [self._own(x.to(device)) for x in tensors]

        def part(x: torch.Tensor, spec: ShardingSpec) -> torch.Tensor:
            return shard_of(x, spec, self.cluster.mesh, coords).to(device).contiguous()

        def whole(shard: torch.Tensor, x: torch.Tensor, spec: ShardingSpec) -> torch.Tensor:
            placements = spec.to_placements(mesh.ndim)
            dtensor = DTensor.from_local(
                shard, mesh, placements, run_check=False, shape=x.shape, stride=x.stride()
            )
            return dtensor.full_tensor().to(x.device)

        return [
            linear(x, partial(part, spec=spec), partial(whole, x=x.detach(), spec=spec))
            if _differentiated(x)
            else part(x, spec)
            for x, spec in zip(tensors, specs, strict=True)
        ]

    def _own(self, x: torch.Tensor) -> torch.Tensor:
        """A local input. Its gradient is that of this rank's loss, of which `give` made a share."""
        if not _differentiated(x):
            return x
        ranks = self.cluster.world_size
        return linear(x, lambda v: v.view_as(v), lambda g: g * ranks)

    def give(self, results: Sequence[Any]) -> list[Any]:
        """Results to the caller. Gradients of this rank's samples are scaled: as in DDP, a mean
        over them is a share of the mean over all."""
        if not self.local:
            return list(results)
        share = 1 / self.cluster.world_size
        return [
            linear(x, lambda v: v.view_as(v), lambda g: g * share)
            if isinstance(x, torch.Tensor) and x.ndim and x.requires_grad
            else x
            for x in results
        ]

    def example_shards(
        self,
        graph: ModelGraph,
        specs: Sequence[ShardingSpec],
        coords: tuple[int, ...],
        device: torch.device,
    ) -> list[torch.Tensor]:
        """Tensors shaped as `take` gives them."""
        names = [n for n in graph.inputs if n is not None]
        fakes = [graph.placeholders[n].meta["val"] for n in names]
        return [
            torch.zeros(
                local_shape(shape_of(f), spec, self.cluster.mesh, coords),
                dtype=f.dtype,
                device=device,
            )
            for f, spec in zip(fakes, specs, strict=True)
        ]
