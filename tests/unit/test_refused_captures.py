"""Constructs that would be captured without a part of their gradients are refused by line."""

import pytest
import torch
from torch import nn

from autopar.errors import CaptureError
from autopar.tracer import ColoTracer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.change(self.layer(x)).pow(2).mean()


class Strided(Net):
    def change(self, h):
        h = h.clone()
        h.as_strided((4,), (17,)).add_(1)
        return h


class Hooks(Net):
    def change(self, h):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: 2 * t):
            return h.sin()


class Retained(Net):
    def change(self, h):
        h.retain_grad()
        self.kept = h
        return h


class Inner(Net):
    def change(self, h):
        return torch.autograd.grad(h.pow(3).sum(), h, create_graph=True)[0]


class Transformed(Net):
    def change(self, h):
        return torch.func.grad(lambda t: t.pow(3).sum())(h)


class OnCPU(Net):
    def change(self, h):
        with torch.autograd.graph.save_on_cpu():
            return h.sin()


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Strided, "through as_strided"),
        (Hooks, "saved tensors"),
        (Retained, "register_hook"),
        (Inner, "runs a backward inside"),
        (Transformed, "runs a backward inside"),
    ],
)
def test_they_are_refused(cls, reason):
    with pytest.raises(CaptureError, match=rf"test_refused_captures.py:\d+.*{reason}"):
        ColoTracer().trace(cls(), (torch.randn(8, 6),))


def test_hooks_that_change_nothing_are_captured():
    model, x = OnCPU(), torch.randn(8, 6)
    graph = ColoTracer().trace(model, (x,))
    assert torch.equal(graph.bind(model)(x), model(x))
