"""Shared by tests of the capture: a module around a function, its capture, the comparison."""

import torch
from torch import nn

from autopar import ColoTracer


class Holder(nn.Module):
    """A module with a weight whose forward is a plain function of (module, inputs)."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function
        self.register_buffer("limit", torch.tensor(5.0))

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def captured(function, *args, **options):
    torch.manual_seed(0)
    model = Holder(function).double()
    return model, ColoTracer(**options).trace(model, args)


def check(model, graph, *args):
    """Value and gradients equal eager's."""
    actual, expected = graph.bind(model)(*args), model(*args)
    assert torch.equal(actual, expected)
    weights = list(model.parameters())
    for a, b in zip(torch.autograd.grad(actual.sum(), weights),
                    torch.autograd.grad(expected.sum(), weights), strict=True):  # fmt: skip
        assert torch.equal(a, b)


X = torch.arange(24, dtype=torch.float64).reshape(6, 4) / 7
LABELS = torch.tensor([0, 3, 1, 0, 2, 5])
