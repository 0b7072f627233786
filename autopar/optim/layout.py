"""`Layout`: which part of a value of an optimizer's step each rank holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from typing import Any

from autopar.comm.owned_shards import owned_axis
from autopar.ir.spec import ShardingSpec, local_range

Coords = tuple[int, ...]
# Per dim the start and the length of a part.
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Layout:
    """How a value is spread over a mesh.

    Args:
        spec: over the mesh axes; those of `owner` split nothing.
        owner: pairs of a mesh axis and the one coordinate on it whose ranks hold the value.
    """

    spec: ShardingSpec
    owner: tuple[tuple[int, int], ...] = ()

    @cached_property
    def _hash(self) -> int:
        return hash((self.spec, self.owner))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return str(self.spec) + "".join(f"@{axis}={at}" for axis, at in self.owner)

    @staticmethod
    def replicated(ndim: int) -> Layout:
        return Layout(ShardingSpec.replicated(ndim))

    @staticmethod
    def of_placements(placements: Sequence[Any], ndim: int) -> Layout:
        """That of a DTensor; `Owned` placements become owners."""
        axis = owned_axis(placements)
        spec = ShardingSpec.from_placements(
            [p for a, p in enumerate(placements) if a != axis], ndim
        )
        if axis is None:
            return Layout(spec)
        # the other axes, by their numbers on the mesh
        moved = tuple(tuple(a + (a >= axis) for a in axes) for axes in spec.dims)
        partial = tuple(a + (a >= axis) for a in spec.partial)
        return Layout(ShardingSpec(moved, partial), ((axis, placements[axis].owner),))

    @property
    def is_replicated(self) -> bool:
        return not self.owner and self.spec.is_replicated

    @property
    def is_partial(self) -> bool:
        return bool(self.spec.partial)

    def with_spec(self, spec: ShardingSpec) -> Layout:
        return Layout(spec, self.owner)

    def holds(self, coords: Sequence[int]) -> bool:
        """Whether ranks at these coordinates hold a part."""
        return all(coords[axis] == at for axis, at in self.owner)

    def box(self, shape: Sequence[int], mesh: Sequence[int], coords: Sequence[int]) -> Box | None:
        """The part at some coordinates; None if they hold none."""
        if not self.holds(coords):
            return None
        return tuple(
            local_range(size, axes, mesh, coords)
            for size, axes in zip(shape, self.spec.dims, strict=True)
        )

    def counted_at(self, mesh: Sequence[int], coords: Sequence[int]) -> bool:
        """Whether the part at these coordinates counts if the parts of all ranks are added up: of
        ranks that hold the same part, the first one's does."""
        apart = {axis for axes in self.spec.dims for axis in axes} | set(self.spec.partial)
        apart |= {axis for axis, _ in self.owner}
        alike = (at for axis, at in enumerate(coords) if axis not in apart)
        return self.holds(coords) and not any(alike)


@cache
def coordinates(mesh: tuple[int, ...]) -> tuple[Coords, ...]:
    """The coordinates of all ranks, in the order of ranks."""
    return tuple(product(*(range(size) for size in mesh)))


def common(a: Box | None, b: Box | None) -> Box | None:
    """What two parts have in common; None if nothing."""
    if a is None or b is None:
        return None
    both = []
    for (start, length), (other, extent) in zip(a, b, strict=True):
        first = max(start, other)
        last = min(start + length, other + extent)
        if last <= first:
            return None
        both.append((first, last - first))
    return tuple(both)


def numel(box: Box | None) -> int:
    """Elements of a part."""
    return 0 if box is None else math.prod(length for _, length in box)


@cache
def conversion_cost(
    source: Layout, target: Layout, shape: tuple[int, ...], mesh: tuple[int, ...]
) -> tuple[int, bool]:
    """The most elements that a rank receives in a conversion, and whether any rank does."""
    if source == target:
        return 0, False
    if source.is_partial:
        return 2 * math.prod(shape), True
    most = 0
    for coords in coordinates(mesh):
        wanted, held = target.box(shape, mesh, coords), source.box(shape, mesh, coords)
        most = max(most, numel(wanted) - numel(common(wanted, held)))
    return most, most > 0


def aligned(layout: Layout, shape: Sequence[int], operand: Sequence[int]) -> Layout:
    """The layout of an operand that is broadcast to a shape in a layout."""
    lead = len(shape) - len(operand)
    dims = tuple(
        layout.spec.dims[lead + d] if lead + d >= 0 and n == shape[lead + d] else ()
        for d, n in enumerate(operand)
    )
    return Layout(ShardingSpec(dims), layout.owner)


def stretched(layout: Layout, operand: Sequence[int], shape: Sequence[int]) -> Layout | None:
    """The layout of a result whose operand, broadcast to its shape, is in a layout."""
    lead = len(shape) - len(operand)
    if lead < 0:
        return None
    dims = ((),) * lead + tuple(
        axes if n == shape[lead + d] else ()
        for d, (n, axes) in enumerate(zip(operand, layout.spec.dims, strict=True))
    )
    return Layout(ShardingSpec(dims), layout.owner)


def reduced_over(layout: Layout, dims_gone: set[int], keep: bool, ndim: int) -> Layout:
    """The layout of a reduction, without the sums that are due."""
    dims = tuple(
        () if d in dims_gone else layout.spec.dims[d]
        for d in range(ndim)
        if keep or d not in dims_gone
    )
    return Layout(ShardingSpec(dims), layout.owner)
