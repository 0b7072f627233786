"""The optimizer's step beside the backward: whatever the caller does before `step()`, its results
are those of a step after the backward, bit by bit."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from autopar import ClusterInfo, auto_engine
from autopar.cluster.tiers import HOST, NVME, StateBytes, Tier
from autopar.comm import world as environment
from autopar.runtime import chunks, speculative_step
from autopar.runtime.second_version import Part
from autopar.runtime.speculative_step import SpeculativeStep
from autopar.runtime.step_on_shards import StepOnShards
from autopar.schedule import host_step

CHUNK_BYTES = 3000
ACCEPTED: list[Part] = []  # by the last step


@dataclass
class Training:
    """An engine, and an optimizer on plain tensors that gets the same gradients."""

    engine: nn.Module
    optimizer: torch.optim.Optimizer
    alone: list[torch.Tensor]
    beside: torch.optim.Optimizer
    speculative: SpeculativeStep | None
    number: int = 0

    @staticmethod
    def of(
        kind: type[torch.optim.Optimizer] = torch.optim.AdamW,
        tiers: tuple[Tier, ...] = (Tier(HOST, 1e15, 1e-9),),
        resume: bool = False,
        **options,
    ) -> "Training":
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 4)
        ).double()
        model[2].bias.requires_grad_(False)
        groups = [
            {"params": [p for p in model.parameters() if p.ndim == n], **more}
            for n, more in ((2, {"weight_decay": 0.1}), (1, {"lr": 3e-3}))
        ]
        values = [[p.detach().clone() for p in group["params"]] for group in groups]
        twins = [{**g, "params": v} for g, v in zip(groups, values, strict=True)]
        fused = {"fused": True} if kind in chunks._FUSED_ON_HOST else {}
        optimizer = kind(groups, lr=1e-2, **options)
        beside = kind(twins, lr=1e-2, **options, **fused)
        tiers = replace(tiers[0], memory_bandwidth=1e13), *tiers[1:]
        cluster = ClusterInfo.of("1")
        device = replace(cluster.device, overlaps=True)
        cluster = replace(cluster, device=device, tiers=tiers)
        engine, optimizer = auto_engine(
            model, optimizer, cluster, memory=40e3, progress=False, microbatches=1, resume=resume
        )
        made = Training(engine, optimizer, [p for v in values for p in v], beside, None)
        engine.plan_for(made.batch())
        made.speculative = StepOnShards.of(optimizer)._speculative
        return made

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def batch(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.number)
        return torch.randn(8, 16, dtype=torch.float64, generator=generator)

    def backward(self) -> None:
        """Gradients of another batch, of both; all chunks are stepped, so that none reads what is
        written to later."""
        self.number += 1
        self.engine(self.batch()).square().mean().backward()
        trial = self.speculative and self.speculative._trial
        for chunk in trial.chunks if trial else ():
            if chunk.future is not None:
                chunk.future.exception()
        for p, q in zip(self.parameters, self.alone, strict=True):
            q.grad = None if p.grad is None else p.grad._local_tensor.clone()

    def both(self, change: Callable[[list[torch.Tensor], torch.optim.Optimizer], None]) -> None:
        change(self.parameters, self.optimizer)
        change(self.alone, self.beside)

    def step(self) -> int:
        """Step both, which are equal then; how many parameters were stepped beside the backward."""
        ACCEPTED.clear()
        for optimizer in (self.optimizer, self.beside):
            optimizer.step()
            optimizer.zero_grad()
        for p, q in zip(self.parameters, self.alone, strict=True):
            assert torch.equal(p._local_tensor, q)
            state = self.optimizer.state.get(p, {})
            for key, value in self.beside.state.get(q, {}).items():
                assert torch.equal(getattr(state[key], "_local_tensor", state[key]), value), key
        return len(ACCEPTED)


def speculate_on_all(patch: pytest.MonkeyPatch) -> None:
    """Small chunks, and notes of those that are accepted."""
    patch.setattr(chunks, "CHUNK_BYTES", CHUNK_BYTES)
    patch.setattr(speculative_step, "chunk_bytes", lambda _: CHUNK_BYTES)
    patch.setattr(host_step, "chunk_bytes", lambda _: CHUNK_BYTES)
    patch.setattr(host_step, "CHUNK_BYTES", CHUNK_BYTES)
    patch.setattr(host_step, "BOOKKEEPING_US", 0.0)
    patch.setattr(speculative_step, "_TIMED", 0)
    accept = Part.accept

    def noted(part, state):
        ACCEPTED.append(part)
        accept(part, state)

    patch.setattr(Part, "accept", noted)


@pytest.fixture(scope="module", autouse=True)
def whole_chunks() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    speculate_on_all(patch)
    yield
    patch.undo()
    environment.stop()


@pytest.fixture(scope="module")
def adamw() -> Iterator[Training]:
    training = Training.of()
    yield training
    environment.stop()


@pytest.fixture
def trained(adamw):
    """A training that speculates from the next backward on, and has state."""
    speculative = adamw.speculative
    speculative._rest, speculative._pause, speculative._keep = 0, 1, False
    speculative._told = False
    adamw.optimizer.zero_grad()
    adamw.backward()
    adamw.step()
    speculative._rest, speculative._pause, speculative._keep = 0, 1, False
    return adamw


EVERY = 5  # parameters that are trained


def scaled(factor: float, get: Callable = lambda p: p.grad) -> Callable:
    def change(parameters, optimizer):
        for p in parameters:
            if p.grad is not None:
                get(p).mul_(factor)

    return change


def clipped(norm: float) -> Callable:
    return lambda parameters, _: nn.utils.clip_grad_norm_(parameters, norm) and None


def plain(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


def replaced(parameters, optimizer):
    for p in parameters:
        p.grad = None if p.grad is None else p.grad * 1.0


def without_one(parameters, optimizer):
    parameters[0].grad = None


def faster(parameters, optimizer):
    group = optimizer.param_groups[0]
    group["lr"] = 0.02 if group["lr"] == 0.01 else 0.01


def first_state(parameters, optimizer):
    optimizer.state[parameters[0]]["exp_avg"].mul_(0.5)


def loaded(parameters, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def saved(parameters, optimizer):
    optimizer.state_dict()


def looked(parameters, optimizer):
    assert all(p.norm().item() >= 0 for p in parameters)
    assert all(p.grad is None or p.grad.norm().item() > 0 for p in parameters)


def no_tensors(parameters, optimizer):
    pass


# What happens between backward and step, and how many parameters may be taken over then. Chunks are
# compared from the last one on, until one differs.
CHANGES = {
    "nothing": (no_tensors, EVERY),
    "norms read": (looked, EVERY),
    "state saved": (saved, 0),
    "another learning rate": (faster, 0),
    "gradients scaled": (scaled(0.5), 0),
    "their data scaled": (scaled(0.5, lambda p: p.grad.data), 0),
    "their shards' data scaled": (scaled(0.5, lambda p: plain(p.grad).data), 0),
    "gradients replaced": (replaced, 0),
    "a gradient removed": (without_one, EVERY - 1),
    "parameters scaled": (scaled(0.9, lambda p: p.data), 0),
    "their shards' data scaled too": (scaled(0.9, lambda p: plain(p.data).data), 0),
    "state written to": (first_state, EVERY - 1),
    "state loaded": (loaded, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_done_before_the_step_counts(trained, name):
    change, most = CHANGES[name]
    for compares in (False, True):  # gradients that were written to
        trained.speculative._rest, trained.speculative._keep = 0, compares
        trained.backward()
        with torch.no_grad():
            trained.both(change)
        count = trained.step()
        assert compares or (count == EVERY if most == EVERY else count <= most)


def test_memory_that_others_share_is_not_exchanged(trained):
    views = [p.data for p in trained.parameters]
    trained.backward()
    with torch.no_grad():
        for x in (*views, *trained.alone):
            plain(x).data.mul_(0.9)
    assert trained.step() == 0
    assert all(torch.equal(plain(v), p) for v, p in zip(views, trained.alone, strict=True))


def test_gradients_that_are_clipped_by_nothing_are_as_they_were(trained, caplog):
    counts = []
    for norm in (1e9, 1e9, 1e9, 1e-3, 1e9, 1e9):
        trained.backward()
        trained.both(clipped(norm))
        counts.append(trained.step())
    # the second time, what was read is compared; after clipping, it rests
    assert counts == [0, EVERY, EVERY, 0, 0, 0]
    (record,) = caplog.records
    assert "gradients were written to. It is tried again" in record.getMessage()


def test_it_rests_longer_each_time_that_it_is_in_vain(trained, caplog):
    tried = []
    for _ in range(40):
        tried.append(not trained.speculative._rest)
        trained.backward()
        trained.both(faster)
        assert trained.step() == 0
    assert [k for k, was in enumerate(tried) if was] == [0, 5, 22]
    assert len(caplog.records) == 1 and "lr was changed" in caplog.text


def test_schedules_of_the_learning_rate(trained):
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda k: 0.9**k)
        for o in (trained.optimizer, trained.beside)
    ]
    for _ in range(3):
        trained.backward()
        assert trained.step() == EVERY
        for schedule in schedules:
            schedule.step()


def test_gradients_of_two_backwards_and_of_a_dropped_step(trained):
    for _ in range(2):  # gradients add up
        trained.backward()
        trained.backward()
        assert trained.step() == 0
    trained.speculative._rest = 0
    trained.backward()
    trained.optimizer.zero_grad()
    trained.speculative._rest = 0
    trained.backward()
    trained.speculative._rest = 0
    trained.optimizer.zero_grad()
    trained.backward()
    assert trained.step() == EVERY


def test_a_backward_that_fails(trained, monkeypatch):
    def failing(*_):
        raise RuntimeError("amid the backward")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="amid the backward"):
        patch.setattr(trained.speculative._thread, "submit", failing)
        trained.backward()
    trained.optimizer.zero_grad()
    trained.backward()
    assert trained.step() == EVERY


def test_a_thread_that_fails_leaves_the_step_to_the_optimizer(trained, monkeypatch, caplog):
    def failing(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(speculative_step, "step_parts", failing)
    trained.backward()
    assert trained.step() == 0
    assert "could not be stepped there (no room)" in caplog.text


def test_a_hook_that_comes_later_sees_all_gradients(trained):
    """And may change them."""
    seen = []

    def hook(optimizer, *_):
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        seen.append(sum(p.grad is not None for p in parameters))

    handle = trained.optimizer.register_step_pre_hook(hook)
    trained.backward()
    assert trained.step() == EVERY and seen == [EVERY]
    handle.remove()
    hooks = []
    for optimizer, parameters in (
        (trained.optimizer, trained.parameters), (trained.beside, trained.alone),
    ):  # fmt: skip
        hooks.append(optimizer.register_step_pre_hook(
            lambda *_, own=parameters: scaled(0.5)(own, None)))  # fmt: skip
    trained.backward()
    assert trained.step() == 0
    for handle in hooks:
        handle.remove()


@pytest.mark.parametrize("slower", [True, False])
def test_the_faster_way_is_kept(trained, monkeypatch, slower):
    monkeypatch.setattr(speculative_step, "_TIMED", 2)
    trained.speculative._seconds = {True: [], False: []}
    now = itertools.count()
    accepted = SpeculativeStep.accepted

    def timed(speculative, *args):
        chunks = accepted(speculative, *args)
        for _ in range(10 if bool(chunks) == slower else 0):
            next(now)
        return chunks

    monkeypatch.setattr(SpeculativeStep, "accepted", timed)
    monkeypatch.setattr(speculative_step.time, "perf_counter", lambda: next(now))
    counts = []
    for _ in range(6):
        trained.backward()
        counts.append(trained.step())
    kept = 0 if slower else EVERY
    assert counts == [EVERY, EVERY, 0, 0, kept, kept]


def test_a_group_that_is_added_is_stepped(trained):
    trained.backward()
    extra = [torch.ones(3, dtype=torch.float64) for _ in range(2)]
    for x, optimizer in zip(extra, (trained.optimizer, trained.beside), strict=True):
        x.grad = torch.ones_like(x)
        optimizer.add_param_group({"params": [x]})
    trained.alone.append(extra[1])
    ACCEPTED.clear()
    for optimizer in (trained.optimizer, trained.beside):
        optimizer.step()
        del optimizer.param_groups[-1]
    trained.alone.pop()
    assert not ACCEPTED and torch.equal(*extra)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.NAdam])
def test_optimizers(kind):
    environment.stop()
    training = Training.of(kind, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    for _ in range(4):
        training.backward()
        assert training.step() == EVERY


def test_momentum_of_some_parameters():
    """The fused step of torch takes that of all or of none."""
    environment.stop()
    training = Training.of(torch.optim.SGD, momentum=0.9, dampening=0.5)
    training.beside.param_groups[0]["fused"] = training.beside.param_groups[1]["fused"] = None
    for step in range(3):
        training.backward()
        if step == 0:
            training.both(without_one)
        training.optimizer.step()
        training.beside.step()
        training.both(lambda _, optimizer: optimizer.zero_grad())
        for p, q in zip(training.parameters, training.alone, strict=True):
            torch.testing.assert_close(p._local_tensor, q, rtol=0, atol=1e-15)


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
from tests.unit.test_speculative_step import Training, speculate_on_all, with_drive
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


def test_room_is_that_of_the_host():
    environment.stop()
    for capacity, accepted in ((100e3, EVERY), (71e3, 0)):
        training = Training.of(tiers=(Tier(HOST, 1e15, 1e-9, capacity=capacity),))
        for _ in range(2):
            training.backward()
            count = training.step()
        assert (count > 0) == bool(accepted)
        environment.stop()


def test_a_step_that_overlaps_is_predicted():
    states = StateBytes(4e9, 4e9, 8e9)
    tiers = (Tier(HOST, 25e9),)
    us = states.step_us(tiers, HOST)
    assert us == pytest.approx(1e6 * (2 * 12e9 + 4e9) / 20e9)
    assert states.second_step_us(tiers, HOST) == pytest.approx(1e6 * (4 * 12e9 + 4e9) / 20e9)
    assert host_step.chunk_bytes(1e15) == host_step.CHUNK_BYTES
