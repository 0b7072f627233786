"""Mesh axes with names: reports say them, and nothing else depends on them."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from autopar import ClusterInfo, auto_engine, autoplan
from autopar.errors import ConstraintError, InfeasibleError, MeshError
from autopar.plan import ShardingPlan
from autopar.planner.constraints import Constraints
from autopar.planner.diff import diff
from autopar.planner.explain import explain
from autopar.planner.planner import Planned
from autopar.report.comparison import difference_tables, explanation_table
from autopar.report.html import render_html
from autopar.report.text import render
from autopar.units import mesh_text
from tests.clusters import eager_to_shard
from tests.models import CASES

CASE = CASES["mlp"]
meshes = st.sampled_from(["2", "4", "2x2", "4x2", "2x2x2"])
names = st.lists(st.from_regex(r"[A-Za-z_]\w{0,8}", fullmatch=True), min_size=3, unique=True)


def plan_on(cluster: ClusterInfo, constraints: Constraints | None = None) -> Planned:
    return autoplan(CASE.build(), (), CASE.batch(0), cluster=cluster, constraints=constraints)


@given(meshes, names)
@settings(max_examples=8, deadline=None)
def test_names_change_no_plan_and_no_time(mesh: str, axis_names: list[str]):
    cluster = eager_to_shard(mesh)
    named = replace(cluster, axis_names=tuple(axis_names[: len(cluster.mesh)]))
    plain, other = (plan_on(c).plan for c in (cluster, named))
    descriptions = [m.words for m in plain.modules]
    assert [m.words for m in other.modules] != descriptions
    renamed = tuple(replace(m, words=w) for m, w in zip(other.modules, descriptions, strict=True))
    same = {"modules": renamed, "cluster": plain.cluster, "solver": plain.solver}
    assert replace(other, **same) == plain
    assert other.solver.objective_us == plain.solver.objective_us


@given(st.lists(st.integers(1, 64), min_size=1, max_size=3), names)
def test_named_meshes_round_trip(sizes: list[int], axis_names: list[str]):
    text = mesh_text(sizes, axis_names[: len(sizes)])
    cluster = ClusterInfo.of(text, "H100")
    assert cluster.mesh_text == text
    assert ClusterInfo.from_dict(cluster.to_dict()) == cluster
    assert replace(cluster, axis_names=()) == ClusterInfo.of(sizes, "H100")


@pytest.fixture(scope="module")
def plan() -> ShardingPlan:
    cluster = replace(eager_to_shard("2x2"), axis_names=("node", "gpu"))
    return ShardingPlan.from_json(plan_on(cluster).plan.to_json())


def test_reports_say_the_names(plan):
    for report in (render(plan), render_html(plan)):
        assert "node=2,gpu=2: 4 x cpu" in report
        assert "axis 0" not in report and "axes 0" not in report and "axis 1" not in report
    assert " on node" in render(plan) or " and gpu" in render(plan)


def test_differences_and_errors_say_the_names(plan):
    unnamed = replace(plan, cluster=plan.cluster | {"mesh": [2, 2]})
    assert [c.after for c in diff(unnamed, plan).setting] == ["node=2,gpu=2"]
    with pytest.raises(InfeasibleError, match="on mesh node=2,gpu=2"):
        autoplan(
            CASE.build(), (), CASE.batch(0), cluster=ClusterInfo.of("node=2,gpu=2"), memory="100B"
        )
    with pytest.raises(MeshError, match="name all axes"):
        ClusterInfo.of("node=2,2")


def test_layouts_come_with_the_names_of_their_axes(plan):
    note = "Mesh axes in layouts: 0=node, 1=gpu."
    planned = plan_on(ClusterInfo.of("node=2,gpu=2"))
    name = next(iter(planned.plan.parameters))
    assert explanation_table(explain(planned, name, limit=0)).note.endswith(note)
    other = replace(plan, parameters={name: "S1R"})
    tables = difference_tables(diff(plan, other), every=True)
    assert {t.title for t in tables if t.note == note} >= {"Parameters"}
    with pytest.raises(ConstraintError, match="has axes 0=node, 1=gpu"):
        plan_on(ClusterInfo.of("node=2,gpu=2"), {name: "S7R"})


def test_the_engine_takes_a_named_mesh():
    model = CASE.build()
    engine, _ = auto_engine(model, torch.optim.SGD(model.parameters(), lr=0.1), "gpu=1")
    loss = engine(**CASE.batch(0))
    loss.backward()
    assert engine.plan.cluster["mesh"] == "gpu=1"
    assert next(iter(engine.parameters())).device_mesh.mesh_dim_names == ("gpu",)
