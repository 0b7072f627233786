"""torch's checkpoints: in each other within a model, and around an engine."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from autopar import auto_engine
from autopar.errors import CaptureError, EngineError
from autopar.tracer import ColoTracer


class Nested(nn.Module):
    """A region that is checkpointed within another."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return checkpoint(self.outer, x, use_reentrant=False)

    def outer(self, x):
        return checkpoint(self.inner, self.first(x).relu(), use_reentrant=False)

    def inner(self, x):
        return self.second(x).tanh()


def _gradients(loss, parameters):
    loss.backward()
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in parameters]


def _model(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*(layer() for layer in layers), nn.Linear(8, 1)).double()


def test_nested_regions_keep_their_gradients():
    x = torch.randn(4, 8, dtype=torch.float64)
    model, engine = _model(Nested, Nested), auto_engine(_model(Nested, Nested), None, "1")[0]
    expected = _gradients(model(x).square().mean(), model.parameters())
    actual = _gradients(engine(x).square().mean(), engine.parameters())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_engine_is_checkpointed(use_reentrant):
    """At its first call, which plans."""
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    model, engine = _model(nn.Tanh), auto_engine(_model(nn.Tanh), None, "1")[0]
    expected = _gradients(model(x).square().mean(), model.parameters())
    results = checkpoint(engine, x, use_reentrant=use_reentrant)
    actual = _gradients(results.square().mean(), engine.parameters())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_would_be_drawn_anew(use_reentrant):
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    engine, _ = auto_engine(_model(nn.Dropout), None, "1")
    results = checkpoint(engine, x, use_reentrant=use_reentrant)
    with pytest.raises(EngineError, match=r"draws random numbers.* without checkpoint"):
        results.sum().backward()


class Hooks(saved_tensors_hooks):
    """A user's own."""

    def __init__(self):
        super().__init__(lambda t: t, lambda t: 2 * t)


class Hooked(nn.Module):
    def forward(self, x):
        with Hooks():
            return x.sin()


def test_a_class_of_hooks_is_refused():
    with pytest.raises(CaptureError, match=r"test_checkpointed_calls.py:\d+.*saved tensors"):
        ColoTracer().trace(Hooked(), (torch.randn(4, requires_grad=True),))
