"""Autocast and bfloat16 through the engine, on one process: as eager PyTorch computes."""

from collections.abc import Iterator

import pytest
import torch

from autopar import auto_engine
from autopar.comm import world
from tests.models import CASES


@pytest.fixture(autouse=True)
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
