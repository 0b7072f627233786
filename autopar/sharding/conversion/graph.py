"""The graph of layouts and steps that a conversion searches, as integer arrays.

The specs of tensors with N dims over given mesh axes, and the steps between them, do not depend on
sizes, so a graph is built once. `LayoutConverter` prices its edges. The graph numbers the mesh axes
without those of one rank.

A spec is a row of digits: per dim the number of the *order* of axes that splits it, then the
partial and the varying axes as bit masks. Read as one number, its `key`, the rows are sorted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import groupby, permutations

import numpy as np

from autopar.ir.spec import ShardingSpec

KINDS = (
    "all_gather",
    "all_gather_vary",
    "all_to_all",
    "all_reduce",
    "reduce_scatter",
    "slice",
    "vary",
    "inject",
)


@dataclass(frozen=True)
class Edges:
    """Steps as parallel arrays, sorted by source and then in the order of definition.

    Args:
        source, target: numbers of specs.
        kind: into `KINDS`.
        axis: of the graph.
        dim, to_dim: which the step works on; -1 where there is none.
        outer: mask of the *other* axes that split the value: they divide the bytes.
    """

    source: np.ndarray
    target: np.ndarray
    kind: np.ndarray
    axis: np.ndarray
    dim: np.ndarray
    to_dim: np.ndarray
    outer: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def where(self, chosen: np.ndarray) -> Edges:
        """The steps at a mask or at positions."""
        return Edges(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


@cache
def spec_graph(
    ndim: int, axes: tuple[int, ...], groups: tuple[tuple[int, ...], ...] = ()
) -> SpecGraph:
    """The graph, built on first use."""
    return SpecGraph(ndim, axes, groups)


class SpecGraph:
    """All specs of tensors with `ndim` dims over the mesh axes `axes`, and all steps.

    Args:
        groups: of axes, of which steps move one after another: in at most one of them, the axes are
            in different states.
    """

    def __init__(
        self, ndim: int, axes: tuple[int, ...], groups: tuple[tuple[int, ...], ...] = ()
    ) -> None:
        self.ndim, self.axes = ndim, axes
        self._groups = [[axes.index(axis) for axis in group] for group in groups]
        count = len(axes)
        self.orders = [o for n in range(count + 1) for o in permutations(range(count), n)]
        self.axis_orders = [tuple(axes[a] for a in order) for order in self.orders]
        # what one more digit adds to the key
        self._varying, self._partial = 1, 1 << count
        self._dim = [len(self.orders) ** d << 2 * count for d in reversed(range(ndim))]
        if len(self.orders) ** ndim << 2 * count >= 1 << 63:
            raise ValueError(f"a tensor of {ndim} dims on {count} mesh axes has too many layouts")
        self._enumerate()
        self.edges = self._connect()
        self.index, self.spec = cache(self._index_of), cache(self._spec_of)

    # -- specs ----------------------------------------------------------------------------------

    def _enumerate(self) -> None:
        """Digit by digit, every choice that uses no axis twice."""
        every = (1 << len(self.axes)) - 1
        splits, subsets = [sum(1 << a for a in o) for o in self.orders], range(every + 1)
        used, digits = np.zeros(1, np.int64), np.zeros((0, 1), np.int64)
        for choices in (*[splits] * self.ndim, subsets, subsets):
            masks = np.array(choices, np.int64)
            row, choice = np.nonzero((used[:, None] & masks) == 0)
            used = used[row] | masks[choice]
            digits = np.concatenate([digits[:, row], choice[None, :]])
        kept = self._mixed(digits, np.array(splits)) <= 1
        grouped = np.array([self._is_grouped(order) for order in self.orders])
        kept &= grouped[digits[:-2]].all(axis=0)
        used, digits = used[kept], digits[:, kept]
        self.order, self.partial, self.varying = digits[:-2], digits[-2], digits[-1]
        self.free = every & ~used
        self.split = used & ~(self.partial | self.varying)
        self._key = np.array([*self._dim, self._partial, self._varying], np.int64) @ digits

    def _is_grouped(self, order: tuple[int, ...]) -> bool:
        """Whether the axes of each group follow one another, in ascending order."""
        of = {a: g for g, group in enumerate(self._groups) for a in group}
        runs = [[*run] for g, run in groupby(order, key=lambda a: of.get(a, -1)) if g >= 0]
        return len({of[run[0]] for run in runs}) == len(runs) and all(r == sorted(r) for r in runs)

    def _mixed(self, digits: np.ndarray, splits: np.ndarray) -> np.ndarray:
        """Per row, in how many groups the axes are in different states."""
        states = [*splits[digits[:-2]], digits[-2], digits[-1]]  # masks of the axes in each
        count = np.zeros(digits.shape[1], np.int64)
        for group in self._groups:
            mask = sum(1 << a for a in group)
            parts = [state & mask for state in states]
            count += np.any([(part != 0) & (part != mask) for part in parts], axis=0)
        return count

    def __len__(self) -> int:
        return len(self._key)

    def _index_of(self, spec: ShardingSpec) -> int:
        """The number of a spec; -1 if the graph does not have it."""
        here = {axis: a for a, axis in enumerate(self.axes)}
        named = {axis for axes in (*spec.dims, spec.partial, spec.varying) for axis in axes}
        if spec.ndim != self.ndim or not named <= here.keys():
            return -1
        key = self._partial * sum(1 << here[axis] for axis in spec.partial)
        key += self._varying * sum(1 << here[axis] for axis in spec.varying)
        for place, axes in zip(self._dim, spec.dims, strict=True):
            key += place * self.axis_orders.index(axes)
        index = int(np.searchsorted(self._key, key))
        return index if index < len(self) and self._key[index] == key else -1

    def _spec_of(self, index: int) -> ShardingSpec:
        """Inverse of `_index_of`."""
        dims = tuple(self.axis_orders[o] for o in self.order[:, index])
        partial, varying = (
            tuple(axis for a, axis in enumerate(self.axes) if mask[index] >> a & 1)
            for mask in (self.partial, self.varying)
        )
        return ShardingSpec(dims, partial, varying)

    # -- steps ----------------------------------------------------------------------------------

    def _connect(self) -> Edges:
        """Every step out of every spec. Only the innermost axis of a dim can be undone."""
        orders, axes = self.orders, range(len(self.axes))
        number = {order: n for n, order in enumerate(orders)}
        innermost = np.array([o[-1] if o else -1 for o in orders])
        outer = np.array([number[o[:-1]] for o in orders])
        inner = np.array([[number.get((*o, a), -1) for a in axes] for o in orders], np.int64)
        rows_of: list[np.ndarray] = []
        keys: list[np.ndarray] = []
        axes_of: list[np.ndarray] = []
        labels: list[tuple[int, int, int]] = []

        def add(
            kind: str, rows: np.ndarray, axis: np.ndarray, gain: np.ndarray,
            dim: int = -1, to_dim: int = -1,
        ) -> None:  # fmt: skip
            rows_of.append(rows)
            keys.append(self._key[rows] + gain)
            axes_of.append(axis)
            labels.append((KINDS.index(kind), dim, to_dim))

        def split(rows: np.ndarray, axis: np.ndarray, dim: int) -> np.ndarray:
            """What the key gains when the axis splits the dim, inside of all that do already."""
            before = self.order[dim, rows]
            return (inner[before, axis] - before) * self._dim[dim]

        for dim in range(self.ndim):
            rows = np.flatnonzero(self.order[dim])
            before = self.order[dim, rows]
            axis, undo = innermost[before], (outer[before] - before) * self._dim[dim]
            add("all_gather", rows, axis, undo, dim)
            add("all_gather_vary", rows, axis, undo + (self._varying << axis), dim)
            for to in range(self.ndim):
                if to != dim:
                    add("all_to_all", rows, axis, undo + split(rows, axis, to), dim, to)
        for a in axes:
            rows = np.flatnonzero(self.partial >> a & 1)
            axis, bit = np.full(len(rows), a), np.full(len(rows), 1 << a)
            add("all_reduce", rows, axis, -self._partial * bit)
            for dim in range(self.ndim):
                add("reduce_scatter", rows, axis, split(rows, axis, dim) - self._partial * bit, dim)
        for a in axes:
            rows = np.flatnonzero(self.free >> a & 1)
            axis, bit = np.full(len(rows), a), np.full(len(rows), 1 << a)
            for dim in range(self.ndim):
                add("slice", rows, axis, split(rows, axis, dim), dim)
            add("vary", rows, axis, self._varying * bit)
            add("inject", rows, axis, self._partial * bit)

        if not axes:
            return Edges(*np.zeros((7, 0), np.int64))
        source, axis = np.concatenate(rows_of), np.concatenate(axes_of)
        reached = np.concatenate(keys)
        target = np.minimum(np.searchsorted(self._key, reached), len(self) - 1)
        kind, dims, to_dims = np.repeat(np.array(labels), [len(r) for r in rows_of], axis=0).T
        others = self.split[source] & ~(1 << axis)
        edges = Edges(source, target, kind, axis, dims, to_dims, others)
        order = np.argsort(source, kind="stable")
        return edges.where(order[self._key[target][order] == reached[order]])
