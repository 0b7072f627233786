"""The examples train: one of them on processes of its own, from another folder, with the package
alone."""

import contextlib
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

from tests.dist.pool import Pool

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


def run_here(script: str, *options: str) -> str:
    """What an example prints on this rank."""
    sys.argv = [script, *options]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(script, run_name="__main__")
    return printed.getvalue()


def test_a_large_batch_by_lars():
    ranks = Pool(2, launched=True)
    options = ("--mesh", "2", "--steps", "3", "--batch", "16", "--size", "8")
    printed, _ = ranks.run(run_here, str(EXAMPLES / "train_resnet_lars.py"), *options)
    ranks.close()
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
