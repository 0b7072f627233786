"""Sharding and scheduling as one decision."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autopar import ClusterInfo, ShardingPlan, autoplan
from autopar.cluster.link import Link
from autopar.compile import compile_first_rank, plan_step
from autopar.errors import InfeasibleError
from autopar.passes.local_step import untraced_step
from autopar.planner import joint
from autopar.planner.estimate import estimate_memory
from autopar.planner.explain import explain
from autopar.planner.joint import EVEN, plan_jointly
from autopar.planner.planner import PlanningProblem, build_problem
from autopar.progress import Deadline
from autopar.report.html import render_html
from autopar.report.text import render
from autopar.schedule.program import Program
from autopar.schedule.simulate import peak_bytes
from tests.clusters import eager_to_shard
from tests.models import CASES


@pytest.fixture(scope="module")
def problem() -> PlanningProblem:
    """An MLP on two devices whose link is neither free nor forbidding."""
    cluster = ClusterInfo.of("2", "cpu")
    device = replace(cluster.device, peak_flops={"float32": 1e9}, bandwidth=1e8, launch_us=0.1)
    links = (Link(1e-6, 1 / 1e8),)
    torch.manual_seed(0)
    return build_problem(
        CASES["mlp"].build(), (), CASES["mlp"].batch(0),
        cluster=replace(cluster, device=device, links=links),
    )  # fmt: skip


def within(problem: PlanningProblem, budget: float) -> PlanningProblem:
    return replace(problem, budget_bytes=budget)


def test_where_memory_does_not_bind_nothing_is_scheduled(problem):
    joint = plan_jointly(within(problem, math.inf))
    assert joint.memory is None and joint.planned.plan.step is None
    assert joint.planned.plan.choices == problem.planned(problem.decide()).plan.choices


def test_the_joint_plan_is_no_slower_than_sharding_first_and_fits(problem):
    free = problem.decide(math.inf)
    needed = estimate_memory(problem.space, free.choices).total_bytes
    with pytest.raises(InfeasibleError, match=r"parameters take .* Give ") as error:
        plan_jointly(within(problem, 1000.0))
    smallest = error.value.smallest_bytes
    assert smallest < needed
    scheduled = 0
    for budget in (smallest, (smallest + needed) / 2):
        joint = plan_jointly(within(problem, budget))
        if joint.memory is None:  # everything is kept, at hardly any cost
            assert joint.planned.plan.memory.total_bytes <= budget
            assert joint.planned.plan.time.step_us <= (1 + EVEN) * free.step_us
            continue
        scheduled += 1
        first, best = joint.tried[0], min(t.step_us for t in joint.tried if t.added_us >= 0)
        assert first.plan_us == pytest.approx(free.step_us) and best <= first.step_us
        plan = joint.planned.plan
        assert plan.time.step_us == pytest.approx(best)
        assert plan.memory.total_bytes <= budget
        assert plan.step.peak_bytes == peak_bytes(joint.step.program, joint.memory.schedule)
        assert not plan.reshard_after_forward
    assert scheduled


def test_the_budget_is_an_argument_that_the_plan_records():
    torch.manual_seed(0)
    model, batch = CASES["mlp"].build(), CASES["mlp"].batch(0)
    cluster = ClusterInfo.of("2", "A100-80G")
    free = autoplan(model, (), batch, cluster=cluster).plan
    budget = free.memory.total_bytes * 0.9
    by_argument = autoplan(model, (), batch, cluster=cluster, budget_bytes=budget)
    by_memory = autoplan(model, (), batch, cluster=cluster, memory=budget).plan
    assert by_argument.plan.budget_bytes == by_memory.budget_bytes == budget
    assert by_argument.plan.choices == by_memory.choices != free.choices
    stepwise = plan_step(model, (), batch, cluster=cluster, budget_bytes=budget).planned.plan
    assert stepwise.memory.total_bytes <= budget == stepwise.budget_bytes
    # an alternative has to fit as well
    for a in explain(by_argument, next(iter(free.parameters))).alternatives:
        assert a.memory_bytes <= budget or math.isinf(a.step_us)


def test_the_step_is_compiled_with_the_schedule_of_its_plan(problem, caplog):
    caplog.set_level("INFO", "autopar")
    torch.manual_seed(0)
    cluster = replace(problem.space.cluster, host_link=Link(1e-9, 1e-15))
    model, batch = CASES["mlp"].build(), CASES["mlp"].batch(0)
    joint = plan_step(model, (), batch, cluster=cluster, budget_bytes=14e3)
    assert joint.step.program.parameters  # they could be on the host for a part of the step
    assert compile_first_rank(joint).memory.schedule == joint.memory.schedule
    assert "scheduled again" not in caplog.text
    other = Program((), (), (), frozenset(), frozenset())
    compile_first_rank(replace(joint, step=replace(joint.step, program=other)))
    assert "scheduled again" in caplog.text


def test_a_plan_with_its_step_is_json_and_a_page(problem):
    plan = plan_jointly(within(problem, 2.0**40), always=True).planned.plan
    assert ShardingPlan.from_json(plan.to_json()) == replace(plan, mesh=plan.mesh)
    assert json.loads(plan.to_json())["plan"]["step"]["added_us"] == 0
    assert "From forward to backward" in render(plan)
    page = render_html(plan)
    assert "Memory over the step" in page and "kept from the forward" in page


class Classifier(nn.Module):
    """A body that is expensive to recompute, and a loss over many classes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024))
        self.head = nn.Linear(1024, 32000)

    def forward(self, x, labels):
        logits = self.head(self.body(self.body(self.body(x))))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _classified(budget: float) -> ShardingPlan:
    with torch.device("meta"):
        model, x = Classifier(), torch.empty(4, 2048, 1024)
        labels = torch.empty(4, 2048, dtype=torch.int64)
    cluster = ClusterInfo.of("1", "H100").with_memory(budget)
    plan = plan_step(model, (x, labels), cluster=cluster).planned.plan
    assert plan.memory.total_bytes <= budget
    return plan


def test_slices_take_the_place_of_much_recomputation(monkeypatch):
    """Also where the step fits by recomputation alone."""
    sliced = _classified(2800 * 2**20)
    monkeypatch.setattr("autopar.planner.joint.split_step", lambda *_: None)
    whole = _classified(2800 * 2**20)
    assert not whole.time_splits and whole.step.added_us > 0.03 * whole.step.us
    assert sliced.time_splits and sliced.step.added_us < 0.5 * whole.step.added_us


@pytest.mark.parametrize("budget", [2500, 2400, 2000])
def test_slices_fit_what_recomputation_does_not(budget):
    """Also where the loss as a sum and a count would fit by itself."""
    assert _classified(budget * 2**20).time_splits


def test_a_plan_that_fits_is_not_lost_when_time_ends(problem, monkeypatch):
    """The fastest plan is scheduled first, and time is over before the one that fits is."""
    needed = estimate_memory(problem.space, problem.decide(math.inf).choices).total_bytes
    now = [0.0]
    deadline = Deadline(60.0, clock=lambda: now[0])
    limited = replace(within(problem, 0.96 * needed), deadline=deadline)
    add = joint._Trials.add

    def slow(trials, limit, result):
        add(trials, limit, result)
        trial = replace(trials.best.trial, added_us=1e9)
        trials.best = replace(trials.best, trial=trial)
        now[0] = math.inf

    fitting = limited.decide(limited.budget_bytes)
    monkeypatch.setattr(joint._Trials, "add", slow)
    monkeypatch.setattr(joint, "EVEN", -1.0)  # the plan that fits is not taken at once
    plan = plan_jointly(limited).planned.plan
    assert plan.time.step_us == pytest.approx(fitting.step_us)
    assert plan.memory.total_bytes <= limited.budget_bytes


class Experts(nn.Module):
    """A mixture whose experts are slices of two weights, written with einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 30, 50))
        self.second = nn.Parameter(torch.randn(4, 50, 30))
        self.gate, self.head = nn.Linear(30, 4), nn.Linear(30, 10)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        scores = self.gate(x).softmax(-1)
        top = scores.topk(2, -1)
        gates = torch.zeros_like(scores).scatter(-1, top.indices, top.values)
        inside = torch.einsum("bd,edh->ebh", x, self.first).relu()
        outputs = torch.einsum("ebh,ehd->ebd", inside, self.second)
        logits = self.head(x + torch.einsum("be,ebd->bd", gates, outputs))
        return F.cross_entropy(logits, y)


@pytest.mark.parametrize("budget", [125_000, 140_000, 157_124, 170_000, 185_000])
def test_a_plan_that_is_taken_without_a_schedule_has_one(budget):
    """Conversions hold more than estimates know: such plans are scheduled first."""
    with torch.device("meta"):
        model, x = Experts().double(), torch.zeros(12, 30, dtype=torch.float64)
        y = torch.zeros(12, dtype=torch.long)
    cluster = eager_to_shard("2x2", overlaps=True)
    joint = plan_step(model, (x, y), cluster=cluster, memory=budget)
    compiled = compile_first_rank(joint)
    assert compiled.plan.memory.total_bytes <= budget


@pytest.mark.parametrize("budget", [160_000, 180_000])
def test_ranks_gather_parts_of_uneven_dims_by_the_same_operators(budget):
    """101 rows are 51 and 50 on the outer axis, of which 50 are even on the inner one."""
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Linear(101, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 101)
        )
        x = torch.zeros(64, 101)
    cluster = eager_to_shard("2x2", overlaps=True)
    planned = plan_step(model, (x,), cluster=cluster, memory=budget).planned
    trainable = planned.space.workload.trainable
    signatures = set()
    for coords in itertools.product(range(2), range(2)):
        step = untraced_step(
            planned.graph, planned.graph, planned.plan, trainable, None, coords=coords
        )
        signatures.add(step.local().program.signature)
    assert "S01" in "".join(planned.plan.parameters.values())
    assert len(signatures) == 1


@pytest.mark.parametrize("padding", [0, 1])
def test_ranks_fetch_halos_by_the_same_operators(padding):
    """Those at a border have fewer neighbours, and rows of padding."""
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=padding), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(8, 4, 3, padding=padding),
        )  # fmt: skip
        x = torch.zeros(2, 3, 34, 34)
    split = {"0": "RRS0R", "3": "RRS0R"}
    planned = autoplan(model, (x,), cluster=ClusterInfo.of("4"), constraints=split)
    trainable = planned.space.workload.trainable
    signatures = set()
    for rank in range(4):
        step = untraced_step(
            planned.graph, planned.graph, planned.plan, trainable, None, coords=[rank]
        )
        signatures.add(step.local().program.signature)
    assert len(signatures) == 1
