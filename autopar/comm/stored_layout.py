"""`StoredLayout`: which part of a parameter, gradient or entry of state each rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from autopar.cluster.cluster import PIPE
from autopar.comm import owned_operators
from autopar.comm.owned_shards import Owned, owned_axis
from autopar.ir.spec import ShardingSpec, local_range


def pipe_axis(mesh: DeviceMesh) -> int | None:
    """The axis of pipeline stages, if the mesh has one."""
    names = mesh.mesh_dim_names or ()
    return names.index(PIPE) if PIPE in names else None


@dataclass(frozen=True)
class StoredLayout:
    """How a tensor is stored.

    Args:
        spec: over the axes of the mesh other than the pipe axis.
        stage: the coordinate on the pipe axis whose ranks hold the tensor; others hold 0 rows of
            it. None: ranks of all coordinates hold it alike, or the mesh has no such axis.

    Raises:
        ValueError: a scalar is given to one stage; it has no rows that others could have 0 of.
    """

    spec: ShardingSpec
    stage: int | None = None

    def __post_init__(self) -> None:
        if self.stage is not None and not self.spec.ndim:
            raise ValueError(
                f"a scalar is stored on all pipeline stages, not on stage {self.stage} alone; give "
                "it stage=None"
            )

    @staticmethod
    def parse(text: str) -> StoredLayout:
        """Inverse of `str`: `S1R`, or `S1R@2` on stage 2."""
        spec, _, stage = text.partition("@")
        return StoredLayout(ShardingSpec.parse(spec), int(stage) if stage else None)

    def __str__(self) -> str:
        return str(self.spec) if self.stage is None else f"{self.spec}@{self.stage}"

    @staticmethod
    def of(x: DTensor) -> StoredLayout:
        """That of a parameter, gradient or entry of state."""
        placements: list[Any] = list(x.placements)
        axis = owned_axis(placements)
        if axis is None:
            return StoredLayout(ShardingSpec.from_placements(placements, x.ndim))
        owned, placements[axis] = placements[axis], Replicate()
        assert owned.dim == 0, "a stage owns rows"
        return StoredLayout(ShardingSpec.from_placements(placements, x.ndim), owned.owner)

    @staticmethod
    def of_spec(layout: StoredLayout | ShardingSpec) -> StoredLayout:
        """The layout that is meant: a spec alone is that of all stages."""
        return layout if isinstance(layout, StoredLayout) else StoredLayout(layout)

    @property
    def splits(self) -> bool:
        """Whether some rank holds a part alone."""
        return self.stage is not None or any(self.spec.dims)

    def placements(self, mesh: DeviceMesh) -> list[Any]:
        """DTensor placements, one per axis of a mesh.

        Raises:
            ValueError: the mesh has no such stage, or the spec splits by the pipe axis.
        """
        placements = self.spec.to_placements(mesh.ndim)
        axis = self._axis(mesh)
        if axis is not None:
            owned_operators.install()
            assert self.stage is not None
            placements[axis] = Owned(0, self.stage)
        return placements

    def slices(
        self, shape: Sequence[int], mesh: DeviceMesh, coords: Sequence[int]
    ) -> tuple[slice, ...]:
        """Where in the whole tensor the shard at some mesh coordinates lies."""
        axis, sizes = self._axis(mesh), tuple(mesh.shape)
        parts = []
        for dim, (size, axes) in enumerate(zip(shape, self.spec.dims, strict=True)):
            start, length = local_range(size, axes, sizes, coords) if axes else (0, size)
            if dim == 0 and axis is not None and coords[axis] != self.stage:
                start, length = 0, 0
            parts.append(slice(start, start + length))
        return tuple(parts)

    def shard_of(self, x: torch.Tensor, mesh: DeviceMesh, coords: Sequence[int]) -> torch.Tensor:
        """The shard at some mesh coordinates of a whole tensor; a view."""
        for dim, part in enumerate(self.slices(x.shape, mesh, coords)):
            if part != slice(0, x.shape[dim]):
                x = x.narrow(dim, part.start, part.stop - part.start)
        return x

    def _axis(self, mesh: DeviceMesh) -> int | None:
        """The axis along which one stage holds the tensor."""
        axis = pipe_axis(mesh)
        if self.stage is None:
            return None
        if axis is None or not 0 <= self.stage < mesh.size(axis):
            names = ", ".join(f"{n}={s}" for n, s in zip(_names(mesh), mesh.shape, strict=True))
            raise ValueError(
                f"a tensor is to be stored on pipeline stage {self.stage}, and the mesh "
                f"({names}) has {0 if axis is None else mesh.size(axis)} stages; name an axis of "
                f"enough ranks {PIPE!r}, or store it on all ranks (stage=None)"
            )
        if any(axis in axes for axes in self.spec.dims):
            raise ValueError(
                f"layout {self} splits a tensor by axis {axis}, which is the pipe axis: a stage "
                "holds it whole along that axis"
            )
        return axis


def _names(mesh: DeviceMesh) -> tuple[str, ...]:
    return mesh.mesh_dim_names or tuple(f"axis{i}" for i in range(mesh.ndim))
