"""`autopar plan --forward`: plans for inference, what they say, and the memory they predict."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

from autopar import auto_engine
from autopar.compile import build_problem
from autopar.errors import PlanError
from autopar.passes.local_step import local_step
from autopar.plan import ShardingPlan
from autopar.planner.planner import make_plan
from autopar.report.html import render_html
from autopar.schedule.budget import StepBudget
from tests.commands import run

SIZES = {
    "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 96, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.json"
    known = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}
    path.write_text(json.dumps(known))
    return path


def test_the_plan_of_a_configuration_is_that_of_a_forward(config, tmp_path):
    file = tmp_path / "plan.json"
    sizes = ("--batch", "4", "--sequence", "32", "--mesh", "2")
    shown = run("plan", f"hf:{config}", "--forward", *sizes, "-o", str(file)).stdout
    plan, trained = ShardingPlan.load(file), tmp_path / "trained.json"
    assert plan.forward and plan.optimizer_state == 0
    assert plan.memory.gradients_bytes == plan.memory.optimizer_bytes == 0
    assert (plan.work.tokens, plan.work.samples) == (128, 4)
    for line in ("a forward: no gradients, no optimizer state", "per forward", "tokens/s",
                 f'auto_engine(model, None, "2", plan="{file}")', "replicas"):  # fmt: skip
        assert line in " ".join(shown.split())
    for word in ("backward", "step", "optimizer state  ", "gradients  ", "DDP", "ZeRO"):
        assert word not in shown
    # it weighs memory as well, and no plan is below its bound
    assert plan.solver.bound_us <= min(b.time.step_us for b in plan.baselines)
    page = render_html(plan)
    assert "a forward" in page and "re-gathered for backward" not in page
    # a third of a training step's FLOPs, without the loss
    run("plan", f"hf:{config}", *sizes, "--no-baselines", "-o", str(trained))
    flops = [sum(ShardingPlan.load(path).work.flops.values()) for path in (file, trained)]
    assert 0.3 < flops[0] / flops[1] < 0.36
    explained = run("explain", str(file), "model.layers.*.mlp.up_proj.weight").stdout
    assert "forward" in explained and "reshard" not in explained and "backward" not in explained
    assert "a forward" in run("diff", str(file), str(trained)).stdout


def test_an_engine_runs_the_plan_and_does_not_train_with_it(config, tmp_path):
    file = tmp_path / "plan.json"
    sizes = ("--batch", "4", "--sequence", "32", "--mesh", "1", "--device", "cpu")
    run("plan", f"hf:{config}", "--forward", *sizes, "-o", str(file))
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, use_cache=False)).eval()
    ids = torch.randint(96, (4, 32))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    engine, _ = auto_engine(model, None, "1", plan=str(file), progress=False)
    with pytest.raises(PlanError, match="and this call trains"):
        engine(input_ids=ids)
    with torch.no_grad():
        torch.testing.assert_close(engine(input_ids=ids).logits, logits)
    assert engine.plan == ShardingPlan.load(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mesh", "2", "--optimizer", "adamw", "--microbatches", "2"),
         "leave out --optimizer and --microbatches"),
        (("--mesh", "2", "--microbatch", "independent"), "leave out --microbatch"),
        (("--mesh", "pipe=2,data=2"), "2 pipeline stages: give the axis another name"),
    ],
)  # fmt: skip
def test_options_of_training_are_refused(config, arguments, message):
    assert message in run("plan", f"hf:{config}", "--forward", *arguments, code=2).output


def test_decoders_take_tokens_in_the_place_of_labels(tmp_path):
    path = tmp_path / "config.json"
    hf.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=64,
        architectures=["T5ForConditionalGeneration"],
    ).to_json_file(path)  # fmt: skip
    arguments = ("--forward", "--sequence", "16", "--mesh", "2", "--json", "--no-baselines")
    plan = ShardingPlan.from_json(run("plan", f"hf:{path}", *arguments).stdout)
    assert "decoder_input_ids" in plan.choices and "labels" not in plan.choices


@pytest.mark.parametrize("mesh", ["1", "2", "2x2"])
@pytest.mark.parametrize("model_class", [hf.LlamaForCausalLM, hf.LlamaForSequenceClassification])
def test_memory_is_that_of_the_program(model_class, mesh):
    """Of the program with its collectives, simulated operator by operator."""
    config = hf.LlamaConfig(**SIZES, use_cache=False, pad_token_id=0)
    with torch.device("meta"):
        model = model_class(config).eval()
    ids = torch.zeros(8, 32, dtype=torch.long)
    problem = build_problem(model, (), {"input_ids": ids}, cluster=mesh, forward=True)
    space = problem.space
    plan = make_plan(space, problem.decide().choices, "")
    step = local_step(space.graph, plan, trainable=frozenset(), output_specs=None)
    budget = StepBudget.of(step.arguments, 2**40, 0.0, step.copied_bytes)
    simulated = budget.resident_bytes + budget.choose(step.program).peak_bytes
    assert plan.memory.total_bytes == pytest.approx(simulated, rel=1e-3)
