"""The optimizer's step beside the backward: whatever the caller does before `step()`, its results
are those of a step after the backward, bit by bit."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from autopar.cluster.tiers import HOST, StateBytes, Tier
from autopar.comm import world as environment
from autopar.runtime import speculative_step
from autopar.runtime.speculative_step import SpeculativeStep
from autopar.schedule import host_step
from tests.speculation import ACCEPTED, EVERY, Training
from tests.speculation import whole_chunks as whole_chunks  # a fixture of every test here


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
