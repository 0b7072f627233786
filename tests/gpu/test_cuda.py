"""On a GPU: the same mathematics, budgets that hold, copies to the host, and kernels of Inductor.

Everything here is skipped without one; `make test-gpu` runs it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from autopar import ClusterInfo, auto_engine
from autopar.cluster.link import Link
from autopar.cluster.local import as_cluster
from autopar.cluster.tiers import Tier
from autopar.comm import world as environment
from autopar.comm.offloaded_parameters import evicted_shard
from autopar.errors import InfeasibleError
from autopar.testing.live_memory import LiveMemory
from tests.models import CASES, OPTIMIZERS, Classifier, LanguageModel, words

pytestmark = pytest.mark.gpu

STEPS = 3
# copies take next to nothing, so offloading a value costs less than recomputing it
FAST = Link(1e-9, 1e-15)


@pytest.fixture(autouse=True)
def _no_process_group_left() -> Iterator[None]:
    yield
    environment.stop()


def built(name: str, dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "gpt2":
        return LanguageModel(layers=3, dropout=dropout).double().train()
    return CASES[name].build()


def batch(name: str, step: int) -> dict[str, torch.Tensor]:
    """Large enough that what the step makes is more than blocks of the allocator."""
    small = CASES[name].batch(step)
    return {k: v.repeat(32, *[1] * (v.ndim - 1)).cuda() for k, v in small.items()}


def values(tensors: Any) -> list[torch.Tensor]:
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, name: str
) -> tuple[list[torch.Tensor], int]:
    """Losses, then the last gradients, parameters and buffers; bytes that the last step made."""
    losses: list[torch.Tensor] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        data = batch(name, step)
        with LiveMemory() as live, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = model(**data)
            loss.backward()
        peak = live.peak
        losses.append(loss.detach())
        grads = values(p.grad for p in model.parameters())
        optimizer.step()
    state = [*grads, *values(model.parameters()), *values(model.buffers())]
    return [*losses, *(t.detach().clone() for t in state)], peak


def engine(
    name: str, cluster: ClusterInfo, *, dropout: float = 0.0, **options: Any
) -> tuple[Any, Any]:
    model = built(name, dropout)
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    torch.manual_seed(7)
    return auto_engine(model, optimizer, cluster, example_inputs=batch(name, 0), **options)


def copied(model: torch.nn.Module) -> int:
    """Buffers that the step updates are copied for it."""
    return sum(b.nbytes for b in model.buffers())


def smallest(name: str, cluster: ClusterInfo, dropout: float = 0.0) -> float:
    with pytest.raises(InfeasibleError) as error:
        engine(name, cluster, dropout=dropout, memory="1kB")
    environment.stop()
    assert error.value.smallest_bytes is not None
    return error.value.smallest_bytes


def equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_a_mesh_by_name_is_of_the_gpu_that_is_here():
    device = as_cluster("1").device
    assert device.kind == "cuda"
    assert device.memory_bytes == torch.cuda.get_device_properties(0).total_memory


@pytest.mark.parametrize("compiled", [False, True, "auto"], ids=["eager", "inductor", "auto"])
@pytest.mark.parametrize("name", list(CASES))
def test_equals_plain_training(name, compiled):
    plain = copy.deepcopy(built(name)).cuda()
    expected, _ = train(plain, OPTIMIZERS["adamw"](list(plain.parameters())), name)
    model, optimizer = engine(name, as_cluster("1"), compile=compiled)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    equal(train(model, optimizer, name)[0], expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])
@pytest.mark.parametrize(("name", "dropout"), [("gpt2", 0.0), ("gpt2", 0.3), ("resnet", 0.0)])
def test_training_is_the_same_in_the_smallest_budget(name, dropout, compiled):
    cluster = as_cluster("1")
    expected, ample_peak = train(*engine(name, cluster, dropout=dropout, memory="10GiB"), name)
    environment.stop()
    memory = smallest(name, cluster, dropout)
    model, optimizer = engine(name, cluster, dropout=dropout, memory=memory, compile=compiled)
    assert model.memory_plan.added_us > 0
    actual, peak = train(model, optimizer, name)
    equal(actual, expected)
    if not compiled:  # what Inductor's kernels make is not dispatched
        assert peak < ample_peak
        assert peak == pytest.approx(model.memory_plan.peak_bytes + copied(model), rel=0.03)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])
@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_through_the_host(name, compiled):
    cluster = as_cluster("1")
    model, optimizer = engine(name, cluster, memory="10GiB")
    expected, _ = train(model, optimizer, name)
    environment.stop()
    low = smallest(name, cluster)
    near = replace(cluster, host_link=FAST)
    model, optimizer = engine(name, near, memory=1.01 * low, compile=compiled)
    plan = model.memory_plan
    moved = sum(m.offloads_bytes for m in plan.timeline.events)
    assert moved > 0 or plan.state_on_host
    actual, peak = train(model, optimizer, name)
    equal(actual, expected)
    if not compiled and not plan.state_on_host:
        assert peak == pytest.approx(plan.peak_bytes + copied(model), rel=0.03)


def classifier() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Classifier(1024, 4000).double()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def steps_with_a_look(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int
) -> tuple[list[torch.Tensor], int]:
    """Losses and gradients of steps; in every second one, weights are read between forward and
    backward. Bytes that the last step made."""
    actual = []
    for step in range(count):
        optimizer.zero_grad()
        data = {k: v.cuda() for k, v in words(step, 2048).items()}
        with LiveMemory() as live:
            loss = model(**data)
            if step % 2 == 0:
                actual.append(sum(values(p.pow(2).sum() for p in model.parameters())).detach())
            loss.backward()
        actual += [loss.detach(), *(g.clone() for g in values(p.grad for p in model.parameters()))]
        optimizer.step()
    return actual, live.peak


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])
def test_parameters_through_the_host(compiled):
    plain, beside = classifier()
    expected, _ = steps_with_a_look(plain.cuda(), beside, 8)
    near = replace(as_cluster("1"), host_link=FAST)
    example = {k: v.cuda() for k, v in words(0, 2048).items()}
    with pytest.raises(InfeasibleError) as error:
        auto_engine(*classifier(), near, memory="1kB", example_inputs=example)
    environment.stop()
    memory = error.value.smallest_bytes
    model, optimizer = auto_engine(
        *classifier(), near, memory=memory, example_inputs=example, compile=compiled
    )
    plan = model.memory_plan
    assert plan.parameters_on_host
    actual, peak = steps_with_a_look(model, optimizer, 8)
    equal(actual, expected)
    if not compiled:
        assert peak == pytest.approx(plan.peak_bytes, rel=0.03)
    loss = model(**example)
    gone = [e.shard for e in map(evicted_shard, model.parameters()) if e is not None]
    assert gone and all(x.untyped_storage().nbytes() == 0 for x in gone)
    loss.backward()
    assert not any(evicted_shard(p) is not None for p in model.parameters())
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in gone)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [7, 512, 1000, 1025, 4097, 50257, 300_001])
def test_softmax_may_write_over_its_operand(width, dtype):
    """The pass that writes results over operands relies on it (autopar/passes/overwrite.py)."""
    aten = torch.ops.aten
    for shape, dim in (((5, width), 1), ((3, width, 4), 1), ((1, width + 1), 1)):
        for log in (True, False):
            forward = aten._log_softmax if log else aten._softmax
            backward = aten._log_softmax_backward_data if log else aten._softmax_backward_data
            x, grad = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
            out = forward(x, dim, False)
            assert torch.equal(forward.out(x, dim, False, out=x), out)
            expected = backward(grad, out, dim, dtype)
            for target in (grad.clone(), out):
                sources = (grad, out) if target is out else (target, out)
                over = backward.out(*sources, dim, dtype, **{_result(backward): target})
                assert torch.equal(over, expected)


def _result(packet: Any) -> str:
    return next(a.name for a in packet.out._schema.arguments if a.is_out)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_states_on_the_host(kind):
    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = Classifier(1024, 4000).double()
        return model, kind(model.parameters(), lr=1e-3)

    plain, beside = made()
    plain = plain.cuda()
    beside = kind(plain.parameters(), lr=1e-3)
    expected, _ = steps_with_a_look(plain, beside, 4)
    states = sum(p.nbytes for p in plain.parameters()) * (4 if kind is torch.optim.AdamW else 2)
    tiered = replace(as_cluster("1"), tiers=(Tier("host", 1e12),))
    model, optimizer = auto_engine(*made(), tiered, memory=0.9 * states)
    actual, peak = steps_with_a_look(model, optimizer, 4)
    assert model.plan.states_on == "host"
    assert all(p.device.type == "cpu" and p.grad.device.type == "cpu" for p in model.parameters())
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x.cuda(), y.cuda(), rtol=0, atol=1e-10)
    assert peak == pytest.approx(model.memory_plan.peak_bytes, rel=0.03)


def test_adamw_is_fused_and_resumes(monkeypatch):
    """Counters of steps are beside the parameters while it runs, and on the host in state dicts."""
    calls, run = [], torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *a, **k: (calls.append(1), run(*a, **k)))
    plain = built("mlp").cuda()
    beside = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    model = built("mlp")
    model, optimizer = auto_engine(model, torch.optim.AdamW(model.parameters(), lr=1e-2), "1")
    for step in range(4):
        for m, o in ((plain, beside), (model, optimizer)):
            o.zero_grad()
            m(**batch("mlp", step)).backward()
            o.step()
        saved = optimizer.state_dict()
        assert all(entries["step"].device.type == "cpu" for entries in saved["state"].values())
        if step == 1:
            optimizer.load_state_dict(saved)
    assert len(calls) == 4
    for p, expected in zip(values(model.parameters()), plain.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-10)
