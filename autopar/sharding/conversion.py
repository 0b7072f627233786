"""Layout conversion: the cheapest path of one-step collectives from one spec to another.

All specs of a tensor form a graph whose edges are one-step transforms, each with a cost under the
cluster's alpha-beta model, forward and backward together. Shortest paths between all pairs are
computed once per (shape class, bytes) with Floyd-Warshall and kept.

    step            forward                 backward (the transpose)
    gather          S(d) -> R  all-gather   slice
    gather_vary     S(d) -> V  all-gather   reduce-scatter
    slice           R -> S(d)  local        all-gather
    vary            R -> V     identity     all-reduce
    all_reduce      P -> R     all-reduce   identity
    reduce_scatter  P -> S(d)  red.-scatter all-gather
    all_to_all      S(i)-> S(j) all-to-all  all-to-all
    inject          R -> P     first rank keeps, others zero; backward identity

A sum is never made pending only to be reduced again on the way: `inject` steps come last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product

import numpy as np

from autopar.profiler.cluster import ClusterInfo
from autopar.sharding.spec import ShardingSpec, fills_every_rank

# (collective, share of the *global* bytes it works on) in units of ring traffic: an all-reduce is
# a reduce-scatter and an all-gather.
_TRAFFIC = {"all_gather": 1.0, "reduce_scatter": 1.0, "all_reduce": 2.0, "all_to_all": 1.0}

_FORWARD = {
    "gather": "all_gather",
    "gather_vary": "all_gather",
    "all_reduce": "all_reduce",
    "reduce_scatter": "reduce_scatter",
    "all_to_all": "all_to_all",
}
_BACKWARD = {
    "gather_vary": "reduce_scatter",
    "slice": "all_gather",
    "vary": "all_reduce",
    "reduce_scatter": "all_gather",
    "all_to_all": "all_to_all",
}


@dataclass(frozen=True)
class Step:
    """One transform: `kind` on mesh axis `axis`, splitting or unsplitting tensor dim `dim`."""

    kind: str
    axis: int
    source: ShardingSpec
    target: ShardingSpec
    dim: int = -1
    to_dim: int = -1

    def __str__(self) -> str:
        return f"{self.kind}@{self.axis}: {self.source} -> {self.target}"


def _replace(
    spec: ShardingSpec,
    axis: int,
    *,
    pop: int = -1,
    push: int = -1,
    partial: bool | None = None,
    varying: bool | None = None,
) -> ShardingSpec:
    dims = list(spec.dims)
    if pop >= 0:
        dims[pop] = dims[pop][:-1]
    if push >= 0:
        dims[push] = (*dims[push], axis)

    def toggled(axes: tuple[int, ...], add: bool | None) -> tuple[int, ...]:
        if add is None:
            return axes
        return tuple(sorted((*axes, axis))) if add else tuple(a for a in axes if a != axis)

    return ShardingSpec(tuple(dims), toggled(spec.partial, partial), toggled(spec.varying, varying))


def steps_from(spec: ShardingSpec, n_axes: int) -> list[Step]:
    """Every one-step transform out of `spec`. Only the innermost axis of a dim can be undone."""
    found = []

    def add(kind: str, axis: int, target: ShardingSpec, dim: int = -1, to_dim: int = -1) -> None:
        found.append(Step(kind, axis, spec, target, dim, to_dim))

    for dim, axes in enumerate(spec.dims):
        if not axes:
            continue
        axis = axes[-1]
        add("gather", axis, _replace(spec, axis, pop=dim), dim)
        add("gather_vary", axis, _replace(spec, axis, pop=dim, varying=True), dim)
        for to in range(spec.ndim):
            if to != dim:
                add("all_to_all", axis, _replace(spec, axis, pop=dim, push=to), dim, to)
    for axis in spec.partial:
        add("all_reduce", axis, _replace(spec, axis, partial=False))
        for dim in range(spec.ndim):
            add("reduce_scatter", axis, _replace(spec, axis, push=dim, partial=False), dim)
    for axis in range(n_axes):
        if spec.state(axis) == "R":
            for dim in range(spec.ndim):
                add("slice", axis, _replace(spec, axis, push=dim), dim)
            add("vary", axis, _replace(spec, axis, varying=True))
            add("inject", axis, _replace(spec, axis, partial=True))
    return found


@dataclass(frozen=True)
class _Graph:
    """All legal specs of a shape class and the steps among them; costs are alpha + bytes * beta."""

    specs: tuple[ShardingSpec, ...]
    index: dict[ShardingSpec, int]
    steps: tuple[Step, ...]
    source: np.ndarray
    target: np.ndarray
    inject: np.ndarray  # which steps are injections
    # forward and backward microseconds: constant part, and part per byte of the global tensor
    forward: np.ndarray  # [step, 2]
    backward: np.ndarray  # [step, 2]


def all_specs(
    legal: Sequence[frozenset[tuple[int, ...]]], mesh: Sequence[int]
) -> list[ShardingSpec]:
    """Every spec whose dims are split by a legal axis tuple; `legal[d]` holds those of dim d."""
    axes = [axis for axis, size in enumerate(mesh) if size > 1]
    found = []
    for states in product(["R", "P", "V", *range(len(legal))], repeat=len(axes)):
        by_dim: list[list[int]] = [[] for _ in legal]
        for axis, state in zip(axes, states, strict=True):
            if isinstance(state, int):
                by_dim[state].append(axis)
        partial = tuple(a for a, s in zip(axes, states, strict=True) if s == "P")
        varying = tuple(a for a, s in zip(axes, states, strict=True) if s == "V")
        orders = (
            [o for o in permutations(split) if o in ok]
            for split, ok in zip(by_dim, legal, strict=True)
        )
        found += [ShardingSpec(dims, partial, varying) for dims in product(*orders)]
    return found


class LayoutConverter:
    """Costs and paths of layout conversions on one cluster, memoized.

    The path found is the exact minimum over all sequences of one-step transforms.
    """

    def __init__(self, cluster: ClusterInfo) -> None:
        self.cluster = cluster
        self.mesh = cluster.mesh
        self._graph = lru_cache(maxsize=None)(self._build_graph)
        self._solve = lru_cache(maxsize=None)(self._all_pairs)
        self._legal = lru_cache(maxsize=None)(self._legal_splits)
        self._path = lru_cache(maxsize=None)(self._shortest_path)

    # -- public ---------------------------------------------------------------------------------

    def cost_us(
        self,
        shape: Sequence[int],
        itemsize: int,
        source: ShardingSpec,
        target: ShardingSpec,
        *,
        grad: bool = True,
    ) -> float:
        """Microseconds of the cheapest conversion, forward plus (with `grad`) backward."""
        table, index = self.table(shape, itemsize, grad=grad)
        return float(table[index[source], index[target]])

    def table(
        self, shape: Sequence[int], itemsize: int, *, grad: bool = True
    ) -> tuple[np.ndarray, dict[ShardingSpec, int]]:
        """Cost matrix in microseconds over all legal specs of a tensor, and the specs' indices."""
        legal = self._legal(tuple(shape))
        size = itemsize * int(np.prod(shape, dtype=np.int64))
        return self._solve(legal, size, grad), self._graph(legal).index

    def path(
        self,
        shape: Sequence[int],
        itemsize: int,
        source: ShardingSpec,
        target: ShardingSpec,
        *,
        grad: bool = True,
    ) -> tuple[Step, ...]:
        """The cheapest sequence of steps.

        Raises:
            ValueError: no path exists (a varying or illegal spec).
        """
        return self._path(tuple(shape), itemsize, source, target, grad)

    def _shortest_path(
        self,
        shape: tuple[int, ...],
        itemsize: int,
        source: ShardingSpec,
        target: ShardingSpec,
        grad: bool,
    ) -> tuple[Step, ...]:
        legal = self._legal(shape)
        graph = self._graph(legal)
        size = itemsize * int(np.prod(shape, dtype=np.int64))
        distance = self._solve(legal, size, grad)
        weight = self._weights(graph, size, grad)
        if source not in graph.index or target not in graph.index:
            raise ValueError(
                f"{source} -> {target} is not a conversion of a tensor of shape {shape} "
                f"on mesh {self.mesh}: some rank would hold no element, or an axis does not exist"
            )
        goal = graph.index[target]
        here = graph.index[source]
        if not np.isfinite(distance[here, goal]):
            raise ValueError(f"no sequence of collectives converts {source} to {target}")
        path = []
        while here != goal:
            final = graph.specs[here].dims == target.dims
            out = np.flatnonzero((graph.source == here) & (final | ~graph.inject))
            through = weight[out] + distance[graph.target[out], goal]
            best = out[int(np.argmin(through))]
            path.append(graph.steps[best])
            here = int(graph.target[best])
        return tuple(path)

    def step_us(self, shape: Sequence[int], itemsize: int, step: Step) -> tuple[float, float]:
        """Forward and backward microseconds of one step."""
        size = itemsize * int(np.prod(shape, dtype=np.int64))
        forward, backward = self._step_cost(step)
        return forward[0] + forward[1] * size, backward[0] + backward[1] * size

    def heuristic(self, source: ShardingSpec, target: ShardingSpec) -> list[Step]:
        """The greedy search of the literature: one step at a time, to the spec nearest the target.

        Nearness is the per-dim difference table of Colossal-Auto (arXiv:2302.02599); it knows
        neither bytes nor links, and is kept for comparison only.

        Raises:
            ValueError: it went round in circles.
        """
        path: list[Step] = []
        here, seen = source, {source}
        while here != target:
            moves = [s for s in steps_from(here, len(self.mesh)) if s.target not in seen]
            if not moves:
                raise ValueError(f"greedy search is stuck at {here} on the way to {target}")
            best = min(moves, key=lambda s: _difference(s.target, target))
            path.append(best)
            here = best.target
            seen.add(here)
        return path

    # -- construction ---------------------------------------------------------------------------

    def _legal_splits(self, shape: tuple[int, ...]) -> tuple[frozenset[tuple[int, ...]], ...]:
        axes = [axis for axis, size in enumerate(self.mesh) if size > 1]
        tuples = [t for n in range(len(axes) + 1) for t in permutations(axes, n)]
        return tuple(
            frozenset(t for t in tuples if fills_every_rank(size, t, self.mesh)) for size in shape
        )

    def _build_graph(self, legal: tuple[frozenset[tuple[int, ...]], ...]) -> _Graph:
        specs = tuple(all_specs(legal, self.mesh))
        index = {spec: i for i, spec in enumerate(specs)}
        real = [axis for axis, size in enumerate(self.mesh) if size > 1]
        steps = tuple(
            step
            for spec in specs
            for step in steps_from(spec, len(self.mesh))
            if step.target in index and step.axis in real
        )
        costs = [self._step_cost(step) for step in steps]
        return _Graph(
            specs,
            index,
            steps,
            np.array([index[s.source] for s in steps], dtype=np.int64),
            np.array([index[s.target] for s in steps], dtype=np.int64),
            np.array([s.kind == "inject" for s in steps], dtype=bool),
            np.array([c[0] for c in costs], dtype=np.float64).reshape(-1, 2),
            np.array([c[1] for c in costs], dtype=np.float64).reshape(-1, 2),
        )

    def _step_cost(self, step: Step) -> tuple[tuple[float, float], tuple[float, float]]:
        """(constant us, us per global byte), forward and backward.

        A collective over k ranks on a local buffer of n bytes (the unsplit side) takes, by the
        ring algorithm, (k-1) alpha + n (k-1)/k beta per pass; local copies go at memory speed.
        """
        link, size = self.cluster.links[step.axis], self.mesh[step.axis]
        # bytes of the local buffer on the side where the axis does not split it
        outer = min(step.source.parts(self.mesh), step.target.parts(self.mesh))
        share = 1.0 / outer / (size if step.kind == "all_to_all" else 1)
        device = self.cluster.device
        local = (device.launch_us, 2e6 * share / size / device.bandwidth)

        def collective(name: str | None) -> tuple[float, float]:
            if name is None:
                return (0.0, 0.0)
            passes = _TRAFFIC[name]
            return (
                device.launch_us + 1e6 * passes * (size - 1) * link.alpha,
                1e6 * passes * share * (size - 1) / size * link.beta,
            )

        forward = collective(_FORWARD.get(step.kind))
        backward = collective(_BACKWARD.get(step.kind))
        if step.kind in ("slice", "inject"):
            forward = local
        if step.kind == "gather":
            backward = local
        return forward, backward

    @staticmethod
    def _weights(graph: _Graph, size: int, grad: bool) -> np.ndarray:
        weight = graph.forward[:, 0] + graph.forward[:, 1] * size
        if grad:
            weight = weight + graph.backward[:, 0] + graph.backward[:, 1] * size
        return weight

    def _all_pairs(
        self, legal: tuple[frozenset[tuple[int, ...]], ...], size: int, grad: bool
    ) -> np.ndarray:
        graph = self._graph(legal)
        count = len(graph.specs)
        distance = np.full((count, count), np.inf)
        weight, last = self._weights(graph, size, grad), graph.inject
        np.minimum.at(distance, (graph.source[~last], graph.target[~last]), weight[~last])
        np.fill_diagonal(distance, 0.0)
        for k in range(count):
            np.minimum(distance, distance[:, k, None] + distance[None, k, :], out=distance)
        for _ in self.mesh:  # up to one injection per axis, after everything else
            through = distance[:, graph.source[last]] + weight[last]
            np.minimum.at(distance.T, graph.target[last], through.T)
        return distance


def converter_for(cluster: ClusterInfo) -> LayoutConverter:
    """The converter of a cluster, shared by all that ask for an equal one."""
    key = repr(cluster.to_dict())
    if key not in _CONVERTERS:
        _CONVERTERS[key] = LayoutConverter(cluster)
    return _CONVERTERS[key]


_CONVERTERS: dict[str, LayoutConverter] = {}


def _difference(a: ShardingSpec, b: ShardingSpec) -> float:
    gather, shard, penalty = 20, 5, 6

    def dim(x: tuple[int, ...], y: tuple[int, ...]) -> float:
        common = 0
        while common < min(len(x), len(y)) and x[common] == y[common]:
            common += 1
        gathers, shards = len(x) - common, len(y) - common
        return gather * gathers + shard * shards + penalty * max(0, gathers + shards - 1)

    dims = sum(dim(x, y) for x, y in zip(a.dims, b.dims, strict=True))
    pending = set(a.partial) ^ set(b.partial) | set(a.varying) ^ set(b.varying)
    return dims + gather * len(pending)
