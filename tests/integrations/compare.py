"""Runs a library's actions with and without autopar and compares them."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from tests.integrations.run import RESULTS

ROOT = Path(__file__).parents[2]
# of float64 results; of losses in bf16; of losses that transformers averages in float32
TOLERANCES = {"bf16": 2e-3, ("trainer", "evaluate"): 1e-5}
TOLERANCE = 1e-9


def tolerance(tool: str, action: str) -> float:
    """How far results of an action may be apart."""
    return TOLERANCES.get((tool, action), TOLERANCES.get(action, TOLERANCE))


def differences(
    tool: str, mesh: str, folder: Path, *, first: int | None = None, timeout_s: float = 600.0
) -> dict[str, float]:
    """The largest difference of each action's results on any rank from those of one process.

    Args:
        first: so many actions alone.

    Raises:
        RuntimeError: a process failed; with the end of its output.
    """
    ranks = math.prod(map(int, mesh.split("x")))
    alone, distributed = folder / "alone", folder / "distributed"
    limit = [] if first is None else ["--first", str(first)]
    module = ["-m", "tests.integrations.run", tool, *limit]
    launcher = [
        "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-addr=localhost",
        f"--master-port={_free_port()}",
    ]  # fmt: skip
    _run([*module, str(alone)], alone, timeout_s)
    _run([*launcher, *module, str(distributed), "--mesh", mesh], distributed, timeout_s)
    return gaps(alone, distributed, ranks)


def gaps(alone: Path, distributed: Path, ranks: int) -> dict[str, float]:
    """The same, of results in folders."""
    expected = torch.load(alone / f"rank0-{RESULTS}")
    largest = dict.fromkeys(expected, 0.0)
    for rank in range(ranks):
        results = torch.load(distributed / f"rank{rank}-{RESULTS}")
        for action, (value, _) in expected.items():
            gap = (results[action][0] - value).abs().max().item()
            largest[action] = max(largest[action], gap)
    return largest


def _run(arguments: list[str], folder: Path, timeout_s: float) -> None:
    folder.mkdir(parents=True)
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | quiet | {"PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stdout[-4000:]}")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])
