"""Autocast and bfloat16 through the engine, on one process: as eager PyTorch computes."""

import copy
from collections.abc import Iterator

import pytest
import torch

from autopar import auto_engine
from autopar.comm import world
from tests.models import CASES


@pytest.fixture(autouse=True, scope="module")
def _no_process_group_left() -> Iterator[None]:
    yield
    world.stop()


def _step(model, batch, *, autocast: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def _in(dtype: torch.dtype, name: str):
    """A model and a batch with floating-point values of a dtype."""
    model = CASES[name].build().to(dtype)
    batch = {
        k: x.to(dtype) if x.is_floating_point() else x for k, x in CASES[name].batch(0).items()
    }
    return model, batch


@pytest.mark.parametrize("memory", [None, 2.0**26])
@pytest.mark.parametrize("name", ["mlp", "gpt2", "vit"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_a_step_is_that_of_eager_pytorch(name, autocast, memory):
    dtype = torch.float32 if autocast else torch.bfloat16
    (alone, batch), (model, _) = _in(dtype, name), _in(dtype, name)
    expected, expected_grads = _step(alone, batch, autocast=autocast)
    engine, _ = auto_engine(model, None, "1", memory=memory)
    loss, grads = _step(engine, batch, autocast=autocast)
    assert loss.dtype is expected.dtype
    torch.testing.assert_close(loss, expected)
    for parameter, expected_grad in expected_grads.items():
        grad = grads[parameter].to_local()
        assert grad.dtype is dtype
        torch.testing.assert_close(grad, expected_grad, rtol=2e-2, atol=2e-3)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad.to(w.dtype) @ w.t(), x.t() @ grad.to(x.dtype)


class Regions(torch.nn.Module):
    """Regions with an autocast of their own, and a function that computes under the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(8, 8) for _ in range(3))
        self.w = torch.nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            whole = self.a(x) + x @ x.t()
        with torch.autocast("cpu", torch.float16):
            half = self.b(x)
        return whole, half, self.c(x), _Product.apply(x, self.w)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_regions_keep_their_own_autocast(dtype, grad):
    torch.manual_seed(0)
    alone, x = Regions(), torch.randn(8, 8)
    engine, _ = auto_engine(copy.deepcopy(alone), None, "1")
    with torch.autocast("cpu", dtype), torch.set_grad_enabled(grad):
        results, expected = engine(x), alone(x)
    for result, value in zip(results, expected, strict=True):
        assert result.dtype is value.dtype
        assert torch.equal(result, value)
    if grad:
        sum(r.float().sum() for r in results).backward()
        sum(v.float().sum() for v in expected).backward()
        for p, q in zip(engine.parameters(), alone.parameters(), strict=True):
            assert torch.equal(p.grad.to_local(), q.grad)
