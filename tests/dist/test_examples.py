"""The examples train on processes of their own, from another folder, with the package alone."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_demo_agrees_with_a_single_process(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = [
        "--nproc-per-node",
        "2",
        str(EXAMPLES / "train_gpt2.py"),
        "--mesh",
        "2",
        "--steps",
        "2",
    ]
    options += ["--batch", "4", "--length", "16"]
    done = subprocess.run(
        [*launcher, *options, "--out", str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agrees" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"plan.json", "report.html"}


def test_a_large_batch_by_lars(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = ["--nproc-per-node", "2", str(EXAMPLES / "train_resnet_lars.py"), "--mesh", "2"]
    options += ["--steps", "3", "--batch", "16", "--size", "8"]
    done = subprocess.run(
        [*launcher, *options], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
