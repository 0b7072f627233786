"""The command line: what it prints, writes and refuses."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import autopar
from autopar.plan import ShardingPlan
from autopar.report.text import render
from tests.commands import run

MLP = str(Path(__file__).parents[2] / "examples" / "mlp.py")

TINY = """
import torch
print("noise from the model file")
def build_model():
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
def example_inputs():
    return {inputs}
"""


@pytest.fixture
def tiny(tmp_path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(TINY.format(inputs="(torch.zeros(8, 64),)"))
    return path


# -- plan ---------------------------------------------------------------------------------------


def test_plan_prints_a_report_and_writes_files(tmp_path):
    plan, page, trace = (tmp_path / name for name in ("out/plan.json", "plan.html", "step.json"))
    files = ("-o", str(plan), "--report", str(page), "--trace", str(trace))
    result = run("plan", MLP, "--mesh", "2x2", *files)
    loaded = ShardingPlan.load(plan)
    assert loaded.mesh == (2, 2)
    assert loaded.cluster["device"]["name"] == "A100-80G"
    assert [b.name for b in loaded.baselines][:2] == ["DDP", "FSDP (ZeRO-3)"]
    assert result.stdout == render(loaded, file=str(plan))
    assert "blocks." in page.read_text()
    for line in (r"captured Classifier, \d+ operators", "solved: .* of the optimum", "scheduled"):
        assert re.search(rf"^{line}.* \(\d+\.\d+ s\)$", result.stderr, re.MULTILINE), line
    assert json.loads(trace.read_text())["traceEvents"]
    again = tmp_path / "again.html"
    assert run("report", str(plan), "--html", str(again)).stdout == result.stdout
    assert len(again.read_text()) == len(page.read_text())


def test_a_file_that_cannot_be_written_is_refused_before_planning(tiny, tmp_path):
    for path, reason in ((tmp_path, "is a directory"), ("/proc/report.html", "cannot write")):
        result = run("plan", str(tiny), "--mesh", "2", "--report", str(path), code=2)
        assert reason in result.stderr and "captured" not in result.stderr


def test_a_measurement_that_cannot_be_written_or_started_is_refused_before_it(tmp_path):
    for arguments, reason in (
        (("-o", "/proc/cluster.yaml"), "cannot write /proc/cluster.yaml: No such file"),
        (("-o", str(tmp_path)), "is a directory"),
        (("--mesh", "2x1000"), "has 2,000 devices, and one host starts a process for each"),
    ):
        result = run("cluster", *arguments, "--device", "cpu", code=2)
        assert reason in result.stderr and result.stderr.count("\n") == 1


def test_json_is_all_that_goes_to_stdout(tiny):
    result = run("plan", str(tiny), "--mesh", "2", "--json", "--no-baselines", "--device", "h100")
    loaded = ShardingPlan.from_json(result.stdout)
    assert json.loads(result.stdout)["plan"]["model"] == "Sequential"
    assert loaded.baselines == ()
    assert loaded.cluster["device"]["name"] == "H100"
    assert "noise from the model file" in result.stderr


@pytest.mark.parametrize(
    "inputs",
    [
        "dict(input=torch.zeros(8, 64))",
        "((torch.zeros(8, 64),), {})",
        "((), dict(input=torch.zeros(8, 64)))",
        "[torch.zeros(8, 64)]",
        "torch.zeros(8, 64)",
    ],
)
def test_forms_of_example_inputs(tmp_path, inputs):
    path = tmp_path / "model.py"
    path.write_text(TINY.format(inputs=inputs))
    run("plan", str(path), "--mesh", "2", "--no-baselines", "--json")


def test_optimizer_decides_the_state(tiny):
    def state(name: str) -> float:
        text = run("plan", str(tiny), "--mesh", "1", "--optimizer", name, "--json").stdout
        memory = ShardingPlan.from_json(text).memory
        return memory.optimizer_bytes / memory.parameters_bytes

    assert [state(n) for n in ("adamw", "Adam", "momentum", "sgd")] == [2, 2, 1, 0]


def test_cluster_file_and_memory(tmp_path, tiny):
    path = tmp_path / "cluster.yaml"
    path.write_text("mesh: 2x2\ndevice: L4\n")
    arguments = ("plan", str(tiny), "--cluster", str(path), "--memory", "0.5", "--json")
    loaded = ShardingPlan.from_json(run(*arguments).stdout)
    assert loaded.mesh == (2, 2)
    assert loaded.budget_bytes == 12 * 2**30


def test_constraints_are_kept_and_shown(tmp_path, tiny):
    path = tmp_path / "c.yaml"
    path.write_text("0.weight: RS0\ninputs.input: S0R\n")
    plan = tmp_path / "plan.json"
    arguments = ("plan", str(tiny), "--mesh", "2", "--constraints", str(path), "-o", str(plan))
    shown = run(*arguments).stdout
    loaded = ShardingPlan.load(plan)
    assert loaded.parameters["0.weight"] == "RS0"
    assert loaded.choices["input"] == "S0R"
    assert re.search(r"Constraints\n.*\n 0.weight +RS0", shown.replace("─", ""), re.DOTALL)


def test_front_and_mesh_search(tmp_path, tiny):
    page, plan = tmp_path / "r.html", tmp_path / "plan.json"
    result = run(
        "plan", str(tiny), "--mesh", "auto", "--devices", "4", "--per-node", "2", "--pareto-front",
        "--report", str(page), "-o", str(plan),
    )  # fmt: skip
    loaded = ShardingPlan.load(plan)
    assert {m.text for m in loaded.meshes} == {"4", "2x2", "pipe=2,2", "pipe=4,1"}
    assert loaded.mesh in {(4,), (2, 2)}
    assert len(loaded.pareto_front) > 2
    assert result.stdout == render(loaded, file=str(plan))
    assert "Time and memory" in result.stdout and "Meshes" in result.stdout
    assert "Time against memory" in page.read_text()
    for line in ("mesh 4 (1 of 2) ...", "mesh 2x2 (2 of 2) ...", "without limit (1 of 12) ..."):
        assert line in result.stderr


# -- explain and diff ---------------------------------------------------------------------------


def test_explain_and_diff(tmp_path, tiny):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    run("plan", str(tiny), "--mesh", "2", "-o", str(first), "--no-baselines")
    shown = run("explain", str(first), "1.weight", "--alternatives", "2").stdout
    loaded = ShardingPlan.load(first)
    head, planned = shown.splitlines()[:2]
    assert re.fullmatch(r"parameter (1|\*)\.weight(, the same in 2 copies)?", head)
    assert planned == f"planned: {loaded.choices['p_1_weight']}"
    assert "the plan" in shown and ">= " in shown
    other = next(s for s in ("RR", "S0R") if s != loaded.parameters["1.weight"])
    path = tmp_path / "c.yaml"
    path.write_text(f"1.weight: {other}\ninputs.input: RS0\n")
    run(
        "plan", str(tiny), "--mesh", "2", "-o", str(second), "--no-baselines",
        "--constraints", str(path),
    )  # fmt: skip
    shown = run("diff", str(first), str(second)).stdout
    assert re.search(rf"1\.weight +{loaded.parameters['1.weight']} +{other}", shown)
    assert f"1.weight: {other}" in shown  # under "Made for"
    assert "Decisions" in run("diff", str(first), str(second), "--all").stdout
    assert run("diff", str(first), str(first)).stdout == "the plans do not differ\n"


def test_explain_refuses_what_it_cannot_explain(tmp_path, tiny):
    staged = tmp_path / "staged.json"
    run("plan", str(tiny), "--mesh", "pipe=2,data=2", "-o", str(staged))
    assert "plan with --mesh 1x2" in refused("explain", str(staged), "0.weight")
    plan = tmp_path / "sub" / "plan.json"
    run("plan", str(tiny), "--mesh", "2", "-o", str(plan), "--no-baselines")
    message = refused("explain", str(plan), "0.wieght")
    assert "nothing is called '0.wieght'; did you mean '0.weight'" in message
    other = tmp_path / "other.py"
    other.write_text(TINY.format(inputs="(torch.zeros(4, 64),)"))
    assert "another graph" in refused("explain", str(plan), "0", "--model", str(other))
    moved = tmp_path / "sub" / "tiny.py"
    tiny.rename(moved)  # beside the plan it is found
    run("explain", str(plan), "0.weight", "--alternatives", "0")
    moved.unlink()
    assert "tiny.py, which is not there; give it with --model" in refused("explain", str(plan), "0")
    bare = ShardingPlan.load(plan)
    replace(bare, source="").save(plan)
    assert "not planned from a model file" in refused("explain", str(plan), "0")


# -- refusals -----------------------------------------------------------------------------------


def refused(*arguments: str, code: int = 2) -> str:
    result = run(*arguments, code=code)
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--mesh 2x4, or --cluster"),
        (("--mesh", "2xx"), "cannot read mesh '2xx'"),
        (("--mesh", "2", "--device", "A100"), "unknown device 'A100'"),
        (("--mesh", "2", "--memory", "12 parsecs"), "cannot read memory size"),
        (("--mesh", "2", "--optimizer", "lion"), "unknown optimizer 'lion'; known: adamw"),
        (
            ("--cluster", "missing.yaml"),
            "--cluster missing.yaml: No such file or directory; autopar cluster -o missing.yaml",
        ),
        (("--mesh", "2", "--cluster", "c.yaml"), "leave out --mesh"),
        (("--mesh", "auto"), "needs the number of devices: --devices 64"),
        (("--mesh", "4", "--devices", "4"), "go with --mesh auto, not with 4"),
        (("--mesh", "4", "--per-node", "4"), "go with --mesh auto, not with 4"),
        (("--devices", "4", "--cluster", "c.yaml"), "has the links of one mesh"),
        (("--devices", "4", "--memory", "much"), "cannot read memory size"),
        (("--mesh", "2", "--memory", "40"), "did you mean '40GiB'?"),
        (("--devices", "4", "--memory", "80.5"), "did you mean '80.5GiB'?"),
        (("--devices", "4", "--device", "A1"), "unknown device 'A1'"),
        (
            ("--mesh", "2", "--constraints", "missing.yaml"),
            "--constraints missing.yaml: No such file or directory; --save-constraints",
        ),
        (("--mesh", "2", "--constraints", "/"), "--constraints /: Is a directory"),
        (("--mesh", "2", "--dump-passes", "/proc/x"), "--dump-passes /proc/x: No such file or"),
        (("--mesh", "99999999999"), "99,999,999,999 devices, and plans are made for at most 1,048"),
        (("--devices", "99999999999"), "plans are made for at most 1,048,576"),
    ],
)
def test_bad_options(tiny, arguments, message):
    assert message in refused("plan", str(tiny), *arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mesh: 2\ndevice: {name: x}\n", "does not describe a cluster"),
        ("mesh: [2\n", "not YAML (line 2: expected ',' or ']', but got '<stream end>')"),
        ("mesh: 2x99999999999\ndevice: L4\n", "199,999,999,998 devices, and plans are made for"),
        ("mesh: 2\n", "missing ['device']"),
        ("mesh: 2\ndevice: L4\nlinks: [{alpha: 6e-6, beta: 1.0e-9}]", "links[0].alpha must be a"),
        ("mesh: 2\ndevice: L4\nlinks: [{alpha: .nan, beta: 1.0e-9}]", "links[0].alpha must be z"),
        ("4", "expected a mapping"),
    ],
)
def test_bad_cluster_files(tmp_path, tiny, text, message):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    assert message in refused("plan", str(tiny), "--cluster", str(path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "does not define build_model()"),
        ("def build_model(): pass", "does not define example_inputs()"),
        ("import no_such_module_here", "model.py:1: ModuleNotFoundError: No module named"),
        ("def f(:\n", "model.py:1: SyntaxError"),
        (
            "def build_model(): pass\ndef example_inputs(): pass",
            "returned NoneType, not a torch.nn.Module",
        ),
        (
            "def build_model():\n    return 1 / 0\ndef example_inputs(): pass",
            "build_model() of {path} failed at {path}:2: ZeroDivisionError",
        ),
        (
            "import torch\ndef build_model(): return torch.nn.Linear(2, 2)\n"
            "def example_inputs(): return 3",
            "example_inputs() of {path} returned int; return a dict",
        ),
    ],
)
def test_bad_model_files(tmp_path, source, message):
    path = tmp_path / "model.py"
    path.write_text(source)
    assert message.format(path=path) in refused("plan", str(path), "--mesh", "2")


def test_missing_model_file():
    assert "nowhere.py does not exist" in refused("plan", "nowhere.py", "--mesh", "2")


def test_too_little_memory_says_how_much_is_needed(tiny):
    message = refused("plan", str(tiny), "--mesh", "2", "--memory", "1KiB", code=1)
    assert "Of 1 KiB, parameters take" in message
    assert "Give " in message


@pytest.mark.parametrize(
    ("text", "message", "code"),
    [
        ("0.wieght: RR", "did you mean '0.weight'", 2),
        ("0.weight: S5R", "splits over axis 5, and mesh 2 has axes 0 to 0", 2),
        ("*.weight: RR", "names that begin with * or { need quotes", 2),
        ("'*.weight': RR\n0.weight: S0R", "leave no layout for 0.weight", 1),
    ],
)
def test_bad_constraints(tmp_path, tiny, text, message, code):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    arguments = ("plan", str(tiny), "--mesh", "2", "--constraints", str(path))
    assert message in refused(*arguments, code=code)


def test_a_model_that_cannot_be_captured(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(
        "import torch\n"
        "class M(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        h = x.exp() * self.w\n"
        "        return h if h.sum() > 0 else -h\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.w = torch.nn.Parameter(torch.ones(3))\n"
        "def build_model(): return M()\n"
        "def example_inputs(): return (torch.ones(3),)\n"
    )
    assert "model.py:5" in refused("plan", str(path), "--mesh", "2", code=1)


def test_damaged_plans_are_refused(tmp_path, tiny):
    assert "cannot read the plan" in refused("report", str(tmp_path / "missing.json"))
    path = tmp_path / "plan.json"
    run("plan", str(tiny), "--mesh", "2", "-o", str(path), "--no-baselines")
    path.write_text(path.read_text().replace("Sequential", "Consequential"))
    assert "was changed after it was written" in refused("report", str(path))
    path.write_text("{")
    assert "is not JSON" in refused("report", str(path))


# -- profile ------------------------------------------------------------------------------------


def test_profile_prints_a_table_by_module():
    out = run("profile", MLP, "--depth", "1").stdout
    assert "283 GFLOP" in out and "blocks" in out and "blocks.*" not in out
    assert "peak" in out


def test_profile_gives_formulas_and_the_batch_that_fits():
    out = run("profile", MLP, "--formulas", "--fit", "1GiB").stdout
    assert "forward FLOPs   69156864*batch" in out
    fits = int(re.search(r"fits\s+batch (\d+) in 1 GiB", out)[1])
    for batch, inside in ((fits, True), (fits + 1, False)):
        figures = json.loads(run("profile", MLP, "--batch", str(batch), "--json").stdout)
        inputs = batch * (1024 * 4 + 8)
        assert (figures["peak_bytes"] + figures["state_bytes"] + inputs <= 2**30) is inside


def test_profile_at_another_size_is_that_of_the_size():
    figures = json.loads(run("profile", MLP, "--batch", "64", "--json").stdout)
    assert figures["sizes"] == {"batch": 64}
    assert figures["flops"] == (69156864 + 138313728) * 64
    assert figures["modules"][0]["parameters"] == 34_608_104


def test_profile_refuses_sizes_that_the_model_has_not(tiny):
    assert "sequence is not a dynamic size" in refused("profile", MLP, "--sequence", "8")
    assert "cannot read memory size" in refused("profile", str(tiny), "--fit", "much")


# -- the rest -----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "H100"])
def test_dumped_passes_are_those_of_the_device(tmp_path, tiny, device):
    options = ("--mesh", "2", "--device", device, "--no-baselines", "--dump-passes", str(tmp_path))
    result = run("plan", str(tiny), *options)
    assert ("without kernels of GPUs" in result.stderr) == (device == "H100")
    stages = {"program", "joint", "forward", "backward", *(["shaped"] if device == "H100" else [])}
    assert {f.name.removesuffix("-input.py") for f in tmp_path.glob("*-input.py")} == stages
    files = sorted(tmp_path.glob("forward-*-after.py"))
    assert any("add_bias_within" in f.name for f in files) == (device == "cpu")
    assert ("mkldnn" in files[-1].read_text()) == (device == "cpu")


def test_devices_are_listed():
    shown = run("devices").stdout
    for name in ("A100-80G", "H200", "cpu"):
        assert name in shown


def test_mesh_axes_can_have_names(tmp_path, tiny):
    path = tmp_path / "cluster.yaml"
    path.write_text("mesh: node=2,gpu=2\ndevice: H100\n")
    for target in (("--mesh", "node=2,gpu=2", "--device", "H100"), ("--cluster", str(path))):
        shown = run("plan", str(tiny), *target, "--no-baselines").stdout
        assert "node=2,gpu=2: 4 x H100" in shown
        assert "gpu 300 GB/s" in shown


def test_version_and_module():
    expected = f"autopar {autopar.__version__}, torch {torch.__version__}\n"
    assert run("--version").stdout == expected
    command = [sys.executable, "-m", "autopar", "--version"]
    assert subprocess.check_output(command, text=True) == run("--version").stdout


def test_help_names_the_commands():
    shown = run("--help").stdout
    assert all(command in shown for command in ("plan", "report", "devices"))
    assert "--mesh" in run("plan", "--help").stdout


# -- rules --------------------------------------------------------------------------------------


def test_rules_check_prints_a_table():
    result = run("rules", "check", "--op", "aten.mm.default", "--cases", "8")
    assert "aten.mm.default" in result.stdout
    assert "8 cases of 1 ops, 0 wrong" in result.stdout
    assert "1 of 1 ops, 8 cases, 0 wrong" in result.stderr


def test_rules_check_fails_with_a_reproduction(monkeypatch):
    from autopar.sharding.rule import Row
    from autopar.sharding.rules import registry

    row = Row("m k, k n -> m n", linear=((0, 1),))
    monkeypatch.setitem(registry.ROWS, "aten.mm.default", (row,))
    result = run("rules", "check", "--op", "aten.mm.default", "--cases", "30", code=1)
    assert "aten.mm.default(float64[" in result.stdout
    assert "strategy 'sum0" in result.stdout


def test_rules_list_prints_notation_and_with_a_record_also_status(tmp_path):
    shown = run("rules", "list", "--op", "aten.mm.default").stdout
    assert "m k, k n -> m n" in shown
    assert "{0} {1}" in shown
    assert "proved" not in shown
    record = str(tmp_path / "proofs.json")
    run("rules", "check", "--op", "aten.mm.default", "--cases", "8", "--record", record)
    shown = run("rules", "list", "--op", "mm.default", "--record", record).stdout
    assert "proved (8 cases, " in shown
    assert "not proved" in shown
    assert "from shapes" in run("rules", "list", "--op", "aten.permute.default").stdout


def test_rules_refuse_unknown_ops():
    assert "no op of the rule table is called 'nothing'" in run(
        "rules", "list", "--op", "nothing", code=2
    ).stderr  # fmt: skip
