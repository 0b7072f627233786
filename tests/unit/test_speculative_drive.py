"""The optimizer's step beside the backward, with its state on a drive."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from autopar.cluster.tiers import HOST, NVME, Tier
from autopar.comm import world as environment
from tests.speculation import ACCEPTED, EVERY, Training
from tests.speculation import whole_chunks as whole_chunks  # a fixture of every test here


def with_drive(directory: Path | str) -> tuple[Tier, Tier]:
    return Tier(HOST, 1e15, 1e-9, capacity=66e3), Tier(NVME, 1e13, directory=str(directory))


def test_chunks_on_a_drive(tmp_path, monkeypatch, caplog):
    environment.stop()
    training = Training.of(tiers=with_drive(tmp_path))
    assert training.engine.plan.states_on == NVME
    counts = []
    for _ in range(4):
        training.backward()
        ACCEPTED.clear()
        for optimizer in (training.optimizer, training.beside):
            optimizer.step()
            optimizer.zero_grad()
        counts.append(len(ACCEPTED))
        for p, q in zip(training.parameters, training.alone, strict=True):
            assert torch.equal(p._local_tensor, q)
    assert counts == [0, 4, 4, 4] and training.engine.stored_steps == 4
    write, failing = os.pwritev, itertools.count()

    def full(*args):
        if next(failing) == 1:
            raise OSError(28, "No space left on device")
        return write(*args)

    monkeypatch.setattr(os, "pwritev", full)
    training.backward()
    assert 0 < training.step() < EVERY  # and state is loaded
    assert "No space left on device" in caplog.text
    training.speculative._rest = 0
    training.backward()
    assert training.step() == 0  # as state was in memory
    assert training.engine.stored_steps == 6


KILLED = """
import os, signal, sys
import pytest, torch
from tests.speculation import Training, speculate_on_all
from tests.unit.test_speculative_drive import with_drive
speculate_on_all(pytest.MonkeyPatch())
training = Training.of(tiers=with_drive(sys.argv[1] + "/drive"))
for _ in range(3):
    training.backward()
    training.step()
torch.save([p._local_tensor for p in training.parameters], sys.argv[1] + "/parameters.pt")
write = os.pwritev
def amid(file, parts, offset):
    write(file, [bytes(parts[0])[:100]], offset)  # a part of a chunk
    os.kill(os.getpid(), signal.SIGKILL)
os.pwritev = amid
training.backward()
training.step()
"""


def test_a_run_that_was_killed_amid_a_second_version_goes_on(tmp_path):
    environment.stop()
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    root = Path(__file__).parents[2]
    killed = subprocess.run(command, cwd=root, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    training = Training.of(tiers=with_drive(tmp_path / "drive"), resume=True)
    assert training.engine.stored_steps == 3
    values = torch.load(tmp_path / "parameters.pt")
    for p, value in zip(training.parameters, values, strict=True):
        assert torch.equal(p._local_tensor, value)
    training.backward()
    training.optimizer.step()
    assert training.engine.stored_steps == 4
