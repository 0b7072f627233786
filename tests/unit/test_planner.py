"""From module to plan: real sizes, memory limits, plan files."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autopar import ClusterInfo, ShardingPlan, autoplan
from autopar.errors import InfeasibleError, PlanError
from tests.models import CASES


def gpt2(layers: int = 2, vocabulary: int = 50257) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=layers, vocab_size=vocabulary, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.device("meta"):
        return GPT2LMHeadModel(config).train()


IDS = {"input_ids": torch.zeros(16, 128, dtype=torch.long)}
IDS["labels"] = IDS["input_ids"]


def test_an_uneven_vocabulary_is_split_when_memory_forbids_replicating_it():
    """50257 is prime to 2 and 4; the replicated embedding and its state take 617 MB."""
    planned = autoplan(gpt2(), (), IDS, cluster=ClusterInfo.of("2x4", "A100-40G"), memory="700MB")
    plan = planned.plan
    layout = plan.parameter_specs()["transformer.wte.weight"]
    assert layout.parts((2, 4)) >= 4
    assert plan.memory.total_bytes <= 700e6
    assert plan.solver.gap < 0.1
    held = {s.name: c for s, c in zip(planned.space.decisions, planned.choices, strict=True)}
    decision = next(
        s for s in planned.space.decisions if s.node.name == "embedding" and s.kind == "op"
    )
    used = decision.candidates[held["embedding"]].inputs[0]
    assert used.parts((2, 4)) > 1, "the lookup gathers the table"


def test_less_memory_never_costs_less_time_and_too_little_is_refused():
    """A tighter budget excludes plans, so the step cannot get faster."""
    cluster = ClusterInfo.of("4", "A100-40G")
    steps = [
        autoplan(gpt2(1), (), IDS, cluster=cluster, memory=m).plan.time.step_us
        for m in (None, "1200MB", "950MB")
    ]
    slack = 1.1  # up to the certified gap
    assert steps[0] <= steps[1] * slack
    assert steps[1] <= steps[2] * slack
    with pytest.raises(InfeasibleError, match="at least") as error:
        autoplan(gpt2(1), (), IDS, cluster=cluster, memory="50MB")
    smallest = error.value.smallest_bytes
    assert smallest > 50e6
    autoplan(gpt2(1), (), IDS, cluster=cluster, memory=1.3 * smallest)


class Wide(nn.Module):
    """Weights far larger than activations: tensor parallelism; and the reverse."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x))).square().mean()


@pytest.mark.parametrize(("width", "batch", "split"), [(8192, 8, True), (64, 65536, False)])
def test_the_solver_lands_on_the_known_plans(width, batch, split):
    """Small batch and wide layers: Megatron's column then row. Large batch: data parallel."""
    with torch.device("meta"):
        model = Wide(width)
    planned = autoplan(model, (torch.zeros(batch, width),), cluster=ClusterInfo.of("8", "A100-80G"))
    chosen = {s.name: c for s, c in zip(planned.space.decisions, planned.choices, strict=True)}
    names = {
        s.name: s.candidates[chosen[s.name]].name for s in planned.space.decisions if s.kind == "op"
    }
    assert names["linear"] == ("n" if split else "b1")
    assert names["linear_1"] == ("k" if split else "b1")
    assert (planned.plan.parameters["up.weight"] == "S0R") == split


def test_repeated_blocks_share_their_choices():
    """All but the first and the last, whose neighbours are others."""
    planned = autoplan(gpt2(5, 1024), (), IDS, cluster=ClusterInfo.of("2x2", "A100-40G"))
    layouts = planned.plan.parameters
    for name in ("attn.c_attn.weight", "mlp.c_fc.weight", "mlp.c_proj.weight", "ln_1.weight"):
        assert len({layouts[f"transformer.h.{i}.{name}"] for i in range(1, 4)}) == 1


def test_equal_classes_have_equal_costs():
    """Whatever the solver counts instead of adding is equal."""
    space = autoplan(gpt2(3, 1024), (), IDS, cluster=ClusterInfo.of("2x2", "A100-40G")).space
    first = {}
    for decision in space.decisions:
        same = first.setdefault(("costs", decision.cost_class), decision)
        assert decision.parts.keys() == same.parts.keys()
        for part, values in decision.parts.items():
            assert np.array_equal(values, same.parts[part])
        same = first.setdefault(("candidates", decision.candidates_class), decision)
        assert decision.candidates == same.candidates
    assert len(first) < len(space.decisions)  # copies of blocks
    for edge in space.edges:
        costs = space.edge_costs(edge)
        same = first.setdefault(("edge", costs.cost_class), costs)
        assert np.array_equal(costs.time_us, same.time_us)


@pytest.fixture(scope="module")
def plan():
    case = CASES["mlp"]
    return autoplan(case.build(), (), case.batch(0), cluster=ClusterInfo.of("2x2")).plan


def test_plan_files_round_trip(plan, tmp_path):
    path = tmp_path / "deep" / "plan.json"
    plan.save(path)
    again = ShardingPlan.load(path)
    assert again == plan
    assert again.to_json() == path.read_text()
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


def test_damaged_plan_files_are_refused(plan, tmp_path):
    text = plan.to_json()
    changed = json.loads(text)
    changed["plan"]["mesh"] = [4, 1]
    older = json.loads(text) | {"autopar_plan": 0}
    for content, message in [
        (text[: len(text) // 2], "truncated"),
        ("{}", "not an autopar plan"),
        (json.dumps(changed), "was changed"),
        (json.dumps(older), "format 0"),
    ]:
        path = tmp_path / "plan.json"
        path.write_text(content)
        with pytest.raises(PlanError, match=message):
            ShardingPlan.load(path)
    with pytest.raises(PlanError, match="cannot read"):
        ShardingPlan.load(tmp_path / "missing.json")


def test_plans_check_what_they_are_used_for(plan):
    plan.check(fingerprint=plan.fingerprint, mesh=(2, 2), model="MLP")
    with pytest.raises(PlanError, match="mesh 2x2"):
        plan.check(fingerprint=plan.fingerprint, mesh=(4,), model="MLP")
    with pytest.raises(PlanError, match="another graph"):
        plan.check(fingerprint="0" * 16, mesh=(2, 2), model="MLP")


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_a_model_without_parameters_has_a_plan():
    """Nothing communicates beside compute, and no bytes are alive."""
    planned = autoplan(Doubled(), (torch.ones(4, 4),), cluster=ClusterInfo.of("2", "H100"))
    assert "mul" in planned.plan.choices


def test_lowerings_pay_for_what_they_communicate_and_copy():
    """Half of the image's rows cost a halo, half of the normalized features statistics."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.LayerNorm(32))
    image = torch.zeros(4, 8, 32, 32, device="meta")
    space = autoplan(model, (image,), cluster=ClusterInfo.of("2", "A100-80G")).space
    for target, batch, inner in (("conv2d", "n", "s0"), ("layer_norm", "b2", "h0")):
        decision = next(
            s for s in space.decisions if target in str(s.node.target) and s.kind == "op"
        )
        times = dict(zip([c.name for c in decision.candidates], decision.time_us, strict=True))
        assert times[inner] > times[batch] + 2 * 1e6 * space.cluster.links[0].alpha


def test_nobody_pays_for_the_wait_for_a_sum_that_is_only_returned():
    """The mean over split samples is a pending sum: returned, its all-reduce is only started."""

    class Mean(nn.Module):
        def forward(self, x):
            return x.mean()

    class Exp(nn.Module):
        def forward(self, x):
            return x.exp()

    def sum_us(after: nn.Module) -> tuple[float, ClusterInfo]:
        model = nn.Sequential(nn.Linear(8, 8), Mean(), after)
        space = autoplan(model, (torch.zeros(16, 8),), cluster=ClusterInfo.of("2")).space
        edge = next(e for e in space.edges if space.decisions[e.source].node.name == "mean")
        before, after = (space.decisions[i].candidates for i in (edge.source, edge.target))
        partial = next(i for i, c in enumerate(before) if c.outputs[0].partial)
        replicated = next(i for i, c in enumerate(after) if c.inputs[0].is_replicated)
        return float(space.edge_costs(edge).forward_us[partial, replicated]), space.cluster

    launched, cluster = sum_us(nn.Identity())
    assert launched == cluster.device.launch_us
    waited, _ = sum_us(Exp())
    assert waited >= launched + cluster.links[0].collective_us("all_reduce", 2, 4)
