"""Layout conversion: every step on every spec, minima against brute force, and what compares.

Any path is right if each of its steps is and they chain: so all steps out of all specs are run, the
paths of all pairs are followed, and a sample of entire paths is run too.
"""

import heapq
import itertools
import random
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch

from autopar import ClusterInfo
from autopar.cluster.link import Link
from autopar.ir.spec import ShardingSpec, chunk, fills_every_rank, local_shape
from autopar.passes.apply_sharding import step_call
from autopar.runtime.distribute import shard_of
from autopar.sharding.conversion.converter import LayoutConverter, Step
from autopar.sharding.conversion.graph import KINDS
from benchmarks.conversion_baselines import axis_by_axis, greedy
from tests.lockstep import Lockstep

parse = ShardingSpec.parse


@cache
def converter_of(mesh: str, device: str = "H100", unequal: bool = False) -> LayoutConverter:
    cluster = ClusterInfo.of(mesh, device)
    if unequal:
        links = (Link(1e-4, 1e-9), Link(1e-6, 1 / 300e9), Link(2e-5, 1 / 20e9))
        cluster = replace(cluster, links=links[: len(cluster.mesh)])
    return LayoutConverter(cluster)


def cost_us(converter, shape, source, target, **options):
    return converter.costs_us(shape, 4, (source,), (target,), **options)[0, 0]


def test_specs_print_and_parse():
    for text in ["S01RR", "RS0S1", "RP1(sum)", "S0RV1", "RRP0(sum)V1"]:
        assert str(parse(text)) == text
    with pytest.raises(ValueError, match="twice"):
        parse("S0S0")
    with pytest.raises(ValueError, match="cannot read"):
        parse("S0X")


def test_placements_round_trip():
    for text in ["S01R", "RS0", "S1S0", "RRP1(sum)"]:
        spec = parse(text)
        assert ShardingSpec.from_placements(spec.to_placements(2), spec.ndim) == spec


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_chunk_is_torch_chunk(size, parts):
    lengths = [len(c) for c in torch.arange(size).chunk(parts)]
    ours = [chunk(size, parts, i)[1] for i in range(parts)]
    assert [n for n in ours if n] == lengths


# -- the graph ----------------------------------------------------------------------------------


def _all_specs(shape, mesh):
    """Every legal spec, from the definition."""
    axes = [axis for axis, size in enumerate(mesh) if size > 1]
    for states in itertools.product(["R", "P", "V", *range(len(shape))], repeat=len(axes)):
        at = {s: tuple(a for a, t in zip(axes, states, strict=True) if t == s) for s in states}
        orders = [itertools.permutations(at.get(d, ())) for d in range(len(shape))]
        for dims in itertools.product(*orders):
            if all(fills_every_rank(n, o, mesh) for n, o in zip(shape, dims, strict=True)):
                yield ShardingSpec(dims, at.get("P", ()), at.get("V", ()))


def _is_step(step: Step) -> bool:
    """Whether source and target differ as the table of `converter.py` says."""
    a, b, axis = step.source, step.target, step.axis
    before, after = {
        "all_gather": (f"S{step.dim}", "R"),
        "all_gather_vary": (f"S{step.dim}", "V"),
        "all_to_all": (f"S{step.dim}", f"S{step.to_dim}"),
        "all_reduce": ("P", "R"),
        "reduce_scatter": ("P", f"S{step.dim}"),
        "slice": ("R", f"S{step.dim}"),
        "vary": ("R", "V"),
        "inject": ("R", "P"),
    }[step.kind]
    states = (a.state(axis), b.state(axis)) == (before, after)

    def others(spec):
        # the axis is innermost where it splits
        assert all(o.index(axis) == len(o) - 1 for o in spec.dims if axis in o)
        return [tuple(x for x in o if x != axis) for o in (*spec.dims, spec.partial, spec.varying)]

    return states and others(a) == others(b)


GRAPHS = [
    ("2x2", ()), ("8", (5,)), ("8", (16, 3)), ("1", (4, 4)), ("2x3", (5, 7)), ("2x1x4", (8, 6, 3)),
    ("2x2x2", (5,)), ("2x2x2", (6, 8)), ("2x3x2", (7, 5, 12)), ("2x2x2", (8, 9, 10, 11)),
]  # fmt: skip


@pytest.mark.parametrize(("mesh", "shape"), GRAPHS)
def test_the_graph_is_complete(mesh, shape):
    """All specs and, between two of them, the one step there can be."""
    converter = converter_of(mesh)
    specs = list(_all_specs(shape, converter.mesh))
    assert set(converter.specs(shape)) == set(specs)
    assert len(converter.specs(shape)) == len(specs)
    steps = [step for spec in specs for step in converter.steps_from(shape, spec)]
    assert len({(s.source, s.target) for s in steps}) == len(steps)
    assert all(_is_step(step) for step in steps)
    # counted from the definition: how many ways lead on from each axis that may be moved
    legal, count = set(specs), 0
    for spec in specs:
        tops = [(d, o[-1]) for d, o in enumerate(spec.dims) if o]
        lifted = [
            (spec.dims, a, s) for a in range(len(converter.mesh)) if (s := spec.state(a)) in "RP"
        ]
        for dims, axis, state in lifted:
            if converter.mesh[axis] == 1:
                continue
            count += 2 if state == "R" else 1  # vary and inject, or all-reduce
            for to in range(len(shape)):
                new = tuple((*o, axis) if d == to else o for d, o in enumerate(dims))
                partial = tuple(a for a in spec.partial if a != axis)
                count += ShardingSpec(new, partial, spec.varying) in legal
        for dim, axis in tops:
            count += 2
            for to in set(range(len(shape))) - {dim}:
                new = [o[:-1] if d == dim else o for d, o in enumerate(spec.dims)]
                new[to] = (*new[to], axis)
                count += ShardingSpec(tuple(new), spec.partial, spec.varying) in legal
    assert len(steps) == count


# -- the minimum --------------------------------------------------------------------------------


def _price(converter, shape, path, grad=True):
    steps = [converter.step_us(shape, 4, step) for step in path]
    return sum(forward + (backward if grad else 0.0) for forward, backward in steps)


def _dijkstra(converter, shape, source, grad):
    """Reference search, independent of the tables: to all specs."""
    best, queue, tie = {source: 0.0}, [(0.0, 0, source)], itertools.count(1)
    while queue:
        cost, _, here = heapq.heappop(queue)
        for step in converter.steps_from(shape, here):
            total = cost + _price(converter, shape, [step], grad)
            if total < best.get(step.target, float("inf")):
                best[step.target] = total
                heapq.heappush(queue, (total, next(tie), step.target))
    return best


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("mesh", "shape", "unequal"),
    [
        ("2x2", (8, 12), False),
        ("2x2", (7, 4), True),
        ("2x2x2", (64,), True),
        ("4x1x2", (9, 5), False),
    ],
)
def test_the_cost_is_the_minimum(mesh, shape, unequal, grad):
    """All pairs, against Dijkstra's algorithm from each source."""
    converter = converter_of(mesh, unequal=unequal)
    specs = converter.specs(shape)
    costs = converter.costs_us(shape, 4, specs, specs, grad=grad)
    nearest = [_dijkstra(converter, shape, source, grad) for source in specs]
    for (i, source), (j, target) in itertools.product(enumerate(specs), repeat=2):
        if set(source.varying) - set(target.varying):
            assert costs[i, j] == float("inf")
            with pytest.raises(ValueError, match="no sequence of collectives"):
                converter.path(shape, 4, source, target, grad=grad)
            continue
        assert costs[i, j] == pytest.approx(nearest[i][target])
        assert costs[i, j] == cost_us(converter, shape, source, target, grad=grad)
        path = converter.path(shape, 4, source, target, grad=grad)
        assert _price(converter, shape, path, grad) == pytest.approx(costs[i, j])


def test_no_simple_path_costs_less():
    """Of all sequences of steps that visit no spec twice, listed."""
    converter, shape = converter_of("2x2"), (6,)
    specs = converter.specs(shape)
    costs = converter.costs_us(shape, 4, specs, specs)
    prices, seen = cache(_price), 0

    def walk(path, visited, spent):
        nonlocal seen
        seen += 1
        start, here = visited[0], visited[-1]
        assert costs[specs.index(start), specs.index(here)] <= spent * (1 + 1e-12)
        for step in converter.steps_from(shape, here):
            if step.target not in visited:
                price = prices(converter, shape, (step,))
                walk([*path, step], [*visited, step.target], spent + price)

    for spec in specs:
        walk([], [spec], 0.0)
    assert seen > 10000


def test_sums_are_made_pending_where_it_is_cheapest():
    """Where the tensor is still split, and not at the end."""
    path = converter_of("2x4").path((4096, 64), 4, parse("S0R"), parse("RRP1(sum)"))
    assert [str(s.target) for s in path] == ["S0RP1(sum)", "RRP1(sum)"]


def _reachable(specs, count, seed):
    """Seeded pairs between which a path exists; all if `count` is None."""
    pairs = [
        p for p in itertools.product(specs, repeat=2) if set(p[0].varying) <= set(p[1].varying)
    ]
    return pairs if count is None else random.Random(seed).sample(pairs, count)


@pytest.mark.parametrize(
    ("mesh", "shape", "count"),
    [("2x4", (8, 12), None), ("2x3", (5, 7), None), ("2x2x2", (16, 128, 768), 400),
     ("2x2x2", (8, 9, 10, 11), 400), ("4x8x8", (64, 12, 128, 64), 400)],
)  # fmt: skip
def test_never_above_greedy_or_axis_by_axis(mesh, shape, count):
    converter = converter_of(mesh)
    for source, target in _reachable(converter.specs(shape), count, 0):
        cost = cost_us(converter, shape, source, target)
        for baseline in (greedy, axis_by_axis):
            path = baseline(converter, shape, source, target)
            assert _ends(path, source, target)
            assert cost <= _price(converter, shape, path) * (1 + 1e-12)


def test_greedy_reproduces_the_known_example():
    path = greedy(converter_of("2x4"), (8, 8, 8), parse("S01RR"), parse("RS01R"))
    assert [str(s.target) for s in path] == ["S0RR", "RS0R", "RS01R"]


@pytest.mark.parametrize(
    ("source", "target", "through"),
    [
        # DTensor's own example of shards that do not nest: axis 1 is gathered first
        ("S01R", "S1R", ["S0R", "RR", "S1R"]),
        ("S01R", "RS01", ["S0R", "RS0", "RS01"]),
        ("RRP1(sum)", "S1R", ["S1R"]),
        ("S0S1", "S1S0", ["S0R", "RS0", "S1S0"]),
        ("S01R", "S10R", ["S0R", "RR", "S1R", "S10R"]),
    ],
)
def test_axis_by_axis_is_what_dtensor_does(source, target, through):
    path = axis_by_axis(converter_of("2x4"), (16, 16), parse(source), parse(target))
    assert [str(s.target) for s in path] == through


def test_an_illegal_spec_is_named():
    converter = converter_of("2x4")
    with pytest.raises(
        ValueError, match=r"S01R is not a layout of .* shape \(4, 8\) on mesh \(2, 4"
    ):
        converter.path((4, 8), 4, parse("RR"), parse("S01R"))
    with pytest.raises(ValueError, match="an axis does not exist"):
        cost_us(converter, (4, 8), parse("RS2"), parse("RR"))
    with pytest.raises(ValueError, match="RRR is not a layout"):
        converter.costs_us((4, 8), 4, [parse("RRR")], [parse("RR")])


def test_the_order_of_axes_changes():
    """S01 to S10: ranks swap shards along one axis after the other."""
    converter = converter_of("2x2x2")
    for shape in [(64,), (64, 64), (64, 64, 64)]:
        rest = "R" * (len(shape) - 1)
        path = converter.path(shape, 4, parse("S01" + rest), parse("S10" + rest))
        assert _ends(path, parse("S01" + rest), parse("S10" + rest))


# -- right values -------------------------------------------------------------------------------


class _Mesh:
    """All ranks of a mesh; value and gradient are integers, so that sums are exact."""

    def __init__(self, mesh, shape):
        self.converter, self.shape = converter_of(mesh, "cpu"), shape
        self.mesh = self.converter.mesh
        self.world = Lockstep(self.mesh)
        generator = torch.Generator().manual_seed(0)
        self.x, self.weight = (
            torch.randint(-99, 99, shape, generator=generator).double() for _ in range(2)
        )
        self.shards = cache(self._shards)

    def _shards(self, which, dims, pending):
        """What each rank holds; of sums over `pending` axes, terms 3 x, -2 x and 0."""
        shards = []
        for coords in self.world.ranks:
            shard = shard_of(getattr(self, which), ShardingSpec(dims), self.mesh, coords)
            for axis in pending:
                shard = shard * (3, -2, *[0] * self.mesh[axis])[coords[axis]]
            shards.append(shard.contiguous())
        return shards

    def check(self, path, source, target):
        """Run the steps on all ranks, and the backward of sum(weight * value).

        Returns the bytes that a rank sends, forward and backward.
        """
        before = self.world.sent
        held = [t.clone().requires_grad_() for t in self.shards("x", source.dims, source.partial)]
        pairs = [(held, held)]
        for step in path:
            leaves = [t.detach().requires_grad_() for t in pairs[-1][1]]
            pairs.append((leaves, self.world.run(list(self._calls(step, leaves)))))
        for out, coords in zip(pairs[-1][1], self.world.ranks, strict=True):
            assert tuple(out.shape) == local_shape(self.shape, target, self.mesh, coords)
        self._compare("x", [t.detach() for t in pairs[-1][1]], target.dims, target.partial)
        grads = self.shards("weight", target.dims, target.varying)
        forward = self.world.sent - before
        for leaves, outs in reversed(pairs[1:]):
            calls = [
                partial(torch.autograd.grad, *rank, retain_graph=True)
                for rank in zip(outs, leaves, grads, strict=True)
            ]
            grads = [grad for (grad,) in self.world.run(calls)]
        self._compare("weight", grads, source.dims, source.varying)
        backward = self.world.sent - before - forward
        return forward / len(self.world.ranks), backward / len(self.world.ranks)

    def _calls(self, step, values):
        """The program's own call of the step, per rank."""
        for coords, x in zip(self.world.ranks, values, strict=True):
            group = self.world.names[coords][step.axis]
            function, rest = step_call(step, self.shape, self.mesh, coords, group)
            yield partial(function, x, *rest)

    def _compare(self, which, got, dims, pending):
        total: dict[tuple[int, ...], torch.Tensor] = {}
        key = [tuple(-1 if a in pending else c for a, c in enumerate(r)) for r in self.world.ranks]
        for k, t in zip(key, got, strict=True):
            total[k] = total[k] + t if k in total else t
        for k, right in zip(key, self.shards(which, dims, ()), strict=True):
            assert torch.equal(total[k], right)


STEPS = [
    ("2x2", ()), ("3", (7,)), ("2x2", (4, 6)), ("2x3", (5, 7)), ("4x2", (9, 4)), ("2x2x2", (5,)),
    ("2x2x2", (8, 5)), ("2x3x2", (5, 7)),
    ("2x2x2", (8, 9, 8, 9)),
]  # fmt: skip


def _some_steps(converter, shape, thorough):
    """The steps out of all specs, or a number of them by chance."""
    most = 400 if thorough else 100
    steps = [s for spec in converter.specs(shape) for s in converter.steps_from(shape, spec)]
    return random.Random(0).sample(steps, min(most, len(steps)))


@pytest.mark.parametrize(("mesh", "shape"), STEPS)
def test_every_step_gives_the_right_shards_and_gradients(mesh, shape, thorough):
    """All steps out of all specs, or a sample of them; sizes that do not divide among them."""
    simulated = _Mesh(mesh, shape)
    steps = _some_steps(simulated.converter, shape, thorough)
    assert len(steps) > 3
    for step in steps:
        simulated.check([step], step.source, step.target)


@pytest.mark.parametrize(("mesh", "shape"), [("2x4", (8, 16)), ("2x3x2", (12, 24)), ("8", (8, 8))])
def test_every_step_is_charged_for_the_bytes_it_sends(mesh, shape, thorough):
    """Prices of a microsecond per byte sent and nothing else; sizes that divide."""
    simulated = _Mesh(mesh, shape)
    cluster = ClusterInfo.of(mesh, "cpu")
    device = replace(cluster.device, launch_us=0.0, bandwidth=1e99)
    links = (Link(1e-99, 1e-6),) * len(cluster.mesh)
    converter = LayoutConverter(replace(cluster, device=device, links=links))
    seen = set()
    for step in _some_steps(converter, shape, thorough):
        sent = simulated.check([step], step.source, step.target)
        assert converter.step_us(shape, 8, step) == pytest.approx(sent), str(step)
        seen.add(step.kind)
    assert seen == set(KINDS)


def _ends(path, source, target):
    """Whether the steps lead from source to target."""
    places = [source, *(s.target for s in path)]
    return places[-1] == target and [s.source for s in path] == places[:-1]


@pytest.mark.parametrize("shape", [(), (5,), (7, 4), (6, 3, 16)])
def test_the_steps_of_every_path_chain(shape):
    """All pairs on three axes. With the test of every step, all conversions are right."""
    converter = converter_of("2x2x2")
    specs = converter.specs(shape)
    costs = converter.costs_us(shape, 4, specs, specs)
    known = {(s.source, s.target): s for x in specs for s in converter.steps_from(shape, x)}
    for (i, source), (j, target) in itertools.product(enumerate(specs), repeat=2):
        if np.isfinite(costs[i, j]):
            path = converter.path(shape, 4, source, target)
            assert _ends(path, source, target)
            assert all(known[step.source, step.target] == step for step in path)
        else:
            assert set(source.varying) - set(target.varying)


@pytest.mark.parametrize(
    ("mesh", "shape", "count"),
    [("2x2", (5, 7), None), ("2x2x2", (6, 8, 5), 100), ("2x3x2", (5, 7, 12), 40),
     ("2x2x2", (2, 3, 4, 5), 75)],
)  # fmt: skip
def test_paths_give_the_right_shards_and_gradients(mesh, shape, count, thorough):
    simulated = _Mesh(mesh, shape)
    count = count if thorough else (count or 400) // 4
    for source, target in _reachable(simulated.converter.specs(shape), count, 1):
        simulated.check(simulated.converter.path(shape, 8, source, target), source, target)
