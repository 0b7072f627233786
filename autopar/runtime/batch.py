"""How a batch enters and leaves: the same on every rank, or each rank its own samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.cluster.cluster import ClusterInfo
from autopar.comm.steps import linear
from autopar.errors import EngineError, MeshError
from autopar.ir.graph import ModelGraph, shape_of
from autopar.ir.spec import ShardingSpec, local_shape
from autopar.runtime.call import Call
from autopar.runtime.distribute import shard_of
from autopar.runtime.donated_inputs import DonatedInput, as_examples


def _differentiated(x: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


@dataclass(frozen=True)
class Input:
    """A tensor that the caller passes.

    Args:
        position: among the flattened inputs.
        name: of the argument of `forward` that holds it.
        shape: on this rank.
        dim: which is split over the ranks; None if every rank passes the same.
    """

    position: int
    name: str
    shape: tuple[int, ...]
    dim: int | None = None


# Which dim of the inputs holds the samples: of all, or by the names of arguments.
BatchDim = int | Mapping[str, int | None]


@dataclass(frozen=True)
class BatchLayout:
    """
    Args:
        local: every rank passes its own samples, split over all mesh axes.
        cluster: the mesh.
        inputs: tensors, in order.
        samples: extent of the batch on this rank (None: no input has one).
    """

    local: bool
    cluster: ClusterInfo
    inputs: tuple[Input, ...]
    samples: int | None

    @staticmethod
    def of(
        batch: str, cluster: ClusterInfo, call: Call, names: Sequence[str], batch_dim: BatchDim = 0
    ) -> BatchLayout:
        """
        Args:
            names: of the positional arguments of `forward`.
            batch_dim: of local batches.

        Raises:
            EngineError: `batch_dim` names an argument that there is not.
            MeshError: local batches of different sizes.
        """
        inputs = _inputs(call, names)
        local = batch == "local" and cluster.world_size > 1
        if not local:
            return BatchLayout(batch == "local", cluster, inputs, None)
        _check_names(inputs, batch_dim)
        dims = [_dim_of(x, batch_dim) for x in inputs]
        sizes = (x.shape[d] for x, d in zip(inputs, dims, strict=True) if d is not None)
        samples = next(sizes, None)
        inputs = tuple(
            replace(x, dim=d) if d is not None and x.shape[d] == samples else x
            for x, d in zip(inputs, dims, strict=True)
        )
        everyone: list[Any] = [None] * cluster.world_size
        dist.all_gather_object(everyone, (samples, [x.shape for x in inputs]))
        if any(shapes != everyone[0][1] for _, shapes in everyone):
            raise MeshError(
                "local batches must have equal shapes on all ranks, got batch sizes "
                f"{[n for n, _ in everyone]}; pad samples to the same length on all ranks, drop "
                "the last incomplete batch (drop_last=True) or pass global batches"
            )
        return BatchLayout(True, cluster, inputs, samples)

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(a for a, n in enumerate(self.cluster.mesh) if n > 1)

    @property
    def joined(self) -> dict[str, int]:
        """The batch dim of the arguments of which every rank passes its samples."""
        return {x.name: x.dim for x in self.inputs if x.dim is not None}

    def _split(self, shape: Sequence[int], dim: int | None) -> ShardingSpec:
        """A dim over all axes."""
        return ShardingSpec(tuple(self._axes if d == dim else () for d in range(len(shape))))

    def split_by_state(self, shape: Sequence[int], state: str) -> ShardingSpec:
        """The layout of a value of a microbatch: split over all ranks where it has samples."""
        return self._split(shape, int(state[1:]) if state[0] == "S" else None)

    def global_inputs(self, call: Call) -> tuple[Any, Any]:
        """Inputs of global shape to trace with."""
        if not self.local:
            return as_examples(call.inputs)
        whole = [self.gather(k, x) for k, x in enumerate(call.leaves)]
        args, kwargs = pytree.tree_unflatten(whole, pytree.tree_structure(call.inputs))
        return args, kwargs

    def whole_shapes(self) -> list[tuple[int, ...]]:
        """Of the tensor inputs over all ranks."""
        ranks = self.cluster.world_size
        return [
            tuple(n * ranks if d == x.dim else n for d, n in enumerate(x.shape))
            for x in self.inputs
        ]

    def gather(self, position: int, x: Any) -> Any:
        """The global input of which every rank passes a part.

        Args:
            position: among the flattened inputs.
        """
        dims = {i.position: i.dim for i in self.inputs if i.dim is not None}
        if position not in dims:
            return x
        parts = [torch.empty_like(x) for _ in range(self.cluster.world_size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dims[position])

    def fixed_inputs(self) -> tuple[ShardingSpec | None, ...] | None:
        if not self.local:
            return None
        return tuple(self._split(x.shape, x.dim) for x in self.inputs)

    def fixed_outputs(self, graph: ModelGraph) -> tuple[ShardingSpec, ...] | None:
        """Results are replicated, or with local batches this rank's samples: split along a
        dim of the batch's size that is the batch dim of an input."""
        if not self.local or self.samples is None:
            return None
        total = self.samples * self.cluster.world_size
        dims = dict.fromkeys(x.dim for x in self.inputs if x.dim is not None)
        values: Any = graph.output.args[0]
        results = (v for v in values[len(graph.mutations) :] if hasattr(v, "meta"))
        shapes = [shape_of(v.meta["val"]) for v in results]
        return tuple(
            self._split(s, next((d for d in dims if d < len(s) and s[d] == total), None))
            for s in shapes
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
            if isinstance(x, DonatedInput):
                return x.held(spec, self.cluster.mesh, coords, device)
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
        return [
            torch.zeros(
                local_shape(
                    shape_of(graph.placeholders[name].meta["val"]), spec, self.cluster.mesh, coords
                ),
                dtype=graph.storage_dtype(name),
                device=device,
            )
            for name, spec in zip(names, specs, strict=True)
        ]


def _inputs(call: Call, names: Sequence[str]) -> tuple[Input, ...]:
    """The tensors of a call."""
    paths = (path for path, _ in pytree.tree_flatten_with_path(call.inputs)[0])
    inputs = []
    for position, (path, x) in enumerate(zip(paths, call.leaves, strict=True)):
        if isinstance(x, torch.Tensor):
            key: Any = path[1]
            by_name = isinstance(key, pytree.MappingKey)
            name = str(key.key) if by_name else str([*names, *["*args"] * (key.idx + 1)][key.idx])
            inputs.append(Input(position, name, tuple(x.shape)))
    return tuple(inputs)


def batch_dims(inputs: Sequence[Input], batch_dim: BatchDim) -> tuple[int, dict[int, int]]:
    """The samples of a global batch, and by number of the input the dim that holds them.

    The size that most inputs have there is that of the batch.

    Raises:
        EngineError: `batch_dim` names an argument, or a dim, that there is not.
    """
    _check_names(inputs, batch_dim)
    dims = {k: d for k, x in enumerate(inputs) if (d := _dim_of(x, batch_dim)) is not None}
    sizes = Counter(inputs[k].shape[d] for k, d in dims.items())
    samples = max(sizes, key=sizes.__getitem__, default=0)
    return samples, {k: d for k, d in dims.items() if inputs[k].shape[d] == samples}


def _dim_of(x: Input, batch_dim: BatchDim) -> int | None:
    """Which dim of an input holds samples, if its size agrees."""
    dim = batch_dim.get(x.name, 0) if isinstance(batch_dim, Mapping) else batch_dim
    if dim is None or not x.shape:
        return None
    if isinstance(batch_dim, int):  # targets have fewer dims than what is before the model
        dim = min(dim, len(x.shape) - 1)
    if not 0 <= dim < len(x.shape):
        raise EngineError(
            f"batch_dim says dim {dim} of {x.name}, which is of shape {list(x.shape)}; give a dim "
            "that it has, or None for an input that is the same on all ranks"
        )
    return dim


def _check_names(inputs: Sequence[Input], batch_dim: BatchDim) -> None:
    names = {x.name for x in inputs}
    unknown = sorted(set(batch_dim) - names) if isinstance(batch_dim, Mapping) else []
    if unknown:
        raise EngineError(
            f"batch_dim names {unknown}, and the tensors of this call are {sorted(names)}; name "
            "arguments of the model's forward"
        )
