"""The search over meshes equals planning on each of them."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from autopar import ClusterInfo, ShardingPlan, autoplan
from autopar.cluster.cluster import INFINIBAND, NVLINK
from autopar.errors import ConstraintError, InfeasibleError, MeshError
from autopar.planner.mesh_search import meshes, search_meshes


def model() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))


BATCH = (torch.zeros(64, 512),)


@pytest.mark.parametrize("devices", [1, 2, 7, 12, 30, 64])
def test_meshes_are_all_factorizations_in_order(devices):
    divisors = [d for d in range(2, devices + 1) if devices % d == 0]
    expected = {
        shape
        for axes in (1, 2, 3)
        for shape in itertools.product(divisors, repeat=axes)
        if math.prod(shape) == devices
    } or {(1,)}
    result = list(meshes(devices))
    assert len(result) == len(set(result))
    assert set(result) == expected
    assert [len(m) for m in result] == sorted(len(m) for m in result)
    assert all(len(m) <= 2 for m in meshes(devices, 2))


@pytest.mark.parametrize("memory", [None, "5.1MiB"])
@pytest.mark.parametrize("per_node", [8, 2])
def test_the_best_mesh_equals_exhaustive_enumeration(per_node, memory):
    result = search_meshes(
        model(), BATCH, devices=8, device="H100", per_node=per_node, memory=memory
    )
    steps = {}
    for shape in meshes(8):
        cluster = ClusterInfo.of(shape, "H100", node_size=per_node)
        try:
            plan = autoplan(model(), BATCH, cluster=cluster, memory=memory).plan
        except InfeasibleError:
            steps[shape] = math.inf
        else:
            steps[shape] = plan.time.step_us
    plan = result.plan
    assert plan.time.step_us == min(steps.values())
    assert steps[plan.mesh] == plan.time.step_us
    assert {t.mesh for t in result.plan.meshes} == set(steps)
    for t in result.plan.meshes:
        assert t.bound_us <= steps[t.mesh] * (1 + 1e-9)
        if math.isinf(t.step_us):  # passed over, rightly
            assert t.bound_us >= plan.time.step_us
        else:
            assert t.step_us == steps[t.mesh]
    assert plan.model == "Sequential"
    assert ShardingPlan.from_json(plan.to_json()) == plan


def test_bounds_pass_meshes_over():
    """Where nothing hides behind compute, the bound is nearly the step."""
    lines: list[str] = []
    layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96), nn.Linear(96, 64))
    batch = (torch.zeros(4096, 64, device="meta"),)
    result = search_meshes(layers, batch, devices=16, progress=lines.append)
    assert sum("mesh" in line and "..." in line for line in lines) == len(result.plan.meshes) == 7
    passed = [t for t in result.plan.meshes if t.note]
    assert passed
    for t in passed:
        assert t.note == "its bound is above the best"
        assert t.bound_us >= result.plan.time.step_us
        step = autoplan(layers, batch, cluster=ClusterInfo.of(t.mesh)).plan.time.step_us
        assert step >= result.plan.time.step_us


def test_nodes_decide_the_links():
    assert ClusterInfo.of("4x4", "H100", node_size=4).links == (INFINIBAND, NVLINK)
    assert ClusterInfo.of("4x4", "H100", node_size=16).links == (NVLINK, NVLINK)
    # two ranks of the outer axis share a node: rings along it leave by two ports
    assert ClusterInfo.of("4x4", "H100").links == (
        replace(INFINIBAND, ports=2.0, node_ranks=2, inside=NVLINK), NVLINK
    )  # fmt: skip


def test_nothing_fits_anywhere():
    with pytest.raises(InfeasibleError, match=r"the step needs .* Give at least ") as error:
        search_meshes(model(), BATCH, devices=4, memory="1KiB")
    least = error.value.smallest_bytes
    assert search_meshes(model(), BATCH, devices=4, memory=least).plan.memory.total_bytes <= least
    each = []
    for shape in meshes(4):
        with pytest.raises(InfeasibleError) as one:
            autoplan(model(), BATCH, cluster=ClusterInfo.of(shape), memory="1KiB")
        each.append(one.value.smallest_bytes)
    # plans that keep everything, by estimates that lack what their gathers hold
    assert least == pytest.approx(min(each), rel=0.05)


def test_constraints_that_name_an_axis_need_a_mesh_with_it():
    result = search_meshes(
        model(), BATCH, devices=4, device="H100", constraints={"0.weight": "S1R"}
    )
    assert result.plan.mesh == (2, 2)
    assert result.plan.parameters["0.weight"] == "S1R"
    assert [t.note for t in result.plan.meshes if t.mesh == (4,)] == ["lacks an axis"]
    with pytest.raises(ConstraintError, match="nothing is called 'x'"):
        search_meshes(model(), BATCH, devices=2, constraints={"x": "R"})


def test_bad_numbers():
    for options in ({"devices": 0}, {"devices": 4, "per_node": 0}):
        with pytest.raises(MeshError, match="at least one of each"):
            search_meshes(model(), BATCH, **options)
