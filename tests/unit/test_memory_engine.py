"""One device with a budget: `auto_engine(model, optimizer, "1", memory=...)`."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from autopar import ClusterInfo, auto_engine
from autopar.cluster.link import Link
from autopar.comm import world as environment
from autopar.errors import InfeasibleError
from autopar.planner.joint import JointPlan, plan_jointly
from autopar.planner.planner import build_problem
from autopar.testing.live_memory import LiveMemory, training_state_bytes
from tests.models import CASES, OPTIMIZERS, LanguageModel

STEPS = 2


@pytest.fixture(autouse=True, scope="module")
def _no_process_group_left() -> Iterator[None]:
    yield
    environment.stop()


@pytest.mark.parametrize("share", [1.0, 1.2])
def test_microbatches_take_what_is_planned(share: float) -> None:
    """Sums of gradients are most of the memory: products add to them in place."""

    def built() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layers = (nn.Sequential(nn.Linear(48, 48), nn.GELU(), nn.LayerNorm(48)) for _ in range(4))
        model = nn.Sequential(*layers, nn.Linear(48, 7)).double()
        return model, torch.optim.AdamW(model.parameters())

    x = torch.randn(8, 48, dtype=torch.float64)
    options = {"microbatches": 4, "time_limit": 8, "example_inputs": (x,)}
    with pytest.raises(InfeasibleError) as refused:
        auto_engine(*built(), "1", memory="1kB", **options)
    memory = share * refused.value.smallest_bytes
    engine, optimizer = auto_engine(*built(), "1", memory=memory, **options)
    for _ in range(STEPS):
        with LiveMemory() as live:
            engine(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    held = sum(training_state_bytes(engine, optimizer).values())
    assert engine.plan.memory.total_bytes <= memory
    assert held + live.peak + x.nbytes == pytest.approx(engine.plan.memory.total_bytes, rel=0.02)


@pytest.mark.parametrize("spelled", ["einsum", "bmm"])
def test_gradients_take_what_is_planned_whatever_their_strides(spelled: str) -> None:
    """Those of `einsum` are transposed: they are copied before the next one is computed."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(4, 30, 50, dtype=torch.float64))
            self.second = nn.Parameter(torch.randn(4, 50, 30, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if spelled == "bmm":
                inside = torch.bmm(x.expand(4, *x.shape), self.first).relu()
                return torch.bmm(inside, self.second).square().mean()
            inside = torch.einsum("bd,edh->ebh", x, self.first).relu()
            return torch.einsum("ebh,ehd->ebd", inside, self.second).square().mean()

    torch.manual_seed(0)
    plain, x = Experts(), torch.randn(12, 30, dtype=torch.float64)
    expected = torch.autograd.grad(plain(x), list(plain.parameters()))
    engine, _ = auto_engine(plain, None, "1", memory=2**30)
    engine(x).backward()
    for p in engine.parameters():
        p.grad = None
    with LiveMemory() as live:
        engine(x).backward()
    assert live.peak == pytest.approx(engine.memory_plan.peak_bytes, abs=64)
    for p, gradient in zip(engine.parameters(), expected, strict=True):
        assert p.grad.to_local().is_contiguous()
        torch.testing.assert_close(p.grad.to_local(), gradient, rtol=0, atol=1e-12)


class MaskedAttention(nn.Module):
    """Attention with dropout and a mask, after one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).movedim(-3, 0).transpose(2, 3)
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout_p=0.3)


@pytest.mark.parametrize("masked", ["bool", "float32"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_queries_that_see_no_key_are_zero_with_dropout(dtype: torch.dtype, masked: str) -> None:
    """As torch has it; a float32 mask may be beside queries of fewer bits."""
    torch.manual_seed(0)
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    seen[4:] = False
    kind = torch.float64 if dtype is torch.float64 else torch.float32
    mask = (
        seen if masked == "bool" else torch.zeros(6, 6, dtype=kind).masked_fill(~seen, -torch.inf)
    )
    x = torch.randn(2, 6, 8, dtype=dtype)
    engine, _ = auto_engine(MaskedAttention().to(dtype), None, "1")
    result = engine(x, mask)
    result.float().square().mean().backward()
    assert result.dtype is dtype and not result[:, :, 4:].any() and result[:, :, :4].any()
    assert engine.qkv.weight.grad.to_local().isfinite().all()


def train(
    name: str, memory: float, dropout: float = 0.0, cluster: ClusterInfo | str = "1"
) -> tuple[list, dict, int, bool]:
    """Gradients of every step, buffers, the peak of the last, and whether regions are in slices."""
    case = CASES[name]
    torch.manual_seed(0)
    model = LanguageModel(layers=2, dropout=dropout) if name == "gpt2" else case.make()
    model = model.double().train()
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    torch.manual_seed(7)
    engine, optimizer = auto_engine(model, optimizer, cluster, memory=memory, time_limit=8)
    grads, peak = [], 0
    for step in range(STEPS):
        optimizer.zero_grad()
        with LiveMemory() as live:
            loss = engine(**case.batch(step))
            on_host = engine.memory_plan.state_on_host
            if step:
                held = training_state_bytes(engine, optimizer)["optimizer"]
                assert (held == 0) is on_host
            loss.backward()
        peak = live.peak
        assert engine.plan.memory.total_bytes <= memory
        assert engine.plan.step.peak_bytes == engine.memory_plan.peak_bytes
        grads.append([p.grad.to_local().clone() for p in model.parameters()])
        optimizer.step()
    saved = optimizer.state_dict()["state"][0]["exp_avg"]
    assert saved.to_local().abs().sum() > 0
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    return grads, buffers, peak, bool(engine.plan.time_splits)


@pytest.mark.parametrize(("name", "dropout"), [("gpt2", 0.3), ("resnet", 0.0)])
def test_training_is_the_same_in_the_smallest_budget(name, dropout):
    expected, buffers, eager_peak, _ = train(name, 2**30, dropout)
    with pytest.raises(InfeasibleError, match=r"parameters take .* Give ") as error:
        train(name, 1000, dropout)
    smallest = error.value.smallest_bytes
    grads, updated, peak, in_slices = train(name, smallest, dropout)
    assert peak < eager_peak
    for step_grads, reference_grads in zip(grads, expected, strict=True):
        for grad, reference in zip(step_grads, reference_grads, strict=True):
            torch.testing.assert_close(grad, reference, rtol=0, atol=1e-9)
    for name, buffer in buffers.items():
        # slices add statistics up in another order
        atol = 1e-9 if in_slices else 0.0
        torch.testing.assert_close(updated[name], buffer, rtol=0, atol=atol)


def test_the_optimizers_state_goes_to_the_host():
    """Where a budget is too small for it beside what the model makes."""
    host = replace(ClusterInfo.of("1"), host_link=Link(1e-9, 1e-15))
    expected, *_ = train("mlp", 2**30)
    with pytest.raises(InfeasibleError) as error:
        train("mlp", 1000)
    budget = 0.97 * error.value.smallest_bytes
    with pytest.raises(InfeasibleError):
        train("mlp", budget)
    grads, *_ = train("mlp", budget, cluster=host)
    for step_grads, reference_grads in zip(grads, expected, strict=True):
        for grad, reference in zip(step_grads, reference_grads, strict=True):
            torch.testing.assert_close(grad, reference, rtol=0, atol=1e-9)


def test_a_plan_with_a_schedule_keeps_to_its_budget():
    case = CASES["gpt2"]
    model = case.build()
    cluster = ClusterInfo.of("1")

    def joint_plan(budget: float) -> JointPlan:
        problem = build_problem(
            model, (), case.batch(0), cluster=cluster.with_memory(budget), time_limit=8
        )
        return plan_jointly(problem)

    with pytest.raises(InfeasibleError) as error:
        joint_plan(1000)
    plan = joint_plan(error.value.smallest_bytes).planned.plan
    assert plan.step.added_us > 0
    engine, _ = auto_engine(model, OPTIMIZERS["adamw"](list(model.parameters())), "1", plan=plan)
    engine.plan_for(**case.batch(0))
    assert engine.memory_plan.peak_bytes == plan.step.peak_bytes < plan.step.eager_bytes


class Activated(nn.Module):
    """Returns a value of which its backward works out another one (GELU, written out)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        h = self.up(x)
        y = 0.5 * h * (1 + torch.tanh(0.79 * (h + 0.045 * h.pow(3))))
        return self.down(y).pow(2).mean(), h


def test_what_the_caller_holds_is_not_written_over():
    """Not by the backward either, which may run twice."""
    torch.manual_seed(0)
    model = Activated().double()
    engine, _ = auto_engine(model, torch.optim.SGD(model.parameters()), "1", memory=0.5)
    loss, hidden = engine(torch.randn(8, 12, 64).double())
    before = hidden.detach().clone()
    grads = []
    for again in (True, False):
        model.zero_grad()
        loss.backward(retain_graph=again)
        grads.append([p.grad.to_local().clone() for p in model.parameters()])
    assert torch.equal(hidden, before)
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)
