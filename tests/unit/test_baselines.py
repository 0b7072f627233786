"""Hand-written plans: they are what their names say, and never beat the solver."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autopar.cluster.cluster import ClusterInfo
from autopar.ir.spec import ShardingSpec
from autopar.planner.baselines import BaselinePlan, baseline_plans
from autopar.planner.planner import Planned, autoplan


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Classifier(nn.Module):
    def __init__(self, width: int, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 1000)

    def forward(self, x, y):
        return F.cross_entropy(self.head(self.blocks(x)), y)


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


def by_name(plans: list[BaselinePlan], prefix: str) -> BaselinePlan:
    return next(p for p in plans if p.name.startswith(prefix))


def stored(found: Planned, expert: BaselinePlan) -> dict[str, ShardingSpec]:
    return {
        found.graph.parameters[str(decision.node.target)]: decision.candidates[c].outputs[0]
        for decision, c in zip(found.space.decisions, expert.choices, strict=True)
        if decision.kind == "parameter"
    }


def consumed(found: Planned, expert: BaselinePlan) -> dict[str, ShardingSpec]:
    """Layout in which each linear uses its weight."""
    specs = {}
    for decision, c in zip(found.space.decisions, expert.choices, strict=True):
        if decision.kind == "op" and str(decision.node.target) == "aten.linear.default":
            spec = decision.candidates[c].inputs[1]
            assert spec is not None
            specs[found.graph.info(decision.node).module + ".weight"] = spec
    return specs


@pytest.mark.parametrize("mesh", ["4", "2x2"])
@pytest.mark.parametrize(("width", "batch"), [(1024, 64), (1024, 4096), (64, 512)])
def test_the_solver_is_never_slower_than_an_expert(mesh, width, batch):
    found = planned(mesh, width=width, batch=batch)
    experts = baseline_plans(found.space)
    assert len(experts) == (3 if mesh == "4" else 4)
    assert len({e.time.step_us for e in experts}) > 1
    for expert in experts:
        assert expert.fits
        slack = 1 + found.plan.solver.gap + 1e-9
        assert found.plan.time.step_us <= expert.time.step_us * slack, expert.name
    assert found.plan.solver.objective_us == pytest.approx(found.plan.time.step_us)
    assert found.plan.solver.bound_us <= found.plan.time.step_us * (1 + 1e-12)


def test_data_parallelism_stores_and_uses_whole_weights():
    found = planned("2x2", width=512, batch=256)
    experts = baseline_plans(found.space)
    ddp, fsdp = by_name(experts, "DDP"), by_name(experts, "FSDP")
    assert all(spec.is_replicated for spec in stored(found, ddp).values())
    for expert in (ddp, fsdp):
        # every rank uses the whole weight for samples of its own
        assert {str(s) for s in consumed(found, expert).values()} == {"RRV0V1"}
        assert expert.time.compute_us < 0.6 * ddp_alone(found).time.compute_us
    assert all(spec.parts((2, 2)) == 4 for spec in stored(found, fsdp).values())
    assert stored(found, fsdp)["head.weight"] == ShardingSpec.parse("S01R")
    for kind in ("parameters_bytes", "gradients_bytes", "optimizer_bytes"):
        ratio = getattr(ddp.memory, kind) / getattr(fsdp.memory, kind)
        assert ratio == pytest.approx(4, rel=0.01)
    reshard_after_forward = {c.reshard_after_forward for c in chosen(found, fsdp, "parameter")}
    assert reshard_after_forward == {True}


def ddp_alone(found: Planned) -> BaselinePlan:
    """The same model on one device, as the only plan there is."""
    from autopar.planner.estimate import estimate_memory, estimate_time

    first = tuple(0 for _ in found.space.decisions)  # full replication comes first
    time = estimate_time(found.space, first)
    return BaselinePlan("one", first, time, estimate_memory(found.space, first), True)


def chosen(found: Planned, expert: BaselinePlan, kind: str) -> list:
    pairs = zip(found.space.decisions, expert.choices, strict=True)
    return [decision.candidates[c] for decision, c in pairs if decision.kind == kind]


def test_megatron_pairs_column_with_row_on_the_last_axis():
    found = planned("2x2", width=1024, batch=1024)
    experts = baseline_plans(found.space)
    plain, sharded = by_name(experts, "Megatron TP, data"), by_name(experts, "Megatron TP, FSDP")
    for expert in (plain, sharded):
        used = consumed(found, expert)
        assert used["blocks.0.up.weight"] == ShardingSpec.parse("S1RV0")
        assert used["blocks.1.down.weight"] == ShardingSpec.parse("RS1V0")
        for name, spec in used.items():
            assert spec.state(1) == stored(found, expert)[name].state(1), name
    assert all(spec.state(0) == "R" for spec in stored(found, plain).values())
    assert all(spec.state(0) != "R" for spec in stored(found, sharded).values())
    assert sharded.memory.parameters_bytes < 0.6 * plain.memory.parameters_bytes


def test_an_operator_without_a_rule_costs_an_objection_not_the_expert():
    with torch.device("meta"):
        model = Renormed()
    cluster = ClusterInfo.of("4", "A100-40G")
    found = autoplan(model, (torch.zeros(2048, 512),), cluster=cluster)
    assert "aten.renorm.default" in " ".join(found.plan.unruled)
    for expert in baseline_plans(found.space):
        assert expert.time.step_us < 1e6
        assert math.isfinite(expert.time.step_us)
    ddp = by_name(baseline_plans(found.space), "DDP")
    assert {str(s) for s in consumed(found, ddp).values()} == {"RRV0"}


def test_a_budget_that_an_expert_exceeds_is_reported():
    found = planned("4", width=1024, batch=64, memory="150MiB")
    fits = {e.name: e.fits for e in baseline_plans(found.space)}
    assert fits["DDP"] is False
    assert fits["FSDP (ZeRO-3)"] is True
    assert found.plan.memory.total_bytes <= 150 * 2**20


def test_one_device_has_no_experts():
    assert baseline_plans(planned("1", width=64, batch=8).space) == []
