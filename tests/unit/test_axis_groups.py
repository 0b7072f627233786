"""Meshes of many axes, some of which split alike."""

import numpy as np
import pytest
import torch

from autopar import ClusterInfo
from autopar.compile import autoplan
from autopar.ir.spec import ShardingSpec
from autopar.planner.axis_groups import axis_groups, groups_text, single_axes
from autopar.planner.planner import build_problem
from autopar.sharding.conversion.converter import LayoutConverter
from tests.planning import Classifier

MESH = "2x2x2x2x2"
CLUSTER = ClusterInfo.of(MESH, "A100-80G")
BATCH = {"x": torch.zeros(64, 32), "y": torch.zeros(64, dtype=torch.long)}


def groups_on(mesh: str, *layouts: str):
    cluster = ClusterInfo.of(mesh, "A100-80G")
    return axis_groups(cluster.mesh, cluster.links, map(ShardingSpec.parse, layouts))


def test_only_meshes_of_many_axes_have_groups():
    assert groups_on("2x4x2x2") == single_axes((2, 4, 2, 2)) == ((0,), (1,), (2,), (3,))
    assert groups_on("2x1x4x2x2") == ((0,), (2,), (3,), (4,))
    assert len(groups_on(MESH)) == 3


def test_neighbours_with_one_link_are_together_and_the_last_axis_is_free():
    cluster, groups = CLUSTER, groups_on(MESH)
    assert groups == ((0, 1), (2, 3), (4,))
    assert all(cluster.links[a] == cluster.links[b] for a, b in (groups[0], groups[1]))
    assert groups_text(groups) == "axes 0 and 1, and axes 2 and 3 split alike"


def test_axes_that_a_constraint_splits_differently_are_not_together():
    assert groups_on(MESH, "S0R", "S4R") == ((0,), (1,), (2, 3), (4,))
    assert groups_on(MESH, "S0S1", "S2S3R") == ((0,), (1,), (2,), (3,), (4,))


def test_the_number_of_candidates_does_not_grow_with_the_axes():
    def candidates(mesh: str) -> int:
        problem = build_problem(Classifier(32), (), BATCH, cluster=ClusterInfo.of(mesh))
        return sum(len(d.candidates) for d in problem.space.decisions)

    assert candidates("2x2x2x2x2") <= candidates("4x4x2") * 1.01
    assert candidates("2x2x2x2x2x2") <= candidates("4x4x4") * 1.01


@pytest.mark.parametrize("shape", [(32, 32), (32, 32, 32)])
def test_conversions_that_move_groups_exist_and_cost_little_more(shape):
    cluster, groups = CLUSTER, groups_on(MESH)
    full, grouped = LayoutConverter(cluster), LayoutConverter(cluster, groups=groups)
    few = len(grouped.specs(shape))
    assert few < len(full.specs(shape)) / 2
    rng = np.random.default_rng(0)
    states = ["R", "P", "V", *range(len(shape))]

    def drawn() -> ShardingSpec:
        dims, other = [()] * len(shape), {"R": (), "P": (), "V": ()}
        for group in groups:
            state = states[rng.integers(len(states))]
            if isinstance(state, int):
                dims[state] += group
            else:
                other[state] += group
        return ShardingSpec(tuple(dims), other["P"], other["V"])

    sources, targets = ([drawn() for _ in range(40)] for _ in range(2))
    exact, costs = (c.costs_us(shape, 4, sources, targets) for c in (full, grouped))
    assert (np.isfinite(exact) == np.isfinite(costs)).all() and np.isfinite(exact).any()
    assert (costs >= exact * (1 - 1e-9)).all()
    assert (costs[np.isfinite(costs)] <= 1.01 * exact[np.isfinite(exact)] + 1e-9).all()


def test_a_plan_says_which_axes_split_alike_and_obeys_constraints():
    lines: list[str] = []
    planned = autoplan(Classifier(32), (), BATCH, cluster=CLUSTER, progress=lines.append)
    assert planned.plan.solver.alike == "axes 0 and 1, and axes 2 and 3 split alike"
    assert any("optimum where axes 0 and 1" in line for line in lines)
    for spec in planned.plan.parameter_specs().values():
        assert spec.state(0) == spec.state(1) and spec.state(2) == spec.state(3)
    given = {"inputs.x": "S4R", "blocks.*.up.weight": "S0R"}
    plan = autoplan(
        Classifier(32), (), BATCH, cluster=CLUSTER, constraints=given, time_limit=3
    ).plan
    assert str(plan.parameter_specs()["blocks.0.up.weight"]) == "S0R"
    assert plan.solver.alike == "axes 2 and 3 split alike"


def test_other_meshes_have_no_groups():
    plan = autoplan(Classifier(32), (), BATCH, cluster="2x2x2").plan
    assert plan.solver.alike == ""
