"""The search space of a graph: one site per decision, with its candidates and their costs.

Sites are the parameters (where they are stored), the inputs (how they are split), every operator
call (its strategy), every value with several users (the layout they share: converted to once, with
one gradient reduction), and the outputs. A plan is one candidate per site; the solver's `Problem`
and random plans are both read off the space.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch.fx as fx

from autopar.profiler.cluster import ClusterInfo
from autopar.profiler.profile import profile_graph, requires_grad_map
from autopar.sharding.conversion import converter_for
from autopar.sharding.costs import OpCosts
from autopar.sharding.node_rules import call_of, results, rule_of, strategies_of
from autopar.sharding.repeats import has_index, pattern, places
from autopar.sharding.rules import describe_missing
from autopar.sharding.saved import SavedValues
from autopar.sharding.sites import Candidate, Link, Pins, Site, Workload
from autopar.sharding.spec import ShardingSpec, fills_every_rank
from autopar.solver import Edge, Problem
from autopar.tracer.graph import ModelGraph, operands, producer, shape_of

log = logging.getLogger(__name__)


class SearchSpace:
    """All legal plans of a graph on a cluster.

    Args:
        any_order: offer dims that several axes split in every order of the axes, not the ascending
            one alone. Operators cost the same in every order and parameters are stored in one, so
            that little can be won; on three axes planning takes several times as long.
    """

    def __init__(
        self,
        graph: ModelGraph,
        cluster: ClusterInfo,
        workload: Workload,
        pins: Pins | None = None,
        *,
        any_order: bool = False,
    ) -> None:
        self.any_order = any_order
        self.graph, self.cluster, self.workload = graph, cluster, workload
        self.pins = pins or Pins()
        self.mesh = cluster.mesh
        self.converter = converter_for(cluster)
        self.profile = profile_graph(graph, set(workload.trainable))
        self.grads = requires_grad_map(graph, set(workload.trainable))
        self.link_costs = lru_cache(maxsize=None)(self._link_costs)
        self.unruled = [n for n in graph.compute_nodes() if not rule_of(n)[1]]
        for node in self.unruled:
            log.info("%s", describe_missing(call_of(node), graph.info(node).source))
        self._saved = SavedValues(graph, self.profile)
        self._costs = OpCosts(cluster, self.profile, self._saved)
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
            working_cap: leave out candidates with more `OpCosts.working_bytes` than this.
        """

        def timed(site: Site) -> np.ndarray:
            if site.kind != "op":
                return site.time_us
            time = site.time_us - hidden_compute * site.parts["compute_us"]
            return np.where(site.parts["working"] <= working_cap, time, np.inf)

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
            held = [
                0 if s is None else self._costs.local_bytes(link.shape, link.itemsize, s)
                for s in columns
            ]
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
        wanted = [t if t is not None else sources[0] for t in targets]
        return self.converter.costs_us(link.shape, link.itemsize, sources, wanted, grad=grad)

    def conversion_costs(self, link: Link, choices: Sequence[int]) -> tuple[float, float]:
        """Time and memory of the conversion on a link under a full choice."""
        time, memory = self.link_costs(link)
        pair = choices[link.source], choices[link.target]
        return float(time[pair]), 0.0 if memory is None else float(memory[pair])

    def least_working_bytes(self) -> float:
        """The smallest `working_cap` under which every operator has a candidate."""
        ops = (site for site in self.sites if site.kind == "op")
        return max((float(site.parts["working"].min()) for site in ops), default=0.0)

    def distinct_working_bytes(self) -> np.ndarray:
        """Every working set that some candidate has, ascending."""
        ops = [site.parts["working"] for site in self.sites if site.kind == "op"]
        return np.unique(np.concatenate(ops)) if ops else np.zeros(1)

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

    def _splits(self, shape: tuple[int, ...]) -> list[ShardingSpec]:
        """Every placement of a stored tensor: each axis splits one dim or none.

        Axes of one dim in ascending order only: DTensor's placements cannot say another.
        """
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
        calls = [n for n in self.graph.nodes if n in self.profile]
        signatures = [(str(c.op), c.inputs, c.outputs) for c in map(call_of, calls)]
        modules = [self.graph.info(n).module for n in calls]
        place = dict(zip(calls, places(zip(modules, signatures, strict=True)), strict=True))
        users = _user_links(self.graph)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                if not results(node):  # a flag, specialized
                    continue
                self._add(self._placeholder(node, input_names), 0)
            elif node in self.profile:
                site = self._operator(node, place[node])
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
        held = np.array([float(self._costs.local_bytes(shape, itemsize, s)) for s in specs])
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
        held = np.array(
            [float(self._costs.local_bytes(shape, itemsize, c.outputs[0])) for c in candidates]
        )
        trains = node.target in self.workload.trainable
        parts = {
            "parameters_bytes": held,
            "gradients_bytes": held * trains,
            "optimizer_bytes": held * trains * self.workload.state_bytes_per_param_byte,
        }
        repeats = None
        if has_index(qualified):
            repeats = ("parameter", pattern(qualified), shape, len(candidates), trains)
        total = sum(parts.values(), np.zeros(len(held)))
        zero = np.zeros(len(held))
        return Site("parameter", node, tuple(candidates), zero, total, parts, repeats=repeats)

    def _operator(self, node: fx.Node, place: Any) -> Site:
        found = strategies_of(node, self.mesh, any_order=self.any_order)
        candidates = tuple(Candidate(s.name, s.outputs, s.inputs, s) for s in found)
        compute = self._costs.compute_us(node, found)
        communicate = self._costs.lowering_us(node, found)
        saved = self._costs.saved_bytes(node, found)
        working = self._costs.working_bytes(node, found)
        repeats = None
        if place is not None:
            call = call_of(node)
            repeats = (
                "op", place, str(call.op), call.inputs, call.outputs, len(candidates),
                self._saved.key(node),
            )  # fmt: skip
        return Site(
            "op", node, candidates, compute + communicate, saved,
            {"compute_us": compute, "communication_us": communicate, "activations_bytes": saved,
             "working": working},
            repeats=repeats,
        )  # fmt: skip

    def _add_fan(self, node: fx.Node, result: int, users: Sequence[tuple[fx.Node, int]]) -> None:
        """A shared layout for a value with several users; its candidates are what any side has."""
        source = self._site_of[node, result]
        specs = dict.fromkeys(c.outputs[result] for c in self.sites[source].candidates)
        for user, operand in users:
            if user.op != "output":
                for s in strategies_of(user, self.mesh, any_order=self.any_order):
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
