"""The passes on lowered programs: what is saved, gathered again, bucketed; verify finds faults."""

import itertools
from collections import Counter
from functools import partial

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from autopar import ClusterInfo, ShardingPlan, autoplan
from autopar.comm.async_collectives import numbers_of
from autopar.comm.groups import planning_groups
from autopar.ir.aliasing import storages
from autopar.passes.add_at_index import add_at_index
from autopar.passes.apply_sharding import LocalProgram, apply_sharding
from autopar.passes.lower import LoweredStep
from autopar.passes.pipeline import PIPELINE
from autopar.passes.runner import pass_name
from autopar.passes.verify import VerifyError, collective_signature, propagate_shapes, verify
from autopar.planner.baselines import baseline_plans
from autopar.planner.planner import Planned, make_plan
from autopar.runtime.distribute import shard_of
from tests.lockstep import Lockstep
from tests.lowering import graphs_of
from tests.models import CASES

MESH = (4,)
ops = torch.ops.autopar


@pytest.fixture(scope="module")
def planned() -> Planned:
    case = CASES["mlp"]
    return autoplan(case.build(), (), case.batch(0), cluster=ClusterInfo.of("4", "A100-40G"))


def by_expert(planned: Planned, name: str) -> ShardingPlan:
    expert = next(e for e in baseline_plans(planned.space) if e.name.startswith(name))
    return make_plan(planned.space, expert.choices, name)


def program(planned: Planned, plan: ShardingPlan, coords=None) -> LocalProgram:
    coords = coords or (0,) * len(plan.mesh)
    groups = planning_groups(plan.mesh, coords)
    return apply_sharding(planned.graph, plan, coords=coords, groups=groups)


def arguments(planned: Planned, plan: ShardingPlan, local: LocalProgram) -> list[torch.Tensor]:
    case = CASES["mlp"]
    whole, specs = dict(case.build().named_parameters()), plan.parameter_specs()
    first = (0,) * len(plan.mesh)
    shards = [
        shard_of(whole[n].detach(), specs[n], plan.mesh, first).clone().requires_grad_()
        for n in planned.graph.parameters.values()
    ]
    batch = zip(case.batch(0).values(), local.input_specs, strict=True)
    return shards + [shard_of(x, spec, plan.mesh, first).contiguous() for x, spec in batch]


def lowered(planned: Planned, plan: ShardingPlan, disable=(), **options) -> LoweredStep:
    """Its graphs, with a node per collective."""
    local = program(planned, plan)
    names = list(planned.graph.parameters.values())
    reshard = frozenset(names.index(n) for n in plan.reshard_after_forward)
    return graphs_of(
        local.gm,
        arguments(planned, plan, local),
        disable=frozenset({"functional_collectives", *disable}),
        **{"reshard_after_forward": reshard, **options},
    )


def count(gm, target) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=target))


def rows_of_gradients(step: LoweredStep) -> Counter:
    """The operators in whose results gradients lie, none of which they have to themselves."""
    (grads,) = step.backward.graph.output_node().args
    where = storages(step.backward.graph)
    made = Counter(where[g] for g in grads if g is not None)
    assert all(shared > 1 for shared in made.values())
    return Counter(node.target for node, _ in made)


def test_gradient_reductions_are_bucketed(planned):
    plan = by_expert(planned, "DDP")
    step = lowered(planned, plan)
    apart = lowered(planned, plan, disable={"bucket_collectives"})
    # one reduction per parameter becomes one for all
    assert count(apart.backward, ops.all_reduce.default) == len(planned.graph.parameters)
    assert count(step.backward, ops.all_reduce.default) == 0
    assert rows_of_gradients(step) == {ops.all_reduce_many.default: 1}
    ahead = lowered(planned, plan, cluster=ClusterInfo.of("4", "A100-40G"))
    assert rows_of_gradients(ahead) == {ops.start_all_reduce_many.default: 1}
    (finish,) = ahead.backward.graph.find_nodes(
        op="call_function", target=ops.wait_in_place.default
    )
    (row,) = finish.args
    views = [n for n in row.users if n is not finish]
    assert views
    assert all(n > finish for n in views)  # nothing reads it before it is there


def test_gathers_and_scatters_of_weights_are_bucketed(planned):
    plan = by_expert(planned, "FSDP")
    step = lowered(planned, plan)
    apart = lowered(planned, plan, disable={"bucket_collectives"})
    for gm, alone in ((step.forward, apart.forward), (step.backward, apart.backward)):
        assert count(alone, ops.all_gather.default) > 1
        assert count(gm, ops.all_gather.default) == 0
        assert count(gm, ops.all_gather_many.default) == 1
    assert count(apart.backward, ops.reduce_scatter.default) > 1
    assert rows_of_gradients(step) == {ops.reduce_scatter_many.default: 1}


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(
    ("shapes", "dims"), [([(5, 3), (4,), (2, 3, 5)], (0, 0, 2)), ([(6,), (3, 2)], (0, 0))]
)
def test_a_row_holds_what_each_is_reduced_to(shapes, dims, halves):
    world = Lockstep((3,))
    torch.manual_seed(0)
    xs = [[torch.randn(shape) for shape in shapes] for _ in world.ranks]
    groups = [group for (group,) in world.names.values()]
    apart = [
        world.run(
            [partial(ops.reduce_scatter, x[k], dim, g) for x, g in zip(xs, groups, strict=True)]
        )
        for k, dim in enumerate(dims)
    ]

    def many(x: list[torch.Tensor], group: str) -> torch.Tensor:
        if not halves:
            return ops.reduce_scatter_many(x, dims, group)
        begun = ops.start_reduce_scatter_many(x, dims, group)
        return ops.finish_reduce_scatter_many(begun, dims, *numbers_of(shapes), group)

    calls = [partial(many, x, g) for x, g in zip(xs, groups, strict=True)]
    for rank, row in enumerate(world.run(calls)):
        assert torch.equal(row, torch.cat([results[rank].flatten() for results in apart]))


@pytest.mark.parametrize("name", ["DDP", "FSDP"])
def test_reductions_over_two_axes_are_bucketed_on_each(name):
    """What one axis sums is what the next one is to sum; where a weight is split over one of them,
    likewise."""
    case = CASES["mlp"]
    planned = autoplan(case.build(), (), case.batch(0), cluster=ClusterInfo.of("2x2", "A100-40G"))
    plan = by_expert(planned, name)
    step = lowered(planned, plan)
    apart = lowered(planned, plan, disable={"bucket_collectives"})
    kinds = ("all_reduce", "reduce_scatter", "all_gather")
    alone = sum(count(apart.backward, getattr(ops, kind).default) for kind in kinds)
    assert alone > len(planned.graph.parameters)
    assert not any(count(step.backward, getattr(ops, kind).default) for kind in kinds)
    many = sum(count(step.backward, getattr(ops, f"{kind}_many").default) for kind in kinds)
    assert 2 <= many <= 2 * len(kinds)


@pytest.mark.parametrize("bucketed", [False, True])
def test_collectives_are_under_way_while_others_compute(planned, bucketed):
    """On devices that communicate beside compute: a gather while the weight before it is used."""
    plan = by_expert(planned, "FSDP")
    disable = () if bucketed else ("bucket_collectives",)
    gpus = ClusterInfo.of("4", "A100-40G")
    step = lowered(planned, plan, cluster=gpus, disable=disable)
    for gm in (step.forward, step.backward):
        nodes = list(gm.graph.nodes)
        place = {n: k for k, n in enumerate(nodes)}
        starts = [n for n in nodes if str(n.target).startswith("autopar.start_")]
        assert starts
        assert not count(gm, ops.all_gather.default) + count(gm, ops.reduce_scatter.default)
        spans = [(place[n], place[min(n.users, key=place.__getitem__)]) for n in starts]
        gathers = [s for n, s in zip(starts, spans, strict=True) if "gather" in str(n.target)]
        assert sorted(gathers, key=lambda s: s[1]) == gathers  # started as they are needed
        assert len(gathers) == 1 if bucketed else len(gathers) > 1
        for (_, finished), (started, _) in itertools.pairwise(gathers):
            assert started <= finished + 2
        ahead = [any("mm" in str(n.target) for n in nodes[a:b]) for a, b in gathers[1:]]
        assert any(ahead) or bucketed


@pytest.mark.parametrize(("mesh", "group"), [("4", "/axis0"), ("2x2", "/all")])
def test_counts_start_early_and_losses_are_one_sum(mesh, group):
    case = CASES["mlp"]
    planned = autoplan(case.build(), (), case.batch(0), cluster=ClusterInfo.of(mesh, "A100-40G"))
    step = lowered(planned, by_expert(planned, "DDP"))
    calls = [n for n in step.forward.graph.nodes if n.op == "call_function"]
    sums = [n for n in calls if "autopar." in str(n.target)]
    start, finish, loss, complete = sums  # of the count and of the loss, over all axes
    assert start.target is loss.target is ops.start_all_reduce.default
    assert finish.target is complete.target is ops.finish_all_reduce.default
    assert start.args[2].endswith(group)
    assert loss.args[2].endswith(group)
    product = next(n for n in calls if "mm" in str(n.target))
    assert calls.index(start) < calls.index(product) < calls.index(finish) < calls.index(loss)


def test_zero3_gathers_again_and_keeps_no_gathered_weight(planned):
    plan = by_expert(planned, "FSDP")
    assert plan.reshard_after_forward
    again = lowered(planned, plan)
    kept = lowered(planned, plan, reshard_after_forward=frozenset())
    gathers = ops.all_gather_many.default
    assert count(kept.backward, gathers) == count(kept.backward, ops.all_gather.default) == 0
    assert count(again.backward, gathers) == count(again.forward, gathers) == 1
    assert count(kept.forward, gathers) == 1

    def saved_bytes(step: LoweredStep) -> int:
        values = step.backward.graph.find_nodes(op="placeholder")
        tensors = [n.meta["val"] for n in values if "tangents" not in n.name]
        return sum(t.numel() * t.element_size() for t in tensors)

    assert saved_bytes(again) < saved_bytes(kept)


def test_ranks_build_the_same_sequence_of_collectives(planned):
    for name in ("DDP", "FSDP", "Megatron"):
        plan = by_expert(planned, name)
        signatures = set()
        for rank in range(4):
            groups = planning_groups(MESH, (rank,))
            local = apply_sharding(planned.graph, plan, coords=(rank,), groups=groups)
            signatures.add(collective_signature(local.gm, groups))
        assert len(signatures) == 1
    other = program(planned, by_expert(planned, "DDP"))
    assert collective_signature(other.gm, planning_groups(MESH, (0,))) not in signatures


def test_verify_finds_a_shape_that_the_plan_did_not_foretell(planned):
    from torch._subclasses.fake_tensor import FakeTensorMode

    plan = by_expert(planned, "Megatron")
    local = program(planned, plan)
    real = arguments(planned, plan, local)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t.detach()) for t in real]
        verify(propagate_shapes(local.gm, fakes))
    node = next(n for n in local.gm.graph.nodes if n.op == "call_function" and n.meta.get("spec"))
    node.meta["local_shape"] = (1, 2, 3)
    with pytest.raises(VerifyError, match=r"gives the local shape \(1, 2, 3\)"):
        verify(local.gm)


def test_planning_groups_do_not_communicate(planned):
    plan = by_expert(planned, "DDP")
    local = program(planned, plan)
    with pytest.raises(RuntimeError, match="process group"):
        local.gm(*arguments(planned, plan, local))


def test_graphs_that_run_hold_functional_collectives(planned):
    """Each with its `wait_tensor`, and none of the operators that stood for them."""
    plan = by_expert(planned, "FSDP")
    local = program(planned, plan)
    gpus = ClusterInfo.of("4", "A100-40G")
    step = graphs_of(local.gm, arguments(planned, plan, local), cluster=gpus)
    for gm in (step.forward, step.backward):
        targets = [str(n.target) for n in gm.graph.nodes]
        assert not [t for t in targets if t.startswith("autopar.")]
        collectives = [t for t in targets if t.startswith("_c10d_functional.")]
        waits = collectives.count("_c10d_functional.wait_tensor.default")
        assert waits == len(collectives) - waits > 0


def test_passes_are_dumped_before_and_after(planned, tmp_path):
    plan = by_expert(planned, "DDP")
    local = program(planned, plan)
    graphs_of(local.gm, arguments(planned, plan, local), dump=tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    for stage, name in (("joint", "drop_views"), ("backward", "bucket_collectives")):
        for when in ("before", "after"):
            assert [n for n in names if n.startswith(stage) and n.endswith(f"{name}-{when}.py")]
    before = next(tmp_path.glob("backward-*-functional_collectives-before.py")).read_text()
    after = next(tmp_path.glob("backward-*-functional_collectives-after.py")).read_text()
    assert "autopar.all_reduce_many" in before
    assert "_c10d_functional.all_reduce" in after


def test_every_pass_has_a_reason_and_a_name_of_its_own():
    for stage in ("program", "joint", "split"):
        names = [pass_name(entry.run) for entry in PIPELINE if entry.stage == stage]
        assert len(set(names)) == len(names) > 0
    assert all(len(entry.reason) > 20 for entry in PIPELINE)


@pytest.mark.parametrize("dense", [True, False])
def test_what_is_scattered_into_zeros_and_added_is_scattered_into_the_other_term(dense):
    """If the other term is a tensor of its own, not one number for all elements."""

    def function(x, index):
        y = x.exp()
        picked = y.gather(1, index)
        return (picked * picked).sum() + (y * y if dense else y).sum()

    torch.manual_seed(0)
    x, index = torch.randn(6, 8, dtype=torch.float64), torch.randint(8, (6, 2))
    gm = make_fx(torch.func.grad(function), tracing_mode="fake")(x, index)
    expected = gm(x, index)
    add_at_index(gm)
    counts = Counter(n.target for n in gm.graph.nodes)
    torch.testing.assert_close(gm(x, index), expected, rtol=0, atol=0)
    assert counts[torch.ops.aten.scatter_add.default] == 1
    assert counts[torch.ops.aten.new_zeros.default] == (0 if dense else 1)
