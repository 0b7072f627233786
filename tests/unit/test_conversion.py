"""Layout conversion: the known greedy example, exactness against brute force, real shards."""

import heapq
import itertools
import threading

import pytest
import torch

from autopar import ClusterInfo
from autopar.passes.apply_sharding import _Rank, _Rewriter
from autopar.runtime.distribute import shard_of
from autopar.runtime.groups import thread_groups
from autopar.sharding.conversion import LayoutConverter, all_specs, steps_from
from autopar.sharding.spec import ShardingSpec, chunk, local_shape

parse = ShardingSpec.parse


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


def test_greedy_reproduces_the_known_example():
    converter = LayoutConverter(ClusterInfo.of("2x4"))
    path = converter.heuristic(parse("S01RR"), parse("RS01R"))
    assert [str(s.target) for s in path] == ["S0RR", "RS0R", "RS01R"]


def _dijkstra(converter, shape, source, target):
    """Reference search over the same steps, written independently of the tables."""
    legal = set(all_specs(converter._legal(shape), converter.mesh))
    best, queue, tie = {source: 0.0}, [(0.0, 0, source)], itertools.count(1)
    while queue:
        cost, _, here = heapq.heappop(queue)
        if here == target:
            return cost
        if cost > best[here]:
            continue
        for step in steps_from(here, len(converter.mesh)):
            if step.target not in legal or (step.kind == "inject" and here.dims != target.dims):
                continue
            total = cost + sum(converter.step_us(shape, 4, step))
            if total < best.get(step.target, float("inf")):
                best[step.target] = total
                heapq.heappush(queue, (total, next(tie), step.target))
    return float("inf")


@pytest.mark.parametrize("shape", [(8, 12), (7, 4)])
def test_paths_are_the_exact_minimum_and_never_above_greedy(shape):
    converter = LayoutConverter(ClusterInfo.of("2x2", "H100"))
    specs = all_specs(converter._legal(shape), (2, 2))
    for source, target in itertools.product(specs, repeat=2):
        if source.varying:
            continue
        cost = converter.cost_us(shape, 4, source, target)
        assert cost == pytest.approx(_dijkstra(converter, shape, source, target))
        path = converter.path(shape, 4, source, target)
        total = sum(sum(converter.step_us(shape, 4, s)) for s in path)
        assert total == pytest.approx(cost)
        assert all(a.target == b.source for a, b in itertools.pairwise(path))
        if not (source.partial or target.partial or target.varying):
            greedy = converter.heuristic(source, target)
            if all(s.target in specs for s in greedy):
                price = sum(sum(converter.step_us(shape, 4, s)) for s in greedy)
                assert cost <= price * (1 + 1e-9)


def _hold(x: torch.Tensor, spec: ShardingSpec, mesh, coords) -> torch.Tensor:
    """A rank's value in a layout: its shard, and its term of pending sums (2 terms: 3x, -2x)."""
    local = shard_of(x, spec, mesh, coords).clone()
    for axis in spec.partial:
        local = local * (3.0 if coords[axis] == 0 else -2.0 / (mesh[axis] - 1))
    return local


@pytest.mark.parametrize("shape", [(4, 6), (5, 7)])
def test_every_conversion_gives_the_right_shards_and_gradients(shape):
    """Value and gradient of all pairs of specs on 2x2, on threads for ranks."""
    mesh = (2, 2)
    converter = LayoutConverter(ClusterInfo.of("2x2"))
    specs = all_specs(converter._legal(shape), mesh)
    pairs = [(a, b) for a, b in itertools.product(specs, repeat=2) if not a.varying or a == b]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    weight = torch.randn(shape, dtype=torch.float64, generator=generator)
    groups = thread_groups(mesh, prefix="conversion", timeout=60)
    errors: list[BaseException] = []

    def work(coords, names):
        try:
            rank = _Rank(mesh, coords, names, converter)
            for source, target in pairs:
                _check(rank, source, target)
        except BaseException as error:
            errors.append(error)

    def _check(rank, source, target):
        import torch.fx as fx

        rewriter = _Rewriter(None, None, rank, {})  # type: ignore[arg-type]
        value = rewriter.out.placeholder("x")
        for step in converter.path(shape, 8, source, target):
            value = rewriter._step(value, step, shape)
        rewriter.out.output(value)
        run = fx.GraphModule(torch.nn.Module(), rewriter.out)
        local = _hold(x, source, mesh, rank.coords).requires_grad_()
        out = run(local)
        assert tuple(out.shape) == local_shape(shape, target, mesh, rank.coords)
        if not target.partial:
            expected = shard_of(x, target, mesh, rank.coords)
            assert torch.allclose(out, expected, atol=1e-12), (str(source), str(target))
        # the loss sum(weight * x) has the gradient `weight`, held as the target's transpose is
        grad = shard_of(weight, target, mesh, rank.coords).clone()
        for axis in target.varying:
            grad = grad * (3.0 if rank.coords[axis] == 0 else -2.0)
        if target.varying and source == target:
            return
        out.backward(grad)
        expected = shard_of(weight, source, mesh, rank.coords)
        assert torch.allclose(local.grad, expected, atol=1e-12), (str(source), str(target))

    threads = [threading.Thread(target=work, args=item, daemon=True) for item in groups.items()]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    if errors:
        raise errors[0]
    assert len(pairs) > 200
