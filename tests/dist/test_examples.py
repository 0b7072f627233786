"""The example trains on processes of its own, from another folder, with the package alone."""

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_gpt2.py"


def test_the_demo_agrees_with_a_single_process(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = ["--nproc-per-node", "2", str(EXAMPLE), "--mesh", "2", "--steps", "2"]
    options += ["--batch", "4", "--length", "16"]
    done = subprocess.run(
        [*launcher, *options, "--out", str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agrees" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"plan.json", "report.html"}
