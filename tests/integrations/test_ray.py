"""Ray Train as the launcher: the same losses as with one worker, and on another mesh after that."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray.train")

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_train.py"


def loss(folder: Path, *options: str) -> float:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--out", str(folder), *options],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=400,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return float(re.search(r"^loss (\S+) after 8 steps", done.stdout, re.MULTILINE)[1])


def test_resumes_on_another_mesh_as_one_worker_trains(tmp_path):
    expected = loss(tmp_path / "one", "--workers", "1", "--steps", "8")
    subprocess.run(
        [sys.executable, str(EXAMPLE), "--out", str(tmp_path / "two"), "--workers", "2",
         "--steps", "4"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=True, timeout=400,
    )  # fmt: skip
    resumed = loss(tmp_path / "two", "--workers", "1", "--steps", "8")
    assert resumed == pytest.approx(expected, rel=1e-5)
