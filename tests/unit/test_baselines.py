"""Baselines: they are what their names say, and never beat the solver."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from autopar.cluster.cluster import ClusterInfo
from autopar.compile import autoplan
from autopar.ir.spec import ShardingSpec
from autopar.plan_records import Baseline
from autopar.planner.baselines import BaselinePlan, baseline_plans
from autopar.planner.planner import Planned
from autopar.report.content import baselines_table
from tests.planning import Classifier, by_name


class Renormed(nn.Module):
    """An operator without a rule in the middle: every plan has to gather there."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(512, 512)
        self.last = nn.Linear(512, 512)

    def forward(self, x):
        return self.last(torch.renorm(self.first(x), 2, 0, 1.0)).sum()


def planned(mesh: str, *, width: int, batch: int, memory: str | None = None) -> Planned:
    with torch.device("meta"):
        model = Classifier(width)
    inputs = {"x": torch.zeros(batch, width), "y": torch.zeros(batch, dtype=torch.long)}
    cluster = ClusterInfo.of(mesh, "A100-40G")
    return autoplan(model, (), inputs, cluster=cluster, memory=memory)


def stored(result: Planned, baseline: BaselinePlan) -> dict[str, ShardingSpec]:
    return {
        result.graph.parameters[str(decision.node.target)]: decision.candidates[c].outputs[0]
        for decision, c in zip(result.space.decisions, baseline.choices, strict=True)
        if decision.kind == "parameter"
    }


def consumed(result: Planned, baseline: BaselinePlan) -> dict[str, ShardingSpec]:
    """Layout in which each linear uses its weight."""
    specs = {}
    for decision, c in zip(result.space.decisions, baseline.choices, strict=True):
        if decision.kind == "op" and str(decision.node.target) == "aten.linear.default":
            spec = decision.candidates[c].inputs[1]
            assert spec is not None
            specs[result.graph.info(decision.node).module + ".weight"] = spec
    return specs


@pytest.mark.parametrize("mesh", ["4", "2x2"])
@pytest.mark.parametrize(("width", "batch"), [(1024, 64), (1024, 4096), (64, 512)])
def test_the_solver_is_never_slower_than_a_baseline(mesh, width, batch):
    result = planned(mesh, width=width, batch=batch)
    baselines = baseline_plans(result.space)
    assert len(baselines) == (3 if mesh == "4" else 4)
    assert len({b.time.step_us for b in baselines}) > 1
    for baseline in baselines:
        assert baseline.memory.total_bytes <= result.plan.budget_bytes
        slack = 1 + result.plan.solver.gap + 1e-9
        assert result.plan.time.step_us <= baseline.time.step_us * slack, baseline.name
    assert result.plan.solver.objective_us == pytest.approx(result.plan.time.step_us)
    assert result.plan.solver.bound_us <= result.plan.time.step_us * (1 + 1e-12)


def test_data_parallelism_stores_and_uses_replicated_weights():
    result = planned("2x2", width=512, batch=256)
    baselines = baseline_plans(result.space)
    ddp, fsdp = by_name(baselines, "DDP"), by_name(baselines, "FSDP")
    assert all(spec.is_replicated for spec in stored(result, ddp).values())
    for baseline in (ddp, fsdp):
        # every rank uses the replicated weight for samples of its own
        assert {str(s) for s in consumed(result, baseline).values()} == {"RRV0V1"}
        assert baseline.time.compute_us < 0.6 * ddp_alone(result).time.compute_us
    assert all(spec.parts((2, 2)) == 4 for spec in stored(result, fsdp).values())
    assert stored(result, fsdp)["head.weight"] == ShardingSpec.parse("S01R")
    for kind in ("parameters_bytes", "gradients_bytes", "optimizer_bytes"):
        ratio = getattr(ddp.memory, kind) / getattr(fsdp.memory, kind)
        assert ratio == pytest.approx(4, rel=0.01)
    reshard_after_forward = {c.reshard_after_forward for c in chosen(result, fsdp, "parameter")}
    assert reshard_after_forward == {True}


def ddp_alone(result: Planned) -> BaselinePlan:
    """The same model on one device, as the only plan there is."""
    from autopar.planner.estimate import estimate_memory, estimate_time

    first = tuple(0 for _ in result.space.decisions)  # full replication comes first
    time = estimate_time(result.space, first)
    return BaselinePlan("one", first, time, estimate_memory(result.space, first))


def chosen(result: Planned, baseline: BaselinePlan, kind: str) -> list:
    pairs = zip(result.space.decisions, baseline.choices, strict=True)
    return [decision.candidates[c] for decision, c in pairs if decision.kind == kind]


def test_megatron_pairs_column_with_row_on_the_last_axis():
    result = planned("2x2", width=1024, batch=1024)
    baselines = baseline_plans(result.space)
    plain, sharded = (
        by_name(baselines, "Megatron TP, data"),
        by_name(baselines, "Megatron TP, FSDP"),
    )
    for baseline in (plain, sharded):
        used = consumed(result, baseline)
        assert used["blocks.0.up.weight"] == ShardingSpec.parse("S1RV0")
        assert used["blocks.1.down.weight"] == ShardingSpec.parse("RS1V0")
        for name, spec in used.items():
            assert spec.state(1) == stored(result, baseline)[name].state(1), name
    assert all(spec.state(0) == "R" for spec in stored(result, plain).values())
    assert all(spec.state(0) != "R" for spec in stored(result, sharded).values())
    assert sharded.memory.parameters_bytes < 0.6 * plain.memory.parameters_bytes


def test_an_operator_without_a_rule_costs_a_penalty_not_the_baseline():
    with torch.device("meta"):
        model = Renormed()
    cluster = ClusterInfo.of("4", "A100-40G")
    result = autoplan(model, (torch.zeros(2048, 512),), cluster=cluster)
    assert "aten.renorm.default" in " ".join(result.plan.unruled)
    for baseline in baseline_plans(result.space):
        assert baseline.time.step_us < 1e6
        assert math.isfinite(baseline.time.step_us)
    ddp = by_name(baseline_plans(result.space), "DDP")
    assert {str(s) for s in consumed(result, ddp).values()} == {"RRV0"}


def test_a_budget_that_a_baseline_exceeds_is_reported():
    result = planned("4", width=1024, batch=64, memory="150MiB")
    baselines = [Baseline(b.name, b.time, b.memory) for b in baseline_plans(result.space)]
    table = baselines_table(replace(result.plan, baselines=tuple(baselines)))
    assert table is not None and table.columns[-1] == "fits>"
    fits = {row[0]: row[-1] for row in table.rows}
    assert (fits["autopar"], fits["DDP"], fits["FSDP (ZeRO-3)"]) == ("yes", "NO", "yes")
    assert result.plan.memory.total_bytes <= 150 * 2**20


def test_one_device_has_no_baselines():
    assert baseline_plans(planned("1", width=64, batch=8).space) == []
