"""Buffers with several names: a module that is used under two, and a tensor registered twice."""

import copy

import pytest
import torch
from torch import Tensor, nn

from autopar import auto_engine
from autopar.comm import world
from autopar.errors import CaptureError


@pytest.fixture(autouse=True, scope="module")
def _no_process_group_left():
    yield
    world.stop()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x) * self.scale


class Twice(nn.Module):
    """A module under two names."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = part, nn.Linear(8, 8), part

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x))).square().mean()


class Registered(nn.Module):
    """A tensor of two modules."""

    def __init__(self, changes: bool = False) -> None:
        super().__init__()
        self.linear, self.part, self.changes = nn.Linear(8, 8), nn.Module(), changes
        self.register_buffer("own", torch.linspace(0.5, 1.5, 8))
        self.part.register_buffer("other", self.own)

    def forward(self, x: Tensor) -> Tensor:
        if self.changes:
            self.own.mul_(0.5)
        return (self.linear(x) * self.own + self.part.other).square().mean()


MODELS = {
    "constants": lambda: Twice(Scaled()),
    "statistics": lambda: Twice(nn.BatchNorm1d(8)),
    "registered twice": Registered,
}


@pytest.mark.parametrize("options", [{}, {"microbatches": 2}, {"memory": "1GiB"}])
@pytest.mark.parametrize("name", MODELS)
def test_training(name: str, options: dict) -> None:
    if name == "statistics" and "microbatches" in options:
        options = {**options, "microbatch": "independent"}
    torch.manual_seed(0)
    model = MODELS[name]().double()
    alone = copy.deepcopy(model)
    engine, optimizer = auto_engine(model, torch.optim.SGD(model.parameters(), 0.1), "1", **options)
    other = torch.optim.SGD(alone.parameters(), 0.1)
    for _ in range(3):
        x = torch.randn(8, 8, dtype=torch.float64)
        if "microbatch" in options:
            for part in x.chunk(2):
                (alone(part) / 2).backward()
        else:
            alone(x).backward()
        engine(x).backward()
        for each in (other, optimizer):
            each.step()
            each.zero_grad()
    found, expected = engine.full_state_dict(), alone.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-12)


def test_a_change_of_one_that_is_registered_twice_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"registered more than once \(own, part.other\)"):
        engine, _ = auto_engine(Registered(changes=True), None, "1")
        engine(torch.randn(8, 8))
