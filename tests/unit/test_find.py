"""Questions that `autopar plan --find` answers."""

import json
import math

import pytest

from autopar import ShardingPlan
from autopar.cli.app import app
from autopar.cli.find import largest
from autopar.cluster.cluster import parse_bytes
from tests.commands import run
from tests.unit.test_model_library import CONFIG

FILE = """
import torch
from torch import nn

def build_model():
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

def example_inputs(batch=16, sequence=128):
    return torch.zeros(batch, sequence, 64)
"""


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize("most", [0, 1, 2, 7, 100, 3000])
@pytest.mark.parametrize("start", [1, 8, 64])
def test_the_largest_size_is_known_to_a_sixteenth(most, start):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= 128 * most

    answer = largest(fits, start, 128)
    assert 128 * most * 15 / 16 - 128 < answer <= 128 * most
    assert all(size % 128 == 0 for size in tried) and len(set(tried)) == len(tried)


def _planned(*arguments):
    quick = ["--no-baselines", "--time-limit", "1"]
    app(["plan", *map(str, arguments), *quick], standalone_mode=False)


def test_the_largest_batch_fits_and_a_larger_one_does_not(model, tmp_path, capsys):
    file, budget = tmp_path / "plan.json", "1MiB"
    layers = "nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)"
    model.write_text(FILE.replace(layers, "nn.Linear(64, 64)"))  # nothing to recompute
    _planned(model, "--mesh", 2, "--memory", budget, "--find", "largest-batch", "-o", file)
    plan = ShardingPlan.load(file)
    fitting = [s for s in plan.sizes if math.isfinite(s.step_us)]
    others = [s for s in plan.sizes if not math.isfinite(s.step_us)]
    assert plan.microbatches == 1 and plan.memory.total_bytes <= parse_bytes(budget)
    assert plan.work.samples == max(s.work.samples for s in fitting) > 1
    smallest = min(int(s.size.split()[0].replace(",", "")) for s in others)
    assert plan.work.samples < smallest <= plan.work.samples * 17 / 16 + 1
    out = capsys.readouterr().out
    assert "samples/s" in out and "MFU" in out and "does not fit" in out


def test_the_longest_sequence_ends_where_the_configuration_does(tmp_path):
    config, file = tmp_path / "config.json", tmp_path / "plan.json"
    config.write_text(json.dumps(CONFIG | {"max_position_embeddings": 300}))
    _planned(f"hf:{config}", "--batch", 2, "--mesh", 2, "--find", "longest-sequence", "-o", file)
    plan = ShardingPlan.load(file)
    assert plan.work.tokens == 2 * 256
    notes = [size.note for size in plan.sizes if not math.isfinite(size.step_us)]
    assert notes and all("allows 300 tokens (max_position_embeddings)" in note for note in notes)


def test_the_fewest_devices_are_one_too_many_for_half(tmp_path):
    """States are most of the memory, so no schedule is looked for where they do not fit."""
    model, file = tmp_path / "model.py", tmp_path / "plan.json"
    model.write_text(FILE.replace("batch=16, sequence=128", "batch=8, sequence=4"))
    _planned(
        model, "--memory", "300KiB", "--devices", 8, "--per-node", 4,
        "--find", "fewest-devices", "-o", file,
    )  # fmt: skip
    plan = ShardingPlan.load(file)
    *few, last = plan.sizes
    assert few and all(math.isinf(s.step_us) for s in few) and math.isfinite(last.step_us)
    assert last.size == f"{math.prod(plan.mesh)} devices, mesh {'x'.join(map(str, plan.mesh))}"
    assert math.prod(plan.mesh) == 2 ** len(few)


def test_a_file_may_take_its_sizes(model, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    _planned(model, "--batch", 32, "--mesh", 2, "-o", plan)
    assert ShardingPlan.load(plan).work.samples == 32
    app(["explain", str(plan), "0.weight"], standalone_mode=False)
    assert "planned: " in capsys.readouterr().out
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in (model, plan):
        file.rename(moved / file.name)
    app(["explain", str(moved / "plan.json"), "0.weight"], standalone_mode=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "2", "--find", "smallest-batch"], "--find answers largest-batch"),
        (["--mesh", "2", "--find", "fewest-devices"], "leave out --mesh"),
        (["--devices", "2", "--find", "largest-batch"], "one mesh without stages"),
        (["--mesh", "pipe=2", "--find", "largest-batch"], "one mesh without stages"),
        (["--mesh", "2", "--find", "longest-sequence", "--microbatches", "2"], "itself"),
        (
            ["--mesh", "2", "--find", "largest-batch", "--memory", "8KiB"],
            "1 sample is too much: the budget of a device is 8 KiB, and the least that was found",
        ),
        (
            ["--devices", "2", "--find", "fewest-devices", "--memory", "8KiB"],
            "nothing fits 2 x A100-80G",
        ),
    ],
)
def test_questions_that_have_no_answer(model, capsys, arguments, message):
    with pytest.raises(SystemExit):
        app(["plan", str(model), "--batch", "2", *arguments], standalone_mode=True)
    assert message in capsys.readouterr().err


def test_a_file_whose_inputs_take_no_size_is_refused_at_once(model):
    model.write_text(FILE.replace(", sequence=128", "").replace("batch, sequence", "batch"))
    result = run("plan", str(model), "--mesh", "2", "--find", "longest-sequence", code=2)
    assert "model.py does not take sequence; define it as" in result.stderr
    assert "tokens" not in result.stderr
