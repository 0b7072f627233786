"""Runs a case on a pool of processes, or in processes of its own, whose program is this module."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.dist.pool import Pool
from tests.scripts.case import Outcome, attempt, outcome_of
from tests.scripts.catalog import CASES

ROOT = Path(__file__).resolve().parents[2]


def outcome_on(pool: Pool, name: str, mesh: str, timeout_s: float) -> Outcome:
    """The outcome of a case on a pool's ranks, which are left in step with each other."""
    if CASES[name].own_processes:
        return in_fresh_processes(name, mesh, timeout_s)
    try:
        outcome = outcome_of(pool.run(attempt, name, mesh, timeout=timeout_s))
    except TimeoutError as error:  # the pool has started anew
        return Outcome("wrong", f"{error}: a hang")
    if outcome.out_of_step and pool.world > 1:
        pool.restart()
    return outcome


def in_fresh_processes(name: str, mesh: str, timeout_s: float) -> Outcome:
    """The outcome of a case on ranks that torchrun starts, one for each device of the mesh."""
    ranks = math.prod(int(size) for size in mesh.split("x"))
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", *launch, "tests.scripts.launch", name, mesh, folder]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **quiet) as process:
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                _stop(process)
        files = [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        answers = [json.loads(f.read_text()) if f.exists() else {} for f in files]
    return outcome_of(answers)


def _stop(process: subprocess.Popen[Any]) -> None:
    """End a launcher, which ends its ranks."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def main(name: str, mesh: str, folder: str) -> None:
    """Run the case on this rank, and leave the answer in the folder."""
    answer = json.dumps(attempt(name, mesh))
    (Path(folder) / f"{os.environ['RANK']}.json").write_text(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
