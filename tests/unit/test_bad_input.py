"""Numbers that no cluster has are refused by their key; a search out of time falls back."""

import math
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

import autopar.planner.planner
from autopar import ClusterInfo, ShardingPlan, autoplan
from autopar.cluster.data import plain
from autopar.cluster.device import DEVICES
from autopar.errors import InfeasibleError, MeshError
from autopar.plan_records import Baseline, MeshResult, ParetoPoint
from autopar.planner.baselines import baseline_plans
from autopar.planner.estimate import estimate_memory, estimate_time
from autopar.report.text import render
from tests.clusters import eager_to_shard
from tests.planning import BATCH, Net

GOOD = {
    "mesh": [2, 2],
    "device": plain(DEVICES["l4"]),
    "links": [{"alpha": 1e-5, "beta": 1e-10}, {"alpha": 1e-5, "beta": 1e-10}],
    "host_link": {"alpha": 1e-5, "beta": 1e-10},
    "memory_bytes": 1e9,
    "host_memory_bytes": 1e9,
}


@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf, "6e-6", None, True])
@pytest.mark.parametrize(
    ("key", "make"),
    [
        ("links[1].alpha", lambda v: {"links": [GOOD["links"][0], {"alpha": v, "beta": 1e-10}]}),
        ("links[0].beta", lambda v: {"links": [{"alpha": 1e-5, "beta": v}, GOOD["links"][1]]}),
        ("host_link.beta", lambda v: {"host_link": {"alpha": 1e-5, "beta": v}}),
        ("bandwidth", lambda v: {"device": GOOD["device"] | {"bandwidth": v}}),
        ("launch_us", lambda v: {"device": GOOD["device"] | {"launch_us": v}}),
        ("memory_bytes", lambda v: {"device": GOOD["device"] | {"memory_bytes": v}}),
        (
            "peak_flops[bfloat16]",
            lambda v: {"device": GOOD["device"] | {"peak_flops": {"float32": 1e12, "bfloat16": v}}},
        ),
        ("extra_ns[random]", lambda v: {"device": GOOD["device"] | {"extra_ns": {"random": v}}}),
    ],
)
def test_costs_that_are_none_are_refused_by_their_key(key, make, value):
    with pytest.raises(ValueError) as error:
        ClusterInfo.from_dict(GOOD | make(value))
    assert key in str(error.value)
    assert ("must be a number" in str(error.value)) == (not isinstance(value, float))
    assert ("write 6.0e-6" in str(error.value)) == isinstance(value, str)


def test_a_good_cluster_is_taken():
    cluster = ClusterInfo.from_dict(GOOD)
    assert ClusterInfo.from_dict(cluster.to_dict()) == cluster
    free = GOOD["links"][0] | {"alpha": 0.0}
    assert ClusterInfo.from_dict(GOOD | {"links": [free, free]}).links[0].alpha == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"links": [{"alpha": 1.0}, {"alpha": 1.0}]}, r"links\[0\] must have alpha and beta"),
        ({"links": [GOOD["links"][0]]}, "2 axes but 1 links"),
        ({"memory_bytes": math.nan}, "memory size must be positive"),
        ({"device": GOOD["device"] | {"peak_flops": {"bfloat16": 1e12}}}, "lacks float32"),
        (
            {"device": GOOD["device"] | {"flops_by_size": {"matmul.float32": [[1, math.nan]]}}},
            r"flops_by_size\[matmul.float32\]: .* must be positive",
        ),
        (
            {"device": GOOD["device"] | {"bytes_by_size": {"read": 3}}},
            r"bytes_by_size\[read\]: a curve is a list",
        ),
    ],
)
def test_other_bad_clusters(change, message):
    with pytest.raises(ValueError, match=message):
        ClusterInfo.from_dict(GOOD | change)


def test_mesh_sizes_are_numbers_of_devices():
    cluster = ClusterInfo.of("2x2")
    for size in (0, -2, 1.5):
        with pytest.raises(MeshError, match=r"mesh\[1\] must be a number of devices"):
            replace(cluster, mesh=(2, size))


# -- out of time --------------------------------------------------------------------------------


@pytest.fixture
def slow_search(monkeypatch):
    """A search that has found nothing when its time is up, as a search in a large space."""

    def search(space, *, budget_bytes, time_limit, **options):
        end = time.process_time() + time_limit  # limits are of processor time
        while time.process_time() <= end:
            pass
        raise InfeasibleError("out of time", budget_bytes=1.0, smallest_bytes=2.0)

    monkeypatch.setattr(autopar.planner.planner, "search", search)


def big() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))


X = (torch.zeros(64, 512),)


def test_out_of_time_a_baseline_stands_in_and_says_so(slow_search):
    lines: list[str] = []
    cluster = ClusterInfo.of("4", "H100")
    planned = autoplan(
        big(), X, cluster=cluster, memory="30MiB", time_limit=0.01, progress=lines.append
    )
    baselines = baseline_plans(planned.space)
    fits = [b for b in baselines if b.memory.total_bytes <= planned.plan.budget_bytes]
    assert 0 < len(fits) < len(baselines)
    best = min(fits, key=lambda e: e.time.step_us)
    method = f"baseline {best.name}: 0.01 s were too short to find a plan"
    assert planned.plan.solver.method == method
    assert method in lines
    assert method in " ".join(render(planned.plan).split())
    assert planned.plan.time == estimate_time(planned.space, planned.choices)
    assert planned.plan.memory.total_bytes <= 30 * 2**20
    assert planned.plan.memory == estimate_memory(planned.space, planned.choices)
    assert planned.plan.solver.gap == 1.0


def test_the_baseline_satisfies_constraints(slow_search):
    cluster = ClusterInfo.of("4", "H100")
    planned = autoplan(big(), X, cluster=cluster, time_limit=0.01, constraints={"0.weight": "RS0"})
    assert "baseline" in planned.plan.solver.method
    assert planned.plan.parameters["0.weight"] == "RS0"


def test_no_baseline_fits_either(slow_search):
    with pytest.raises(InfeasibleError, match="out of time"):
        autoplan(big(), X, cluster=ClusterInfo.of("4", "H100"), memory="1KiB", time_limit=0.01)


def test_in_time_nothing_stands_in(monkeypatch):
    """A budget that is too small is an error, not a matter of time."""
    with pytest.raises(InfeasibleError, match="no plan fits"):
        autoplan(big(), X, cluster=ClusterInfo.of("4", "H100"), memory="1KiB")


# -- plan files ---------------------------------------------------------------------------------


def test_saved_plans_reload_bit_identically(tmp_path):
    """With everything in them that a plan can hold, awkward numbers included."""
    planned = autoplan(
        Net(), (), BATCH, cluster=eager_to_shard("2x2"), memory=1e6 / 3,
        constraints={"blocks.*.up.weight": "RS1 | S0R reshard"},
    )  # fmt: skip
    plan = replace(
        planned.plan,
        baselines=tuple(Baseline(b.name, b.time, b.memory) for b in baseline_plans(planned.space)),
        pareto_front=(
            ParetoPoint(math.inf, 0.1 + 0.2, 1 / 3, 1e-300),
            ParetoPoint(5e-324, 1.0, 2.0, 0.0),
        ),
        meshes=(MeshResult((4,), math.inf, 0.1, 7.0, "no plan fits"),),
        source="models/net.py",
    )
    plan.save(tmp_path / "a.json")
    again = ShardingPlan.load(tmp_path / "a.json")
    assert again == plan
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert render(again) == render(plan)
