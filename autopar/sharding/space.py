"""The search space of a graph: one site per decision, with its candidates and their costs.

Sites are the parameters (where they are stored), the inputs (how they are split), every operator
call (its strategy), every value with several users (the layout they share: converted to once, with
one gradient reduction), and the outputs. A plan is one candidate per site; the solver's `Problem`
and random plans are both read off the space.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch.fx as fx

from autopar.profiler.cluster import ClusterInfo
from autopar.profiler.profile import NodeProfile, profile_graph, requires_grad_map
from autopar.sharding.conversion import converter_for
from autopar.sharding.node_rules import call_of, producer, results, rule_of, strategies_of
from autopar.sharding.rule import Strategy
from autopar.sharding.spec import ShardingSpec, fills_every_rank, local_shape
from autopar.solver import Edge, Problem
from autopar.tracer.graph import ModelGraph, operands, shape_of


@dataclass(frozen=True)
class Candidate:
    """One choice of a site.

    Args:
        name: what the plan file holds.
        outputs: layouts of the site's values.
        inputs: layouts it needs of its operands.
        strategy: of an operator call.
        regather: a parameter gathered for forward is dropped and gathered again for backward
            (ZeRO-3) instead of kept (ZeRO-2).
    """

    name: str
    outputs: tuple[ShardingSpec, ...]
    inputs: tuple[ShardingSpec | None, ...] = ()
    strategy: Strategy | None = None
    regather: bool = False


@dataclass(frozen=True)
class Site:
    """One decision.

    Args:
        kind: "parameter", "buffer", "input", "op", "fan" or "output".
        node: the graph node; of a fan, the one whose value is shared.
        result: of a fan, which result of the node.
        candidates: at least one.
        time_us, memory_bytes: per candidate.
        parts: named shares of the costs, per candidate, for reports ("compute_us", ...).
        repeats: sites with equal keys are copies in repeated blocks.
    """

    kind: str
    node: fx.Node
    candidates: tuple[Candidate, ...]
    time_us: np.ndarray
    memory_bytes: np.ndarray
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)
    result: int = 0
    repeats: Any = None

    @property
    def name(self) -> str:
        return f"{self.node.name}#{self.result}" if self.kind == "fan" else self.node.name


@dataclass(frozen=True)
class Link:
    """A value flowing from one site to another.

    Args:
        result: which output of the source.
        operand: which input of the target.
        shape, itemsize: of the global value.
        grad: the value carries a gradient.
        weight: the value is (a view of) a parameter.
        saved: backward needs the value, so a copy made by a conversion stays alive.
    """

    source: int
    target: int
    result: int
    operand: int
    shape: tuple[int, ...]
    itemsize: int
    grad: bool
    weight: bool
    saved: bool


@dataclass(frozen=True)
class Pins:
    """Layouts decided from outside: by qualified parameter name, and by position of inputs and
    outputs (None: free)."""

    parameters: Mapping[str, ShardingSpec] = field(default_factory=dict)
    inputs: tuple[ShardingSpec | None, ...] | None = None
    outputs: tuple[ShardingSpec, ...] | None = None


@dataclass(frozen=True)
class Workload:
    """What training needs besides the graph.

    Args:
        trainable: placeholder names of parameters that require grad.
        state_bytes_per_param_byte: optimizer state per byte of parameter (Adam: 2).
    """

    trainable: frozenset[str]
    state_bytes_per_param_byte: float = 2.0


class SearchSpace:
    """All legal plans of a graph on a cluster."""

    def __init__(
        self, graph: ModelGraph, cluster: ClusterInfo, workload: Workload, pins: Pins | None = None
    ) -> None:
        self.graph, self.cluster, self.workload = graph, cluster, workload
        self.pins = pins or Pins()
        self.mesh = cluster.mesh
        self.converter = converter_for(cluster)
        self.profile = profile_graph(graph, set(workload.trainable))
        self.grads = requires_grad_map(graph, set(workload.trainable))
        self._bytes = lru_cache(maxsize=None)(self._local_bytes)
        self.link_costs = lru_cache(maxsize=None)(self._link_costs)
        self.unruled = [n for n in graph.compute_nodes() if not rule_of(n)[1]]
        self._saved = _Saved(graph, self.profile)
        self._working: dict[fx.Node, np.ndarray] = {}
        self.sites: list[Site] = []
        self.links: list[Link] = []
        self._site_of: dict[tuple[fx.Node, int], int] = {}
        self._build()

    # -- public ---------------------------------------------------------------------------------

    def problem(
        self,
        budget_bytes: float,
        *,
        weight_price: float = 1.0,
        hidden_compute: float = 0.0,
        working_cap: float = np.inf,
    ) -> tuple[Problem, list[int]]:
        """The SPMD problem and, per site, the class of the copies it shares its choice with.

        Args:
            weight_price: factor on the conversions of weights, which may overlap with compute.
            hidden_compute: share of compute to deduct for what hides behind it.
            working_cap: leave out candidates whose gradients take more bytes (see `working_bytes`).
        """

        def timed(site: Site) -> np.ndarray:
            if site.kind != "op":
                return site.time_us
            time = site.time_us - hidden_compute * site.parts["compute_us"]
            return np.where(self.working(site) <= working_cap, time, np.inf)

        def priced(link: Link) -> np.ndarray:
            time = self.link_costs(link)[0]
            if not link.weight or weight_price == 1.0:
                return time
            allowed = np.isfinite(time)  # 0 * inf is not 0
            return np.where(allowed, weight_price * np.where(allowed, time, 0.0), np.inf)

        problem = Problem(
            tuple(timed(s) for s in self.sites),
            tuple(s.memory_bytes for s in self.sites),
            tuple(
                Edge(link.source, link.target, priced(link), self.link_costs(link)[1])
                for link in self.links
            ),
            budget_bytes,
            tuple(s.name for s in self.sites),
        )
        keys: dict[Any, int] = {}
        classes = [
            keys.setdefault(s.repeats if s.repeats is not None else ("site", i), len(keys))
            for i, s in enumerate(self.sites)
        ]
        return problem, classes

    def cost_links(self) -> None:
        """Compute all conversion costs now (they are memoized)."""
        for link in self.links:
            self.link_costs(link)

    def _link_costs(self, link: Link) -> tuple[np.ndarray, np.ndarray | None]:
        """Time [source candidate, target candidate] and memory of the conversions on a link."""
        source, target = self.sites[link.source], self.sites[link.target]
        outs = [c.outputs[link.result] for c in source.candidates]
        ins = [c.inputs[link.operand] for c in target.candidates]
        rows, row_of = _unique(outs)
        columns, column_of = _unique(ins)
        time = self.conversion_us(link, rows, columns)[np.ix_(row_of, column_of)]
        if not link.saved:
            memory = None
        else:
            held = [0 if s is None else self._bytes(link.shape, link.itemsize, s) for s in columns]
            moved = np.array([[a.dims != b.dims for b in columns] for a in rows])
            copies = np.where(moved, np.array(held)[None, :], 0.0)
            memory = copies[np.ix_(row_of, column_of)]
        regather = np.array([c.regather for c in source.candidates])
        if regather.any():
            again = self.conversion_us(link, rows, columns, forward_only=True)
            time = time + regather[:, None] * again[np.ix_(row_of, column_of)]
            if memory is not None:
                memory = np.where(regather[:, None], 0.0, memory)
        return time, memory

    def conversion_us(
        self,
        link: Link,
        sources: Sequence[ShardingSpec],
        targets: Sequence[ShardingSpec | None],
        *,
        forward_only: bool = False,
    ) -> np.ndarray:
        """Cost matrix of converting the link's value."""
        grad = link.grad and not forward_only
        table, index = self.converter.table(link.shape, link.itemsize, grad=grad)
        rows = [index[s] for s in sources]
        columns = [index[t if t is not None else sources[0]] for t in targets]
        return table[np.ix_(rows, columns)]

    def conversion_costs(self, link: Link, choices: Sequence[int]) -> tuple[float, float]:
        """Time and memory of the conversion on a link under a full choice."""
        time, memory = self.link_costs(link)
        pair = choices[link.source], choices[link.target]
        return float(time[pair]), 0.0 if memory is None else float(memory[pair])

    def working(self, site: Site) -> np.ndarray:
        """Per candidate, local bytes of the gradients of an operator's operands and results."""
        if site.node not in self._working:
            values = [n.meta["val"] if n is not None else None for n in operands(site.node)]
            floats = [
                (i, shape_of(t), t.element_size())
                for i, t in enumerate((*values, *results(site.node)))
                if t is not None and t.dtype.is_floating_point
            ]
            live = self.profile[site.node].differentiable
            self._working[site.node] = np.array(
                [
                    live * sum(self._bytes(shape, size, specs[i]) for i, shape, size in floats)
                    for specs in ((*c.inputs, *c.outputs) for c in site.candidates)
                ],
                dtype=np.float64,
            )
        return self._working[site.node]

    def least_working_bytes(self) -> float:
        """The smallest `working_cap` under which every operator has a candidate."""
        ops = (site for site in self.sites if site.kind == "op")
        return max((float(self.working(site).min()) for site in ops), default=0.0)

    def random_choices(self, rng: np.random.Generator) -> tuple[int, ...]:
        """A uniformly drawn candidate per site, redrawn where no conversion exists."""
        costs = [(link, self.link_costs(link)[0]) for link in self.links]
        touching: dict[int, list[tuple[Link, np.ndarray]]] = defaultdict(list)
        for link, cost in costs:
            touching[link.source].append((link, cost))
            touching[link.target].append((link, cost))
        choices = [int(rng.integers(len(s.candidates))) for s in self.sites]
        order = sorted(range(len(self.sites)), key=lambda i: self.sites[i].kind == "fan")
        for i in order:
            allowed = np.ones(len(self.sites[i].candidates), dtype=bool)
            if self.sites[i].kind == "fan":
                for link, cost in touching[i]:
                    line = (
                        cost[:, choices[link.target]]
                        if link.source == i
                        else cost[choices[link.source], :]
                    )
                    allowed &= np.isfinite(line)
                choices[i] = int(rng.choice(np.flatnonzero(allowed)))
        return tuple(choices)

    # -- construction ---------------------------------------------------------------------------

    def _local_bytes(self, shape: tuple[int, ...], itemsize: int, spec: ShardingSpec) -> int:
        """Bytes on the fullest rank."""
        first = (0,) * len(self.mesh)
        return itemsize * int(np.prod(local_shape(shape, spec, self.mesh, first), dtype=np.int64))

    def _splits(self, shape: tuple[int, ...]) -> list[ShardingSpec]:
        """Every placement of a stored tensor: each axis splits one dim or none."""
        found = [ShardingSpec.replicated(len(shape))]
        for axis, size in enumerate(self.mesh):
            if size == 1:
                continue
            found += [
                ShardingSpec(tuple((*a, axis) if e == d else a for e, a in enumerate(s.dims)))
                for s in found
                for d in range(len(shape))
            ]
        return [
            s
            for s in found
            if all(fills_every_rank(n, a, self.mesh) for n, a in zip(shape, s.dims, strict=True))
        ]

    def _add(self, site: Site, *values: int) -> int:
        self.sites.append(site)
        for result in values:
            self._site_of[site.node, result] = len(self.sites) - 1
        return len(self.sites) - 1

    def _build(self) -> None:
        input_names = [name for name in self.graph.inputs if name is not None]
        ordinals: Counter[str] = Counter()
        users = _user_links(self.graph)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self._add(self._placeholder(node, input_names), 0)
            elif node in self.profile:
                site = self._operator(node, ordinals)
                index = self._add(site, *range(len(results(node))))
                for i, operand in enumerate(operands(node)):
                    if operand is not None:
                        self._connect(operand, index, i)
            else:
                continue
            for result in range(len(results(node))):
                if len(users[node, result]) > 1:
                    self._add_fan(node, result, users[node, result])
        self._outputs()

    def _connect(self, value: fx.Node, target: int, operand: int) -> None:
        node, result = producer(value)
        source = self._site_of[node, result]
        fake = value.meta["val"]
        root = self._saved.root(value)
        parameter = root.op == "placeholder" and root.target in self.graph.parameters
        is_op = self.sites[target].kind == "op"
        converts_for_saver = is_op and self._saved.needs(self.sites[target].node, operand)
        fan = self.sites[source].kind == "fan"
        self.links.append(
            Link(
                source,
                target,
                0 if fan else result,
                operand,
                shape_of(fake),
                fake.element_size(),
                self.grads[value],
                parameter,
                saved=self._saved.any(root) if parameter else converts_for_saver,
            )
        )

    def _placeholder(self, node: fx.Node, input_names: Sequence[str]) -> Site:
        name = str(node.target)
        fake = node.meta["val"]
        shape, itemsize = shape_of(fake), fake.element_size()
        whole = ShardingSpec.replicated(len(shape))
        if name in self.graph.parameters:
            return self._parameter(node, shape, itemsize)
        if name in input_names:
            pinned = self.pins.inputs
            spec = pinned[input_names.index(name)] if pinned is not None else None
            specs = self._splits(shape) if spec is None else [spec]
            kind = "input"
        else:
            specs, kind = [whole], "buffer"
        candidates = tuple(Candidate(str(s) or "scalar", (s,)) for s in specs)
        held = np.array([float(self._bytes(shape, itemsize, s)) for s in specs])
        return Site(kind, node, candidates, np.zeros(len(specs)), held, {"buffers_bytes": held})

    def _parameter(self, node: fx.Node, shape: tuple[int, ...], itemsize: int) -> Site:
        qualified = self.graph.parameters[str(node.target)]
        pinned = self.pins.parameters.get(qualified)
        specs = [pinned] if pinned is not None else self._splits(shape)
        candidates = []
        for spec in specs:
            candidates.append(Candidate(str(spec) or "scalar", (spec,)))
            if not spec.is_replicated:
                candidates.append(Candidate(f"{spec} regather", (spec,), regather=True))
        held = np.array([float(self._bytes(shape, itemsize, c.outputs[0])) for c in candidates])
        trains = node.target in self.workload.trainable
        parts = {
            "parameters_bytes": held,
            "gradients_bytes": held * trains,
            "optimizer_bytes": held * trains * self.workload.state_bytes_per_param_byte,
        }
        repeats = None
        if _has_index(qualified):
            repeats = ("parameter", _pattern(qualified), shape, len(candidates), trains)
        total = sum(parts.values(), np.zeros(len(held)))
        zero = np.zeros(len(held))
        return Site("parameter", node, tuple(candidates), zero, total, parts, repeats=repeats)

    def _operator(self, node: fx.Node, ordinals: Counter[str]) -> Site:
        found = strategies_of(node, self.mesh)
        candidates = tuple(Candidate(s.name, s.outputs, s.inputs, s) for s in found)
        compute = self._compute_us(node, found)
        communicate = self._lowering_us(node, found)
        saved = self._saved_bytes(node, found)
        module = self.graph.info(node).module
        ordinal = ordinals[module]
        ordinals[module] += 1
        repeats = None
        if _has_index(module):
            call = call_of(node)
            repeats = (
                "op", _pattern(module), ordinal, str(call.op), call.inputs, call.outputs,
                len(candidates), self._saved.key(node),
            )  # fmt: skip
        return Site(
            "op", node, candidates, compute + communicate, saved,
            {"compute_us": compute, "communication_us": communicate, "activations_bytes": saved},
            repeats=repeats,
        )  # fmt: skip

    def _compute_us(self, node: fx.Node, found: Sequence[Strategy]) -> np.ndarray:
        """Roofline: the larger of arithmetic and memory traffic, plus launches."""
        profile, device = self.profile[node], self.cluster.device
        fakes = [n.meta["val"] if n is not None else None for n in operands(node)]
        outs = results(node)
        whole = sum(t.numel() * t.element_size() for t in (*fakes, *outs) if t is not None) or 1
        share = np.array([s.share(self.mesh) for s in found])
        local = np.array(
            [
                sum(
                    self._bytes(shape_of(t), t.element_size(), spec)
                    for t, spec in zip((*fakes, *outs), (*s.inputs, *s.outputs), strict=True)
                    if t is not None and spec is not None
                )
                for s in found
            ]
        )
        dtype = str(outs[0].dtype).removeprefix("torch.") if outs else "float32"
        peak = device.flops_per_s(dtype)

        def roofline(flops: int, nbytes: int, kernels: int) -> np.ndarray:
            arithmetic = 1e6 * flops * share / peak
            traffic = 1e6 * nbytes * (local / whole) / device.bandwidth
            return np.maximum(arithmetic, traffic) + device.launch_us * kernels

        p = profile
        return roofline(p.forward_flops, p.forward_bytes, p.forward_kernels) + roofline(
            p.backward_flops, p.backward_bytes, p.backward_kernels
        )

    def _lowering_us(self, node: fx.Node, found: Sequence[Strategy]) -> np.ndarray:
        """Collectives inside of lowerings: per axis, three small all-reduces forward and two
        backward of the operands that lack the split factor (targets, statistics)."""
        rule, _ = rule_of(node)
        costs = np.zeros(len(found))
        for i, strategy in enumerate(found):
            for name, axes in strategy.splits.items():
                if not (strategy.lowered and rule.factors[name].complete):
                    continue
                small = sum(
                    n.meta["val"].numel() * 8
                    for n, dims in zip(operands(node), rule.inputs, strict=True)
                    if n is not None and dims is not None and name not in dims
                )
                for axis in axes:
                    link, size = self.cluster.links[axis], self.mesh[axis]
                    once = 2 * (size - 1) * (link.alpha + small / size * link.beta)
                    costs[i] += 5e6 * once
        return costs

    def _saved_bytes(self, node: fx.Node, found: Sequence[Strategy]) -> np.ndarray:
        profile = self.profile[node]
        ins, outs = operands(node), results(node)
        mine = [i for i in profile.saves_inputs if self._saved.counted_here(node, i)]
        total = np.zeros(len(found))
        for k, s in enumerate(found):
            nbytes = profile.saved_internal_bytes * s.share(self.mesh)
            for i in mine:
                value, spec = ins[i], s.inputs[i]
                assert value is not None
                assert spec is not None
                fake = value.meta["val"]
                nbytes += self._bytes(shape_of(fake), fake.element_size(), spec)
            for i in profile.saves_outputs:
                if self._saved.output_counted(node, i):
                    t = outs[i]
                    nbytes += self._bytes(shape_of(t), t.element_size(), s.outputs[i])
            total[k] = nbytes
        return total

    def _add_fan(self, node: fx.Node, result: int, users: Sequence[tuple[fx.Node, int]]) -> None:
        """A shared layout for a value with several users; its candidates are what any side has."""
        source = self._site_of[node, result]
        specs = dict.fromkeys(c.outputs[result] for c in self.sites[source].candidates)
        for user, operand in users:
            if user.op != "output":
                for s in strategies_of(user, self.mesh):
                    spec = s.inputs[operand]
                    assert spec is not None
                    specs.setdefault(spec)
        grad = self.grads[node]
        if not grad:
            specs = dict.fromkeys(s.data() for s in specs)
        candidates = tuple(Candidate(str(s) or "scalar", (s,), (s,)) for s in specs)
        zero = np.zeros(len(candidates))
        copies = self.sites[source].repeats
        repeats = None
        if copies is not None:
            repeats = ("fan", result, copies, tuple(specs))
        fake = results(node)[result]
        value = node
        root = self._saved.root(value) if len(results(node)) == 1 else node
        parameter = root.op == "placeholder" and root.target in self.graph.parameters
        site = Site("fan", node, candidates, zero, zero, {}, result, repeats)
        index = len(self.sites)
        self.links.append(
            Link(
                source, index, result, 0, shape_of(fake), fake.element_size(), grad, parameter,
                saved=parameter and self._saved.any(root),
            )
        )  # fmt: skip
        self._add(site, result)

    def _outputs(self) -> None:
        """Mutated buffers and results, each in the layout that the caller expects."""
        values = [v for v in self.graph.output.args[0] if isinstance(v, fx.Node)]  # type: ignore[union-attr]
        buffers = len(self.graph.mutations)
        specs = []
        for i, value in enumerate(values):
            spec = ShardingSpec.replicated(value.meta["val"].ndim)
            if i >= buffers and self.pins.outputs is not None:
                spec = self.pins.outputs[i - buffers]
            specs.append(spec)
        zero = np.zeros(1)
        candidate = Candidate("outputs", (), tuple(specs))
        index = self._add(Site("output", self.graph.output, (candidate,), zero, zero))
        for i, value in enumerate(values):
            self._connect(value, index, i)


class _Saved:
    """Which values backward keeps, each counted once however many ops save it."""

    def __init__(self, graph: ModelGraph, profile: Mapping[fx.Node, NodeProfile]) -> None:
        self._root: dict[fx.Node, fx.Node] = {}
        self._first: dict[fx.Node, tuple[fx.Node, int]] = {}
        self._saves: set[tuple[fx.Node, int]] = set()
        self._output_first: set[tuple[fx.Node, int]] = set()
        for node in graph.nodes:
            source, _ = producer(node)
            if node.op == "placeholder":
                self._root[node] = node
                continue
            if source not in profile:
                continue
            if source is not node:  # getitem: a view of the split input, or a result of its own
                aliased = profile[source].aliases_input
                self._root[node] = self._root[source] if aliased else node
                continue
            ins = operands(node)
            first = next((n for n in ins if n is not None), None)
            alias = profile[node].aliases_input and first is not None
            self._root[node] = self._root[first] if alias and first is not None else node
            for i in profile[node].saves_inputs:
                value = ins[i]
                assert value is not None
                self._saves.add((node, i))
                self._first.setdefault(self._root[value], (node, i))
            for i in profile[node].saves_outputs:
                value = node if len(results(node)) == 1 else _getitem(node, i)
                root = self._root.get(value, value) if value is not None else None
                if root is None or root not in self._first:
                    self._output_first.add((node, i))
                    if value is not None:
                        self._first.setdefault(value, (node, -1 - i))

    def root(self, value: fx.Node) -> fx.Node:
        """The value whose storage this one shares."""
        return self._root.get(value, value)

    def any(self, root: fx.Node) -> bool:
        return root in self._first

    def needs(self, node: fx.Node, operand: int) -> bool:
        """Backward keeps this operand, and it is counted elsewhere, so a converted copy adds up."""
        return (node, operand) in self._saves and not self.counted_here(node, operand)

    def counted_here(self, node: fx.Node, operand: int) -> bool:
        value = operands(node)[operand]
        assert value is not None
        root = self.root(value)
        return root.op != "placeholder" and self._first.get(root) == (node, operand)

    def output_counted(self, node: fx.Node, result: int) -> bool:
        return (node, result) in self._output_first

    def key(self, node: fx.Node) -> tuple[Any, ...]:
        """Distinguishes copies of a block that save different things."""
        return tuple(sorted(i for n, i in self._first.values() if n is node))


def _getitem(node: fx.Node, index: int) -> fx.Node | None:
    return next((u for u in node.users if producer(u) == (node, index)), None)


def _user_links(graph: ModelGraph) -> dict[tuple[fx.Node, int], list[tuple[fx.Node, int]]]:
    """Per value its users as (node, operand); the output node counts as a user."""
    found: dict[tuple[fx.Node, int], list[tuple[fx.Node, int]]] = defaultdict(list)
    for node in graph.compute_nodes():
        for i, operand in enumerate(operands(node)):
            if operand is not None:
                found[producer(operand)].append((node, i))
    for i, value in enumerate(graph.output.args[0]):  # type: ignore[arg-type]
        if isinstance(value, fx.Node):
            found[producer(value)].append((graph.output, i))
    return found


def _unique(items: Iterable[Any]) -> tuple[list[Any], list[int]]:
    seen: dict[Any, int] = {}
    position = [seen.setdefault(item, len(seen)) for item in items]
    return list(seen), position


def _pattern(name: str) -> str:
    """`h.3.attn` to `h.*.attn`: the same place in every copy of a block."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def _has_index(name: str) -> bool:
    return _pattern(name) != name
