"""`ShardingSpec`: where the shards of a tensor live on the device mesh.

Along each mesh *axis* a tensor is in one of four states (JAX's `shard_map` calls the first three
invariant, varying-by-shard and unreduced; the pair P/V is Megatron's g/f):

    R     the same value on every rank; so is its gradient
    S(d)  tensor dim d is split; the gradient is split in the same way
    P     every rank holds a term, the value is their sum; the gradient is the same on every rank
    V     the same value on every rank, but each rank's gradient is a term of the sum

P and V are transposes of each other, R and S of themselves. So the state of a value determines the
state of its gradient.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

_TOKEN = re.compile(r"R|S(\d+)|P(\d+)\(sum\)|V(\d+)")


@dataclass(frozen=True)
class ShardingSpec:
    """Layout of one tensor.

    Args:
        dims: per tensor dim, the mesh axes that split it, outermost first.
        partial: mesh axes over which the value is a pending sum.
        varying: mesh axes over which the value is replicated and its *gradient* is a pending sum.

    Raises:
        ValueError: a mesh axis is used twice.
    """

    dims: tuple[tuple[int, ...], ...]
    partial: tuple[int, ...] = ()
    varying: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        used = [axis for axes in self.dims for axis in axes] + [*self.partial, *self.varying]
        if len(set(used)) != len(used):
            raise ValueError(
                f"mesh axis used twice in sharding spec {self}: axes {sorted(used)}; "
                "an axis may split one dim, or be partial, or be varying"
            )

    @cached_property
    def _hash(self) -> int:
        return hash((self.dims, self.partial, self.varying))

    def __hash__(self) -> int:  # specs key every table of the planner
        return self._hash

    @staticmethod
    def replicated(ndim: int) -> ShardingSpec:
        return ShardingSpec(((),) * ndim)

    @staticmethod
    def parse(text: str) -> ShardingSpec:
        """Inverse of `str`: `ShardingSpec.parse("S01RP2(sum)")`."""
        dims: list[tuple[int, ...]] = []
        partial: list[int] = []
        varying: list[int] = []
        position = 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise ValueError(
                    f"cannot read sharding spec {text!r} at {text[position:]!r}; "
                    "expected R, S<axes>, P<axis>(sum) or V<axis>, as in 'S01RP2(sum)'"
                )
            split, reduced, vary = match.groups()
            if reduced is not None:
                partial.append(int(reduced))
            elif vary is not None:
                varying.append(int(vary))
            else:
                dims.append(tuple(int(c) for c in split or ""))
            position = match.end()
        return ShardingSpec(tuple(dims), tuple(partial), tuple(varying))

    def __str__(self) -> str:
        dims = "".join("S" + "".join(map(str, axes)) if axes else "R" for axes in self.dims)
        partial = "".join(f"P{axis}(sum)" for axis in self.partial)
        return dims + partial + "".join(f"V{axis}" for axis in self.varying)

    @property
    def ndim(self) -> int:
        return len(self.dims)

    @property
    def is_replicated(self) -> bool:
        return not self.partial and not self.varying and not any(self.dims)

    def state(self, axis: int) -> str:
        """State along one mesh axis: `"R"`, `"P"`, `"V"` or the split tensor dim as `"S<d>"`."""
        if axis in self.partial:
            return "P"
        if axis in self.varying:
            return "V"
        for dim, axes in enumerate(self.dims):
            if axis in axes:
                return f"S{dim}"
        return "R"

    def data(self) -> ShardingSpec:
        """The layout of the value alone, without its gradient (V becomes R)."""
        return ShardingSpec(self.dims, self.partial) if self.varying else self

    def parts(self, mesh: Sequence[int]) -> int:
        """Number of distinct shards."""
        return math.prod(mesh[axis] for axes in self.dims for axis in axes)

    def to_placements(self, mesh_ndim: int) -> list[Any]:
        """DTensor placements, one per mesh axis.

        Raises:
            ValueError: a dim is split in an order that DTensor placements cannot express, or the
                spec is varying.
        """
        from torch.distributed.tensor import Partial, Replicate, Shard

        if self.varying:
            raise ValueError(f"{self} is varying: it describes a gradient flow, not a placement")
        placements: list[Any] = [Replicate() for _ in range(mesh_ndim)]
        for dim, axes in enumerate(self.dims):
            if list(axes) != sorted(axes):
                raise ValueError(
                    f"{self} splits dim {dim} out of axis order, which DTensor cannot express"
                )
            for axis in axes:
                placements[axis] = Shard(dim)
        for axis in self.partial:
            placements[axis] = Partial()
        return placements

    @staticmethod
    def from_placements(placements: Sequence[Any], ndim: int) -> ShardingSpec:
        """Inverse of `to_placements`, for a tensor of `ndim` dims."""
        dims: list[tuple[int, ...]] = [()] * ndim
        partial = []
        for axis, placement in enumerate(placements):
            if placement.is_shard():
                dim = placement.dim % ndim
                dims[dim] = (*dims[dim], axis)
            elif placement.is_partial():
                partial.append(axis)
        return ShardingSpec(tuple(dims), tuple(partial))


def chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """Start and length of part `index` of a dim, by `torch.chunk`'s rule (as DTensor shards).

    Every part holds ceil(size / parts) elements but the last ones, which may hold fewer or none.
    """
    step = -(-size // parts)
    start = min(step * index, size)
    return start, min(step, size - start)


def local_range(
    size: int, axes: Sequence[int], mesh: Sequence[int], coords: Sequence[int]
) -> tuple[int, int]:
    """Start and length of this rank's part of a dim that `axes` split, outermost first."""
    start = 0
    for axis in axes:
        offset, size = chunk(size, mesh[axis], coords[axis])
        start += offset
    return start, size


def local_shape(
    shape: Sequence[int], spec: ShardingSpec, mesh: Sequence[int], coords: Sequence[int]
) -> tuple[int, ...]:
    """Shape of the shard at mesh coordinates `coords`."""
    return tuple(
        local_range(size, axes, mesh, coords)[1]
        for size, axes in zip(shape, spec.dims, strict=True)
    )


def fills_every_rank(size: int, axes: Sequence[int], mesh: Sequence[int]) -> bool:
    """Whether every rank gets at least one element of a dim split over `axes`."""
    return not axes or _least_part(size, tuple(mesh[axis] for axis in axes)) > 0


@cache
def _least_part(size: int, parts: tuple[int, ...]) -> int:
    """Elements on the rank with the fewest; with two axes it need not be the last one."""
    if not parts:
        return size
    lengths = {chunk(size, parts[0], i)[1] for i in range(parts[0])}
    return min(_least_part(n, parts[1:]) for n in lengths)
