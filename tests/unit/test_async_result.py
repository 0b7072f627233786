"""Results whose sum still runs: using one waits for its value, and a backward does not."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch

from autopar.errors import EngineError
from autopar.runtime.async_result import AsyncResult

VALUE = 2.25


class Pending(AsyncResult):
    """Its value is there after a wait, which is counted."""

    waits = 0
    error: Exception | None = None

    def trigger_wait(self):
        type(self).waits += 1
        if type(self).error is not None:
            raise type(self).error
        self.elem.fill_(VALUE)
        return self.elem


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return Pending(torch.full_like(weight, 99.0))  # this rank's term

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


@pytest.fixture
def weight():
    Pending.waits, Pending.error = 0, None
    return torch.ones((), dtype=torch.float64, requires_grad=True)


def saved(loss: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(loss.detach(), file)
    file.seek(0)
    return torch.load(file)


READS = {
    "item": lambda x: x.item(),
    "float": float,
    "format": lambda x: float(f"{x:.3f}"),
    "format of a detached one": lambda x: float(f"{x.detach():.3f}"),
    "print": lambda x: float(str(x).removeprefix("tensor(").split(",")[0]),
    "math": lambda x: math.sqrt(x) ** 2,
    "tolist": lambda x: x.tolist(),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "view": lambda x: x.view(1),
    "cpu": lambda x: x.detach().cpu().numpy(),
    "numpy": lambda x: x.numpy(force=True),
    "array": lambda x: np.asarray(x.detach()),
    "dlpack": lambda x: torch.from_dlpack(x.detach()),
    "tensor": torch.tensor,
    "stack": lambda x: torch.stack([x, x]).mean(),
    "sum of a list": lambda x: sum([x, x]) / 2,
    "plus": lambda x: 1 + x - 1,
    "into a total": lambda x: torch.zeros((), dtype=torch.float64).add_(x),
    "by the dispatcher": lambda x: torch.ops.aten.clone(x),
    "save": saved,
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())),
    "copy": lambda x: copy.deepcopy(x.detach()),
    "comparison": lambda x: VALUE if x == VALUE else None,
    "scaled": lambda x: x * 4 / 4,
}


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("read", READS)
def test_using_it_waits(weight, read):
    loss = _Double.apply(weight)
    assert float(READS[read](loss)) == VALUE
    assert Pending.waits


def test_its_description_does_not_wait(weight):
    loss = _Double.apply(weight)
    assert loss.requires_grad
    assert (loss.dtype, loss.shape) == (torch.float64, ())
    assert not Pending.waits


@pytest.mark.parametrize("how", ["method", "function", "of two", "grad"])
def test_a_backward_starts_without_it(weight, how):
    loss = _Double.apply(weight)
    if how == "function":
        torch.autograd.backward(loss)
    elif how == "of two":
        torch.autograd.backward([loss, _Double.apply(weight)])
    elif how == "grad":
        (weight.grad,) = torch.autograd.grad(loss, weight)
    else:
        loss.backward()
    assert weight.grad == (4 if how == "of two" else 2)
    assert not Pending.waits
    assert loss.item() == VALUE


def test_a_scaled_loss_has_its_gradient(weight):
    (_Double.apply(weight) / 4).backward()
    assert weight.grad == 0.5


def test_a_further_program_differentiates_through_it(weight):
    (_Double.apply(weight) ** 2).backward()
    assert weight.grad == 2 * 2 * VALUE


def test_an_error_is_raised_whenever_it_is_used(weight):
    loss = _Double.apply(weight)
    Pending.error = EngineError("rank 1 is gone")
    for _ in range(2):
        with pytest.raises(EngineError, match="rank 1 is gone"):
            loss.item()
