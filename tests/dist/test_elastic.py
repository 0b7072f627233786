"""A run that loses a rank is started again by its launcher, and ends with the same weights."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "elastic.py"


def run(folder: Path, *options: str, ranks: int = 2, **variables: str):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
    done = subprocess.run(
        [*launcher, f"--nproc-per-node={ranks}", str(EXAMPLE), "--out", str(folder), *options],
        env=os.environ | variables, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def run_here(folder: str, steps: int) -> None:
    """The same on this rank."""
    sys.argv = [str(EXAMPLE), "--out", folder, "--steps", str(steps)]
    runpy.run_path(str(EXAMPLE), run_name="__main__")


@pytest.fixture
def uninterrupted(two, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    two.run(run_here, str(folder), 7)
    return torch.load(folder / "weights.pt")


def test_the_weights_are_those_of_an_uninterrupted_run(tmp_path, uninterrupted):
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    code, output = run(tmp_path, "--steps", "7", "--kill-at", "5", **variables)
    assert code == 0, output
    assert "resumed at step 3" in output
    weights = torch.load(tmp_path / "weights.pt")
    assert all(torch.equal(weights[name], x) for name, x in uninterrupted.items())
    assert [p.name for p in tmp_path.glob("*") if p.is_dir()] == ["step-7"]
