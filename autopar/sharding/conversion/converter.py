"""Layout conversion: the cheapest path of one-step collectives from one spec to another.

All specs of a tensor form a graph. Its edges are one-step transforms with a cost, forward and
backward together, on the cluster's links. Paths are exact minima. They are computed per target on
first use (`autopar/sharding/conversion/search.py`) and memoized.

    step             transform      forward         backward (the transpose)
    all_gather       S(d) -> R      all-gather      local slice
    all_gather_vary  S(d) -> V      all-gather      reduce-scatter
    slice            R -> S(d)      local slice     all-gather
    vary             R -> V         identity        all-reduce
    all_reduce       P -> R         all-reduce      identity
    reduce_scatter   P -> S(d)      reduce-scatter  all-gather
    all_to_all       S(i) -> S(j)   all-to-all      all-to-all
    inject           R -> P         first rank keeps the value, others hold zero; backward identity

No step leaves V. These steps also change the order of axes inside a dim (S01 to S10). A direct
permutation of shards would cross two axes at once, and a communicator spans one axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from math import prod

import numpy as np

from autopar.cluster.cluster import ClusterInfo
from autopar.comm.cost import BUCKET_MEMBER_BYTES
from autopar.ir.spec import ShardingSpec, fills_every_rank
from autopar.sharding.conversion.graph import KINDS, spec_graph
from autopar.sharding.conversion.search import LegalSteps, Search

_FORWARD = {
    "all_gather": "all_gather",
    "all_gather_vary": "all_gather",
    "all_reduce": "all_reduce",
    "reduce_scatter": "reduce_scatter",
    "all_to_all": "all_to_all",
}
_BACKWARD = {
    "all_gather_vary": "reduce_scatter",
    "slice": "all_gather",
    "vary": "all_reduce",
    "reduce_scatter": "all_gather",
    "all_to_all": "all_to_all",
}
Orders = tuple[frozenset[tuple[int, ...]], ...]


@dataclass(frozen=True)
class Step:
    """One transform: `kind` on mesh axis `axis`, which splits or gathers tensor dim `dim`."""

    kind: str
    axis: int
    source: ShardingSpec
    target: ShardingSpec
    dim: int = -1
    to_dim: int = -1

    def __str__(self) -> str:
        return f"{self.kind}@{self.axis}: {self.source} -> {self.target}"


class LayoutConverter:
    """Costs and paths of layout conversions on one cluster, memoized.

    A path is the exact minimum over all sequences of one-step transforms.

    Args:
        message_bytes: size of a message that small weights share.
        whole_sizes: dims of these sizes are not split.
        groups: of mesh axes, which paths move one after another.
    """

    def __init__(
        self,
        cluster: ClusterInfo,
        message_bytes: float = BUCKET_MEMBER_BYTES,
        whole_sizes: frozenset[int] = frozenset(),
        groups: tuple[tuple[int, ...], ...] = (),
    ) -> None:
        self.cluster, self.message_bytes = cluster, message_bytes
        self._groups = tuple(group for group in groups if len(group) > 1)
        self._whole_sizes = whole_sizes
        self.mesh = cluster.mesh
        self.axes = tuple(axis for axis, size in enumerate(self.mesh) if size > 1)
        self._legal = lru_cache(maxsize=None)(self._legal_orders)
        self._steps = lru_cache(maxsize=None)(self._legal_steps)
        self._search = lru_cache(maxsize=None)(self._priced)
        self._prices = lru_cache(maxsize=None)(self._price_table)

    # -- public ---------------------------------------------------------------------------------

    def costs_us(
        self,
        shape: Sequence[int],
        itemsize: int,
        sources: Sequence[ShardingSpec],
        targets: Sequence[ShardingSpec],
        *,
        grad: bool = True,
        weight: bool = False,
        grad_itemsize: int | None = None,
    ) -> np.ndarray:
        """Microseconds of the cheapest conversions [source, target]; infinite where there is none.

        Args:
            grad: add the backward's.
            grad_itemsize: bytes per element of the gradient; those of the value if None.
            weight: whether it is a weight, which may share messages with other weights.

        Raises:
            ValueError: a spec is illegal for the shape.
        """
        search = self._search_of(shape, itemsize, grad, weight, grad_itemsize)
        starts, ends = (
            [self._index(search.steps, shape, spec) for spec in specs]
            for specs in (sources, targets)
        )
        return np.stack(search.distances(ends), axis=1)[starts]

    def path(
        self,
        shape: Sequence[int],
        itemsize: int,
        source: ShardingSpec,
        target: ShardingSpec,
        *,
        grad: bool = True,
        grad_itemsize: int | None = None,
    ) -> tuple[Step, ...]:
        """The cheapest sequence of steps.

        Raises:
            ValueError: no path exists (a varying or illegal spec).
        """
        search = self._search_of(shape, itemsize, grad, grad_itemsize=grad_itemsize)
        steps = search.steps
        start, end = (self._index(steps, shape, spec) for spec in (source, target))
        if not np.isfinite(search.distances((end,))[0][start]):
            raise ValueError(f"no sequence of collectives converts {source} to {target}")
        return tuple(_read(steps, i) for i in search.path(start, end))

    def specs(self, shape: Sequence[int]) -> list[ShardingSpec]:
        """All specs under which every rank holds an element."""
        steps = self._steps(self._legal(tuple(shape)))
        return [steps.graph.spec(int(i)) for i in np.flatnonzero(steps.legal)]

    def steps_from(self, shape: Sequence[int], spec: ShardingSpec) -> list[Step]:
        """Every one-step transform out of a spec."""
        steps = self._steps(self._legal(tuple(shape)))
        here = self._index(steps, shape, spec)
        return [_read(steps, i) for i in range(*steps.first[here : here + 2])]

    def step_us(self, shape: Sequence[int], itemsize: int, step: Step) -> tuple[float, float]:
        """Forward and backward microseconds of one step."""
        size = itemsize * prod(shape)
        parts = min(step.source.parts(self.mesh), step.target.parts(self.mesh))
        if step.kind == "all_to_all":
            parts //= self.mesh[step.axis]
        forward, backward = self._step_cost(step.kind, step.axis, size / parts)
        return float(forward), float(backward)

    # -- search ---------------------------------------------------------------------------------

    def _search_of(
        self,
        shape: Sequence[int],
        itemsize: int,
        grad: bool,
        weight: bool = False,
        grad_itemsize: int | None = None,
    ) -> Search:
        size = itemsize * prod(shape)
        grad_size = (grad_itemsize or itemsize) * prod(shape) if grad else None
        return self._search(self._legal(tuple(shape)), size, grad_size, weight)

    def _index(self, steps: LegalSteps, shape: Sequence[int], spec: ShardingSpec) -> int:
        index = steps.graph.index(spec)
        if index < 0 or not steps.legal[index]:
            raise ValueError(
                f"{spec} is not a layout of a tensor of shape {tuple(shape)} on mesh {self.mesh}: "
                "some rank would hold no element, or an axis does not exist"
            )
        return index

    def _legal_orders(self, shape: tuple[int, ...]) -> Orders:
        """Per dim, the orders of axes that may split it."""
        orders = [o for n in range(len(self.axes) + 1) for o in permutations(self.axes, n)]
        per_size = {
            size: frozenset(
                order
                for order in orders
                if fills_every_rank(size, order, self.mesh)
                and not (order and size in self._whole_sizes)
            )
            for size in set(shape)
        }
        return tuple(per_size[size] for size in shape)

    def _legal_steps(self, orders: Orders) -> LegalSteps:
        graph = spec_graph(len(orders), self.axes, self._groups)
        legal = np.ones(len(graph), dtype=bool)
        for allowed, chosen in zip(orders, graph.order, strict=True):
            legal &= np.array([o in allowed for o in graph.axis_orders])[chosen]
        return LegalSteps(graph, legal)

    def _priced(self, orders: Orders, size: int, grad_size: int | None, weight: bool) -> Search:
        """A search with the prices of a value of `size` global bytes, and of its gradient."""
        steps = self._steps(orders)
        price = self._prices(size, weight)[0]
        if grad_size is not None:
            price = price + self._prices(grad_size, weight)[1]
        edges = steps.edges
        return Search(steps, price[edges.kind, edges.axis, edges.outer])

    # -- prices ---------------------------------------------------------------------------------

    def _price_table(self, size: int, weight: bool) -> np.ndarray:
        """[forward or backward, kind, axis, mask of other axes that split] in us, of a value of
        `size` global bytes."""
        count = len(self.axes)
        masks = np.arange(1 << count)
        parts = np.ones(1 << count)
        for a, axis in enumerate(self.axes):
            parts *= np.where(masks >> a & 1, self.mesh[axis], 1)
        table = np.empty((2, len(KINDS), count, 1 << count))
        for a, axis in enumerate(self.axes):
            for number, kind in enumerate(KINDS):
                forward, backward = self._step_cost(kind, axis, size / parts, weight)
                table[0, number, a], table[1, number, a] = forward, backward
        return table

    def _step_cost(
        self, kind: str, axis: int, nbytes: np.ndarray | float, weight: bool = False
    ) -> tuple[np.ndarray | float, np.ndarray | float]:
        """Microseconds forward and backward.

        Local copies run at memory speed.

        Args:
            nbytes: of the value on a rank, as the other axes split it; in an all-to-all, the axis
                splits it too.
        """
        link, size = self.cluster.links[axis], self.mesh[axis]
        device, software = self.cluster.device, self.cluster.software
        skew_us = 0.0 if software is None else software.skew_us
        buffer = np.divide(nbytes, size if kind == "all_to_all" else 1)

        def collective(name: str | None) -> np.ndarray | float:
            if name is None:
                return 0.0
            if weight:
                return device.launch_us + link.bucketed_us(name, size, buffer, self.message_bytes)
            return device.launch_us + skew_us + link.collective_us(name, size, buffer)

        def copied(share: float) -> np.ndarray | float:
            return device.launch_us + 2e6 * share * buffer / device.bandwidth

        forward, backward = collective(_FORWARD.get(kind)), collective(_BACKWARD.get(kind))
        if kind == "inject":
            forward = copied(1.0)
        if kind == "slice":
            forward = copied(1 / size)
        if kind == "all_gather":
            backward = copied(1 / size)
        return forward, backward


def _read(steps: LegalSteps, i: int) -> Step:
    """Edge number `i` as a step between specs."""
    graph, edges = steps.graph, steps.edges
    return Step(
        KINDS[edges.kind[i]],
        graph.axes[edges.axis[i]],
        graph.spec(int(edges.source[i])),
        graph.spec(int(edges.target[i])),
        int(edges.dim[i]),
        int(edges.to_dim[i]),
    )


def converter_for(
    cluster: ClusterInfo,
    small_bytes: float = BUCKET_MEMBER_BYTES,
    whole_sizes: frozenset[int] = frozenset(),
    groups: tuple[tuple[int, ...], ...] = (),
) -> LayoutConverter:
    """The converter of a cluster; equal clusters share one.

    Args:
        small_bytes: total size of the weights that share messages; no message is larger.
        whole_sizes: dims of these sizes are not split.
        groups: as of `LayoutConverter`.
    """
    message = min(float(BUCKET_MEMBER_BYTES), small_bytes) or float(BUCKET_MEMBER_BYTES)
    key = f"{message} {sorted(whole_sizes)} {groups} {cluster.to_dict()!r}"
    if key not in _CONVERTERS:
        _CONVERTERS[key] = LayoutConverter(cluster, message, whole_sizes, groups)
    return _CONVERTERS[key]


_CONVERTERS: dict[str, LayoutConverter] = {}
