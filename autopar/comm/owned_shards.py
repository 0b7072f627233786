"""`Owned`: the placement of a tensor that one coordinate of a mesh axis holds alone.

Along the pipe axis of a mesh a parameter belongs to one stage. Ranks of that coordinate hold its
rows, as the other axes split them; ranks of the others hold an empty tensor, 0 rows. What an
operator does to each element, and what sums up, is then right on local tensors as it is.

`Owned` is a `Shard` that knows its owner. Plain `Shard`, which torch cuts into equal chunks, would
leave open which coordinate has the rows: torch would pad and cut them to sizes of chunks, silently.
With the owner in the placement each conversion and each local shape is known on every rank without
asking the others, and two tensors of different owners differ in what torch compares and caches.

What operators do with such tensors is `owned_operators.py`.

Private to torch here: the methods of `Shard` that convert and say local sizes,
`DTensorSpec._verify_shard_order`, `_utils.compute_local_shape_and_global_offset`, and in
`torch.distributed.tensor._redistribute` the function `_gen_transform_infos_non_cached` and
`_TransformInfo`; tested with 2.13.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, _redistribute
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from autopar.errors import EngineError


class Owned(Shard):
    """One coordinate of the mesh axis has all of the tensor's elements.

    Args:
        dim: of which other coordinates have length 0.
        owner: the coordinate.
    """

    def __init__(self, dim: int, owner: int) -> None:
        super().__init__(dim)
        self.owner = owner

    # what torch's conversions and its checkpoints ask a `Shard` for

    def local_shard_size_and_offset(  # type: ignore[override]
        self, curr_local_size: int, num_chunks: int, rank: Any
    ) -> tuple[int, int]:
        # that of an empty part is the end, so that no part of a checkpoint has it too
        return (curr_local_size, 0) if rank == self.owner else (0, curr_local_size)

    _local_shard_size_and_offset = local_shard_size_and_offset

    def _to_replicate_tensor(
        self,
        local_tensor: torch.Tensor,
        mesh: DeviceMesh,
        mesh_dim: int,
        current_logical_shape: Sequence[Any],
    ) -> torch.Tensor:
        if mesh.get_local_rank(mesh_dim) == self.owner:
            # a copy: the others have one, and later writes to either must not reach the shard
            whole = local_tensor.clone(memory_format=torch.contiguous_format)
        else:
            whole = local_tensor.new_empty(current_logical_shape)
        if whole.numel():
            dist.broadcast(whole, group=mesh.get_group(mesh_dim), group_src=self.owner)
        return whole

    def _replicate_to_shard(
        self, local_tensor: torch.Tensor, mesh: DeviceMesh, mesh_dim: int, shard_index: Any
    ) -> torch.Tensor:
        mine = int(shard_index) == self.owner
        part = local_tensor if mine else local_tensor.narrow(self.dim, 0, 0)
        return part.clone(memory_format=torch.contiguous_format)

    def _not_in_chunks(self, *_: Any, **__: Any) -> Any:
        raise EngineError(
            f"a tensor with placement {self} belongs to one stage and is not cut into chunks; "
            "convert it by DTensor.redistribute"
        )

    # what else a `Shard` does, all of it with chunks of equal size
    _split_tensor = _select_split_tensor = _shard_tensor = _not_in_chunks
    _reduce_shard_tensor = _to_new_shard_dim = _not_in_chunks

    def __eq__(self, other: object) -> bool:
        return type(other) is Owned and (self.dim, self.owner) == (other.dim, other.owner)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((Owned, self.dim, self.owner))

    def __reduce__(self) -> Any:
        return Owned, (self.dim, self.owner)

    def __repr__(self) -> str:
        return f"Owned(dim={self.dim}, owner={self.owner})"

    def __str__(self) -> str:
        return f"O({self.dim}, {self.owner})"


def owned_axis(placements: Sequence[Any]) -> int | None:
    """The mesh axis along which a tensor is owned, if any."""
    for axis, placement in enumerate(placements):
        if isinstance(placement, Owned):
            return axis
    return None


def is_owned(x: Any) -> bool:
    """Whether a value is a DTensor that is owned along an axis."""
    return isinstance(x, DTensor) and owned_axis(x.placements) is not None


def with_placement(spec: DTensorSpec, axis: int, placement: Any) -> DTensorSpec:
    """A spec with another placement along one axis."""
    placements = list(spec.placements)
    placements[axis] = placement
    return DTensorSpec(spec.mesh, tuple(placements), tensor_meta=spec.tensor_meta)


def over_all_coordinates(x: DTensor) -> DTensor:
    """A tensor that each coordinate of the axis has, laid out as before along the others."""
    axis = owned_axis(x.placements)
    if axis is None:
        return x
    return x.redistribute(placements=with_placement(x._spec, axis, Replicate()).placements)


def _steps(before: Any, source: DTensorSpec, target: DTensorSpec, *rest: Any) -> Any:
    """The steps of a conversion.

    Owners give what they hold before torch converts along the other axes, and take what they will
    hold after that: torch plans for tensors that are replicated along the owned axis.
    """
    axis = owned_axis(source.placements)
    axis = owned_axis(target.placements) if axis is None else axis
    if axis is None:
        return before(source, target, *rest)
    given, taken = source.placements[axis], target.placements[axis]
    if given == taken:  # only ranks of one coordinate exchange, where all have rows, or none
        return before(_on_coordinate(source, axis), _on_coordinate(target, axis), *rest)
    first, last = [], []
    if isinstance(given, Owned):
        source = with_placement(source, axis, Replicate())
        first = [_redistribute._TransformInfo(axis, (given, Replicate()), _local_shape(source))]
    if isinstance(taken, Owned):
        target = with_placement(target, axis, Replicate())
        last = [_redistribute._TransformInfo(axis, (Replicate(), taken), _local_shape(target))]
    return [*first, *before(source, target, *rest), *last]


def _on_coordinate(spec: DTensorSpec, axis: int) -> DTensorSpec:
    """An owned tensor as the ranks of this coordinate have it."""
    owned, meta = spec.placements[axis], spec.tensor_meta
    spec = with_placement(spec, axis, Replicate())
    if meta is not None and spec.mesh.get_local_rank(axis) != owned.owner:  # type: ignore[attr-defined]
        shape = list(meta.shape)
        shape[owned.dim] = 0  # type: ignore[attr-defined]
        spec.tensor_meta = meta._replace(shape=torch.Size(shape))
    return spec


def _local_shape(spec: DTensorSpec) -> list[int]:
    shape, _ = compute_local_shape_and_global_offset(
        spec.shape, spec.mesh, spec.placements, skip_offset=True
    )
    return list(shape)


def _verify_order(before: Any, self: DTensorSpec, order: Any) -> None:
    if owned_axis(self.placements) is None:  # torch compares each placement to a `Shard`
        before(self, order)


def _from_local(before: Any, *args: Any, **kwargs: Any) -> DTensor:
    placements = kwargs.get("placements", args[2] if len(args) > 2 else None)
    shape = kwargs.get("shape", args[4] if len(args) > 4 else None)
    if placements is not None and owned_axis(placements) is not None and shape is None:
        raise EngineError(
            "DTensor.from_local takes the size of a tensor from one shard, and of a tensor with "
            f"placements ({', '.join(map(str, placements))}) one stage has all rows and the others "
            "none; pass shape= and stride= of the whole tensor"
        )
    made: DTensor = before(*args, **kwargs)
    return made


@functools.cache
def install() -> None:
    """Let torch convert owned tensors rightly. Nothing changes for other ones."""
    for holder, name, rule in (
        (_redistribute, "_gen_transform_infos_non_cached", _steps),
        (DTensorSpec, "_verify_shard_order", _verify_order),
    ):
        setattr(holder, name, around(getattr(holder, name), rule))
    DTensor.from_local = staticmethod(  # type: ignore[method-assign]
        around(DTensor.from_local, _from_local)
    )


def around(before: Any, rule: Any) -> Any:
    """A function in the place of another one, which it takes first."""

    @functools.wraps(before)
    def together(*args: Any, **kwargs: Any) -> Any:
        return rule(before, *args, **kwargs)

    return together
