"""Results on their way: whatever is done with one, it is done with the value that arrives."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from autopar.comm.async_result import Late, finish_all

from autopar.comm import async_result as late
from autopar.errors import EngineError

VALUE = 2.25


class Way:
    """A loss of two times a weight, whose value arrives when it is waited for."""

    def __init__(self, error: EngineError | None = None) -> None:
        self.weight = torch.ones((), dtype=torch.float64, requires_grad=True)
        self.waited, self.error = 0, error
        result = self.weight * 2
        with torch.no_grad():
            result.fill_(99.0)  # this rank's term, as far as anyone could read it

        def complete() -> None:
            self.waited += 1
            if self.error is not None:
                raise self.error
            result.data.fill_(VALUE)

        self.loss = Late(result, complete)


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    finish_all()


def saved(loss: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(loss.detach(), file)
    file.seek(0)
    return torch.load(file)


def scaled_by_a_tensor(loss: torch.Tensor) -> float:
    scale = torch.tensor(4.0)
    scaled = loss * scale
    scale.zero_()
    return scaled.item() / 4


READS = {
    "item": lambda x: x.item(),
    "float": float,
    "format": lambda x: float(f"{x:.3f}"),
    "print": lambda x: float(str(x).removeprefix("tensor(").split(",")[0]),
    "math": lambda x: math.sqrt(x) ** 2,
    "tolist": lambda x: x.tolist(),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "cpu": lambda x: x.detach().cpu().numpy(),
    "array": lambda x: np.asarray(x.detach()),
    "dlpack": lambda x: torch.from_dlpack(x.detach()),
    "tensor": torch.tensor,
    "tensor of a list": lambda x: torch.tensor([x])[0],
    "as_tensor": torch.as_tensor,
    "stack": lambda x: torch.stack([x, x]).mean(),
    "sum of a list": lambda x: sum([x, x]) / 2,
    "plus": lambda x: 1 + x - 1,
    "into a total": lambda x: torch.zeros((), dtype=torch.float64).add_(x),
    "in a place": lambda x: torch.zeros(2, dtype=torch.float64).index_fill(0, torch.tensor(0), x)[
        0
    ],
    "by the dispatcher": lambda x: torch.ops.aten.clone(x),
    "save": saved,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "copy": lambda x: copy.deepcopy(x.detach()),
    "memory": lambda x: x.untyped_storage().tolist() and x,
    "comparison": lambda x: VALUE if x == VALUE else None,
    "scaled": lambda x: x * 4 / 4,
    "scaled by a tensor": scaled_by_a_tensor,
}


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("read", READS)
def test_whoever_reads_it_waits(read):
    way = Way()
    assert float(READS[read](way.loss)) == VALUE
    assert way.waited
    finish_all()
    assert type(way.loss) is torch.Tensor
    assert way.loss.item() == VALUE


def test_its_description_is_no_reason_to_wait():
    way = Way()
    assert way.loss.requires_grad
    assert (way.loss.dtype, way.loss.shape) == (torch.float64, ())
    assert not way.waited


@pytest.mark.parametrize("how", ["method", "function", "of two", "grad", "accumulated", "scaler"])
def test_a_backward_starts_without_it_and_ends_with_it(how):
    way, other = Way(), Way()
    seen = []
    way.weight.register_hook(lambda grad: seen.append(way.waited))
    loss, factor = way.loss, 1.0
    if how == "accumulated":
        loss, factor = way.loss / 4, 0.25
    elif how == "scaler":
        scale = torch.tensor(8.0)
        loss, factor = way.loss * scale.to(way.loss.device), 8.0
    if how == "function":
        torch.autograd.backward(loss)
    elif how == "of two":
        torch.autograd.backward([loss, other.loss])
        assert other.weight.grad == 2
    elif how == "grad":
        (way.weight.grad,) = torch.autograd.grad(loss, way.weight)
    else:
        loss.backward()
    assert seen == [0]
    assert way.weight.grad == 2 * factor
    assert way.waited
    for x, value in ((way.loss, VALUE), (loss, VALUE * factor)):
        assert type(x) is torch.Tensor
        assert x.item() == value


def test_a_gradient_that_is_a_late_value_is_waited_for():
    way, other = Way(), Way()
    way.loss.backward(other.loss.detach())
    assert way.weight.grad == 2 * VALUE


def test_a_further_program_differentiates_through_it():
    way = Way()
    (way.loss**2).backward()
    assert way.weight.grad == 2 * 2 * VALUE


def test_what_went_wrong_goes_wrong_whenever_it_is_read():
    way = Way(EngineError("rank 1 is gone"))
    for _ in range(2):
        with pytest.raises(EngineError, match="rank 1 is gone"):
            way.loss.item()
    late._pending.clear()
