"""What planning tells, how long it may take, and how it is interrupted."""

import itertools
import logging
import re
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from torch import nn

from autopar import ClusterInfo, auto_engine, autoplan
from autopar.compile import plan_step
from autopar.planner.mesh_search import search_meshes
from autopar.progress import Deadline, Progress, seconds_text
from autopar.versions import warn_if_torch_is_untested

TIMED = re.compile(r" \((\d+\.\d+ s|\d+ min \d+ s)\)$")
X = torch.zeros(64, 256)


def deep(layers: int = 12) -> nn.Sequential:
    """A model without repeated blocks, whose search takes a while."""
    widths = [256 + 16 * k for k in range(layers)]
    steps = [nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*steps)


# -- lines ----------------------------------------------------------------------------------------


def test_every_stage_has_a_line_with_its_time(capsys):
    engine, _ = auto_engine(nn.Linear(8, 4), None, "1")
    engine(torch.ones(2, 8))
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("autopar: ") and TIMED.search(line) for line in lines)
    words = [line.split()[1].strip(":,") for line in lines]
    assert words == [
        "captured", "profiled", "costed", "solved", "applied", "differentiated", "lowered"
    ]  # fmt: skip
    assert lines[0].startswith("autopar: captured Linear, 1 operators")
    assert re.search(r"within \d+\.\d\d% of the optimum", lines[3])


@pytest.mark.parametrize("progress", [None, False])
def test_progress_may_be_silent(capsys, progress):
    engine, _ = auto_engine(nn.Linear(8, 4), None, "1", progress=progress)
    engine(torch.ones(2, 8))
    assert capsys.readouterr().err == ""


def test_later_captures_take_one_line_that_says_why():
    model, lines = nn.Linear(8, 4), []
    engine, _ = auto_engine(model, None, "1", progress=lines.append)
    engine(torch.ones(2, 8))
    first = len(lines)
    engine(torch.ones(2, 8))
    assert len(lines) == first
    engine(torch.ones(3, 8))
    model.weight.requires_grad_(False)
    engine(torch.ones(3, 8))
    assert len(lines) == first + 2, lines
    assert re.match(r"captured again: called with \(float32\[3, 8\]\) in training", lines[first])
    assert "frozen or unfrozen" in lines[first + 1] and TIMED.search(lines[first + 1])


def test_progress_is_a_function_or_a_flag():
    with pytest.raises(TypeError, match="progress must be a function"):
        auto_engine(nn.Linear(8, 4), None, "1", progress="yes")


def test_the_log_has_more_than_the_lines(caplog):
    lines = []
    with caplog.at_level(logging.DEBUG, "autopar"):
        autoplan(deep(3), (X,), cluster="2x2", progress=lines.append)
    logged = [r.getMessage() for r in caplog.records if r.name == "autopar.progress"]
    assert set(lines) < set(logged)
    assert any("choices: at least" in line for line in logged)


def test_a_stage_that_fails_tells_nothing():
    lines = []
    progress = Progress(lines.append)
    with pytest.raises(ValueError), progress.stage("solve"):
        raise ValueError
    with pytest.raises(ValueError), progress.as_one("all"):
        raise ValueError
    with progress.stage("next") as stage:
        stage.done = "done"
    assert [line.split(" (")[0] for line in lines] == ["done"]


def test_seconds_read_well():
    assert [seconds_text(s) for s in (0.004, 0.25, 99.9, 200)] == [
        "0.00 s", "0.2 s", "99.9 s", "3 min 20 s"
    ]  # fmt: skip


# -- the limit ------------------------------------------------------------------------------------


def test_a_deadline_is_shared():
    deadline = Deadline(10.0)
    assert 4.9 < deadline.share(2) <= 5.0 and not deadline.over
    assert Deadline(0.0).over and Deadline(0.0).share(3) == 0.0


def test_the_limit_holds_for_all_trials_of_a_joint_plan_together():
    lines = []
    cluster = ClusterInfo.of("2x2x2", "A100-80G")
    start = time.monotonic()
    joint = plan_step(
        deep(), (X,), cluster=cluster, memory="8.35MiB", time_limit=0.01, progress=lines.append
    )
    assert time.monotonic() - start < 30
    record = joint.planned.plan.solver
    assert record.gap > 0.01
    assert any("stopped by the time limit of 0.01 s" in line for line in lines), lines
    assert joint.memory is not None
    assert joint.planned.plan.memory.total_bytes <= cluster.with_memory("8.35MiB").budget_bytes
    assert len(joint.tried) <= 3  # no further ones once there is a plan


def test_the_limit_holds_for_all_meshes_together():
    best = search_meshes(deep(4), (X,), devices=16, device="A100-80G", time_limit=1e-3).plan
    notes = [m.note for m in best.meshes]
    assert len(notes) == 7 and notes[0] == "" and "no time left" in notes
    assert best.mesh == best.meshes[0].mesh


# -- versions -------------------------------------------------------------------------------------


def test_a_newer_torch_is_warned_of_once():
    with pytest.warns(UserWarning, match=r"tested with torch 2.11 to 2.13, and this is 2.99.1"):
        warn_if_torch_is_untested("2.99.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_torch_is_untested("2.99.1")
        for tested in ("2.11.0", "2.13.0+cpu", "2.12.0a0+git123", torch.__version__):
            warn_if_torch_is_untested(tested)


# -- Ctrl-C ---------------------------------------------------------------------------------------

LONG = """
import sys
import numpy as np
from autopar.solver.linear_program import LinearProgram

random = np.random.default_rng(0)
program = LinearProgram()
x = [program.variable(-float(c), upper=1.0, integer=True) for c in random.integers(10, 100, 120)]
for _ in range(60):
    weights = random.integers(5, 100, len(x))
    program.row(zip(x, map(float, weights)), upper=float(weights.sum()) / 3)
print("begins", file=sys.stderr, flush=True)
program.minimize(time_limit=300, backend=sys.argv[1])
"""


def _as_in_a_terminal() -> None:
    """A process that runs in the background may ignore the signal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupted(command: list[str], line: str, seconds: float) -> tuple[int, float, list[str]]:
    """Interrupt a process some seconds after a line of stderr.

    Returns:
        its exit code, the seconds until it ended, and the processes of its session that are left.
    """
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=_as_in_a_terminal,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        seen = []
        for read in process.stderr:
            seen.append(read)
            if line in read:
                break
        else:
            pytest.fail("".join(seen))
        time.sleep(seconds)
        assert process.poll() is None, "it ended before"
        start = time.monotonic()
        process.send_signal(signal.SIGINT)  # to it alone, not to its children
        process.stderr.read()
        code = process.wait(60)
        spent = time.monotonic() - start
    listed = subprocess.run(
        ["ps", "-o", "args=", "-s", str(process.pid)], capture_output=True, text=True
    )
    return code, spent, listed.stdout.splitlines()


@pytest.mark.parametrize("backend", ["HiGHS", "CBC"])
def test_ctrl_c_ends_a_solver(tmp_path, backend):
    script = tmp_path / "long.py"
    script.write_text(LONG)
    code, spent, left = interrupted([sys.executable, str(script), backend], "begins", 2.0)
    assert code == -signal.SIGINT  # 130 in a shell
    assert spent < 5 and not left


def test_ctrl_c_ends_a_command_with_its_code(tmp_path):
    model = tmp_path / "model.py"
    model.write_text(
        "import sys, time, torch\n"
        "class Slow(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        print('begins', file=sys.stderr, flush=True)\n"
        "        time.sleep(300)\n"
        "def build_model(): return Slow()\n"
        "def example_inputs(): return torch.zeros(2)\n"
    )
    command = [sys.executable, "-m", "autopar", "plan", str(model), "--mesh", "2"]
    code, spent, left = interrupted(command, "begins", 0.2)
    assert code == 130
    assert spent < 5 and not left
