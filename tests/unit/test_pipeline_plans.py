"""Plans of microbatches and pipelines: what is chosen, said and refused, without processes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from autopar.cli.app import app
from autopar.cluster.cluster import ClusterInfo
from autopar.compile import plan_batch
from autopar.errors import ConstraintError, InfeasibleError, MeshError, PlanError
from autopar.passes.time_split import NotSeparableError
from autopar.plan import ShardingPlan
from autopar.planner.estimate import optimizer_us
from autopar.planner.mesh_search import pipeline_meshes, search_meshes
from autopar.planner.pipeline_blocks import operator_chain
from autopar.planner.stage_names import firsts_of, layout_of
from autopar.planner.stages import schedule_of
from autopar.report.pipeline import pipeline_trace, timeline_figure, timeline_of
from autopar.report.text import render

LAYERS = 8


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Blocks between an embedding and a head, which may be tied."""

    def __init__(self, width: int = 512, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids, labels):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


class Total(nn.Module):
    def forward(self, x):
        return x.pow(2).mean()


def batch(samples: int = 32) -> dict[str, torch.Tensor]:
    ids = torch.zeros(samples, 128, dtype=torch.int64, device="meta")
    return {"ids": ids, "labels": ids}


def plan(mesh: str = "pipe=4", samples: int = 32, **options) -> ShardingPlan:
    with torch.device("meta"):
        model = Model()
    cluster = ClusterInfo.of(mesh, "A100-80G")
    return plan_batch(model, (), batch(samples), cluster=cluster, **options).plan


@pytest.fixture(scope="module")
def chosen() -> ShardingPlan:
    return plan()


def test_stages_share_the_work(chosen):
    pipeline = chosen.pipeline
    assert pipeline is not None and len(pipeline.stages) >= 4
    by_rank = [0.0] * 4
    for stage in pipeline.stages:
        by_rank[stage.rank] += stage.forward_us + stage.input_us + stage.weight_us
    assert max(by_rank) < 1.5 * sum(by_rank) / 4
    assert chosen.mesh == (1,) and chosen.microbatches == pipeline.microbatches > 4
    assert chosen.time.step_us == pytest.approx(pipeline.step_us)


def test_plans_are_data(chosen):
    assert ShardingPlan.from_json(chosen.to_json()) == chosen


def test_predictions_are_those_of_the_timeline(chosen):
    timeline = timeline_of(chosen.pipeline)
    assert timeline.step_us == pytest.approx(chosen.pipeline.step_us)
    assert timeline.peak_bytes == pytest.approx(chosen.pipeline.peak_bytes)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "interleaved", "zbv", "dualpipev"])
def test_what_is_fixed_is_kept(schedule):
    made = plan("pipe=2", schedule=schedule, microbatches=8)
    assert made.pipeline.schedule == schedule and made.microbatches == 8
    assert schedule_of(made.pipeline).microbatches == 8


def test_nothing_that_is_fixed_is_faster():
    free = plan("pipe=2", 16)
    for schedule in ("gpipe", "1f1b", "zbv"):
        for microbatches in (2, 4, 16):
            fixed = plan("pipe=2", 16, schedule=schedule, microbatches=microbatches)
            # layouts are the same on one device per stage; the free choice reads costs off lines
            assert free.pipeline.step_us < 1.02 * fixed.pipeline.step_us


def test_costs_of_the_chain_are_those_of_the_plan():
    with torch.device("meta"):
        model = Model()
    planned = plan_batch(
        model, (), batch(), cluster=ClusterInfo.of("2", "A100-80G"), microbatches=4
    )
    chain = operator_chain(planned.space, planned.choices)
    blocks = chain.between(chain.places)
    compute = sum(b.forward_us + b.input_us + b.weight_us for b in blocks)
    step = optimizer_us(planned.space, planned.choices)
    time = planned.plan.time
    assert 4 * compute + step == pytest.approx(time.compute_us, rel=0.02)
    assert 0 <= time.exposed_us < 0.1 * time.step_us
    assert len(chain.places) > LAYERS
    # the tied weight belongs to two blocks
    assert sum(bool(b.shares) for b in blocks) == 2


def test_stages_by_names():
    made = plan(stages="blocks.2,blocks.4,blocks.6", schedule="1f1b", microbatches=4)
    assert [s.first for s in made.pipeline.stages][1:] == ["blocks.2", "blocks.4", "blocks.6"]
    assert made.pipeline.layout == (
        "embed,blocks.0-blocks.1|blocks.2-blocks.3|blocks.4-blocks.5|blocks.6-blocks.7,norm,head"
    )
    again = plan(stages=made.pipeline.layout, schedule="1f1b", microbatches=4)
    assert again.pipeline == made.pipeline
    megatron = plan(stages="Ett|(tt|)*2,ttL".replace(",", ""), schedule="1f1b", microbatches=4)
    assert megatron.pipeline == made.pipeline


def test_layouts_of_cuts_within_a_block_are_names():
    with torch.device("meta"):
        model = Model()
    planned = plan_batch(model, (), batch(), cluster=ClusterInfo.of("1"), microbatches=2)
    within = firsts_of(planned.graph, "blocks.3.up")
    assert layout_of(planned.graph, within) is None
    assert layout_of(planned.graph, firsts_of(planned.graph, "blocks.3")) is not None


@pytest.mark.parametrize(
    "stages, message",
    [
        ("blocks.2,blocks.2,blocks.4", "does not come after"),
        ("blocks.9,blocks.2,blocks.4", "no module or operator 'blocks.9'; did you mean"),
        ("embed,blocks.2,blocks.4", "is the first of the model"),
        ("embed,blocks.0-blocks.6|norm,head|blocks.7", "order|in no stage|before"),
        ("blocks.2", r"cuts the model into 2 stages; on 4 ranks.*1f1b 4"),
    ],
)
def test_stages_that_cannot_be(stages, message):
    with pytest.raises((ConstraintError, PlanError), match=message):
        plan(stages=stages, schedule="1f1b", microbatches=4)


def test_bad_input_is_refused():
    with pytest.raises(PlanError, match="64 microbatches of a batch of 32 samples"):
        plan(microbatches=64)
    with pytest.raises(PlanError, match="no pipeline schedule 'fast'"):
        plan(schedule="fast")
    with pytest.raises(MeshError, match="name one of its axes pipe"):
        plan("4", schedule="1f1b")
    with pytest.raises(PlanError, match="cannot read the pipeline schedule"):
        plan(schedule="missing.csv")
    with pytest.raises(InfeasibleError, match="no pipeline of 4 ranks fits"):
        plan(memory="20MiB")


def test_more_ranks_than_places():
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x).sum()

    with pytest.raises(PlanError, match=r"ranks|stages"):
        plan_batch(Tiny(), (torch.zeros(8, 4),), cluster="pipe=8", microbatches=2)


def test_models_that_mix_samples():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    x = torch.zeros(8, 4)
    with pytest.raises(NotSeparableError, match=r"(?s)batch_norm.* at .*module 1.*independent"):
        plan_batch(model, (x,), cluster="pipe=2")
    with pytest.raises(PlanError, match="give it, as microbatches=8"):
        plan_batch(model, (x,), cluster="pipe=2", microbatch="independent")
    made = plan_batch(model, (x,), cluster="pipe=2", microbatch="independent", microbatches=2).plan
    assert made.microbatches == 2


def test_memory_makes_stages_recompute():
    needed = plan("pipe=2", schedule="1f1b", microbatches=8).memory.total_bytes
    made = plan("pipe=2", schedule="1f1b", microbatches=8, memory=0.8 * needed)
    assert made.memory.total_bytes <= 0.8 * needed
    assert any(stage.recomputed_bytes for stage in made.pipeline.stages)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_what_fits_is_within_the_budget_with_all_that_a_rank_holds(share):
    budget = share * plan("pipe=2").memory.total_bytes
    try:
        assert plan("pipe=2", memory=budget).memory.total_bytes <= budget
    except InfeasibleError as error:
        assert error.smallest_bytes > budget


def test_a_smaller_batch_fits_on_the_stages_of_a_larger_one():
    """They recompute block by block, as when the cuts are chosen."""
    options = {"schedule": "1f1b", "microbatches": 4}
    first = plan("pipe=2", **options)
    budget = 0.75 * first.memory.total_bytes
    larger = plan("pipe=2", memory=budget, **options)
    assert any(stage.recomputed_bytes for stage in larger.pipeline.stages)
    stages = ",".join(stage.first for stage in larger.pipeline.stages[1:])
    for samples in (32, 30):
        same = plan("pipe=2", samples, memory=budget, stages=stages, **options)
        assert same.pipeline.firsts == larger.pipeline.firsts
        assert same.memory.total_bytes <= budget


def test_layers_of_equal_width_are_cut_between_them():
    """No place between them is narrower than another."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)), Total())
    x = torch.empty(2048, 512, device="meta")
    made = plan_batch(model, (x,), {}, cluster=ClusterInfo.of("pipe=2", "A100-80G")).plan
    states = [0.0, 0.0]
    for stage in made.pipeline.stages:
        states[stage.rank] += stage.state_bytes
    assert states[0] == states[1]


def test_microbatches_fit_less_memory():
    with torch.device("meta"):
        model = Model()
    cluster = ClusterInfo.of("2", "A100-80G")
    whole = plan_batch(model, (), batch(), cluster=cluster, microbatches=1).plan
    budget = 0.6 * whole.memory.total_bytes
    made = plan_batch(model, (), batch(), cluster=cluster, memory=budget).plan
    assert made.microbatches > 1 and made.memory.total_bytes <= budget


def test_a_schedule_from_a_file(tmp_path):
    file = tmp_path / "order.csv"
    file.write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    made = plan("pipe=2", schedule=str(file), microbatches=2)
    assert "0F0 0F1 0B0 0B1" in made.pipeline.schedule
    assert len(made.pipeline.stages) == 2
    assert plan("pipe=2", schedule=str(file)).microbatches == 2
    with pytest.raises(PlanError, match="is for 2 microbatches"):
        plan("pipe=2", schedule=str(file), microbatches=4)
    file.write_text("0B0,0F0\n1F0,1B0\n")
    with pytest.raises(PlanError, match="waits"):
        plan("pipe=2", schedule=str(file), microbatches=1)


def test_reports_show_the_stages(chosen):
    text = render(chosen)
    assert "Pipeline" in text and "Ranks are idle for" in text and "--stages" in text
    assert "pipe=4: 4 x A100-80G" in text
    figure = timeline_figure(chosen.pipeline)
    assert {bar.name for bar in figure.data} & {"forward"}
    assert {y for bar in figure.data for y in bar.y} == {f"rank {r}" for r in range(4)}
    events = pipeline_trace(chosen.pipeline)["traceEvents"]
    end = max(e["ts"] + e["dur"] for e in events if e["ph"] == "X")
    assert math.isfinite(end) and end <= chosen.pipeline.step_us * 1.0001


def test_the_command(tmp_path):
    file = tmp_path / "model.py"
    file.write_text(
        "import torch\nfrom torch import nn\n"
        "def build_model():\n"
        "    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))\n"
        "def example_inputs():\n    return (torch.zeros(16, 64),)\n"
    )
    out, page, trace = tmp_path / "p.json", tmp_path / "p.html", tmp_path / "t.json"
    result = CliRunner().invoke(
        app,
        ["plan", str(file), "--mesh", "pipe=2,data=2", "--schedule", "1f1b", "--microbatches", "4",
         "--stages", "3", "-o", str(out), "--report", str(page), "--trace", str(trace)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    made = ShardingPlan.load(out)
    assert made.pipeline.ranks == 2 and made.microbatches == 4
    assert "Timeline of the stages" in page.read_text()
    names = {
        e["args"]["name"] for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "M"
    }
    assert {"pipeline rank 0", "pipeline rank 1"} <= names
    wrong = CliRunner().invoke(app, ["plan", str(file), "--mesh", "4", "--stages", "3"])
    assert wrong.exit_code == 2 and "name one of its axes pipe" in wrong.output


def test_a_search_over_meshes_looks_at_pipelines():
    with torch.device("meta"):
        model = Model()
    found = search_meshes(
        model, (), batch(), devices=4, device="A100-80G", pipelines=True, time_limit=600
    ).plan
    steps = {m.text: m.step_us for m in found.meshes}
    assert set(steps) == {"4", "2x2", "pipe=2,2", "pipe=4,1"}
    assert found.time.step_us == pytest.approx(min(steps.values()))
    assert steps["pipe=2,2"] == pytest.approx(
        plan_batch(
            model, (), batch(), cluster=ClusterInfo.of("pipe=2,axis1=2", "A100-80G")
        ).plan.time.step_us
    )


def test_pipeline_meshes_begin_within_a_node():
    shapes = list(pipeline_meshes(64, 8))
    assert shapes[:3] == [(2, (4, 8)), (4, (2, 8)), (8, (8,))]
    assert len(shapes) == len(set(shapes))
    assert all(pipe * math.prod(shape) == 64 for pipe, shape in shapes)
