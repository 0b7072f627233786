"""Shared by tests of the capture: a module around a function, its capture, the comparison."""

import torch
from torch import nn

from autopar import ColoTracer, auto_engine


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


class Layers(nn.Module):
    """Two layers, a weight, and what `setup` adds; the forward is a function of (module, x)."""

    def __init__(self, function, setup=None):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.linspace(-1, 1, 8))
        self.register_buffer("mean", torch.zeros(8))
        self.function = function
        if setup is not None:
            setup(self)

    def forward(self, x):
        return self.function(self, x)


ROWS = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(4, 8)


def trains_as_eager(function, setup=None, engine=False, steps=2, atol=1e-13):
    """Losses, gradients, parameters and buffers equal eager's; returns the captured graph."""
    torch.manual_seed(0)
    model = Layers(function, setup).double()
    torch.manual_seed(0)
    eager = Layers(function, setup).double()
    graph = None
    if engine:
        run, _ = auto_engine(model, torch.optim.SGD(model.parameters(), 0.1), "1")
    else:
        graph = ColoTracer().trace(model, (ROWS,))
        run = graph.bind(model)
    for step in range(steps):
        losses = [call(ROWS * (step + 1)) for call in (run, eager)]
        torch.testing.assert_close(*losses, rtol=0, atol=atol)
        for loss in losses:
            loss.backward()
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        torch.testing.assert_close(_whole(p), _whole(q), rtol=0, atol=atol)
        if q.grad is not None:
            torch.testing.assert_close(_whole(p.grad), _whole(q.grad), rtol=0, atol=atol)
    torch.testing.assert_close(
        dict(model.named_buffers()), dict(eager.named_buffers()), rtol=0, atol=atol
    )
    return graph


def _whole(t):
    t = t.detach()
    t = t.full_tensor() if hasattr(t, "full_tensor") else t
    return t.to_dense() if t.is_sparse else t
