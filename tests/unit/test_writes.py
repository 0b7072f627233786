"""In-place writes of a forward that autograd does not see, and regions without gradients."""

import pytest
import torch
from torch import nn

from autopar import ColoTracer
from autopar.errors import CaptureError
from tests.captures import ROWS, Layers, trains_as_eager


def clamped_parameter(m, x):
    with torch.no_grad():
        m.a.weight.clamp_(-0.1, 0.1)
        m.b.weight.mul_(0.5).add_(0.1)
    return m.b(m.a(x)).square().mean()


def parameter_by_data(m, x):
    m.a.weight.data.clamp_(-0.1, 0.1)
    return m.a(x).square().mean()


def parameter_set_by_data(m, x):
    m.a.weight.data = m.a.weight.data * 0.5
    return m.a(x).square().mean()


def buffer_set_by_data(m, x):
    m.mean.data = m.mean.data * 0.5 + x.mean(0)
    return (m.a(x) * m.mean).square().mean()


def clamped_value(m, x):
    h = m.a(x)
    with torch.no_grad():
        h.clamp_(-0.1, 0.1)
        h += 1
        h[:, 0] = 2
    return m.b(h).square().mean()


def value_by_data(m, x):
    h = m.a(x)
    h.data.mul_(2)
    return m.b(h).square().mean()


def value_set_by_data(m, x):
    h = m.a(x)
    h.data = h.data.round()
    return m.b(h).square().mean()


def value_by_an_alias(m, x):
    h = m.a(x)
    d = h.detach()
    d.mul_(2)
    return (m.b(h) + d).square().mean()


def a_value_of_its_own(m, x):
    h = m.a(x)
    with torch.no_grad():
        scale = h.abs().mean()
        scale.mul_(2)
    copied = h.detach().clone()
    copied.mul_(2)
    return (m.b(h / scale) * copied).square().mean()


def gaussian(m, x):
    return nn.GaussianNLLLoss()(m.a(x), x, nn.functional.softplus(m.b(x) - 3))


def inference_region(m, x):
    with torch.inference_mode():
        scale = m.a(x).mean()
        factor = 2.0 if torch.is_inference_mode_enabled() else 3.0
    return (m.b(x) * scale.clone()).square().mean() * factor


@torch.inference_mode()
def features(m, x):
    return m.a(x)


def inference_function(m, x):
    return (m.b(x) + features(m, x).clone()).square().mean()


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        clamped_parameter, parameter_by_data, parameter_set_by_data, buffer_set_by_data,
        clamped_value, value_by_data, value_set_by_data, value_by_an_alias, a_value_of_its_own,
        gaussian, inference_region, inference_function,
    ],
)  # fmt: skip
def test_values_change_and_gradients_stay(function, engine):
    trains_as_eager(function, engine=engine)


def part_of_a_value(m, x):
    h = m.a(x)
    with torch.no_grad():
        h[:, 0].zero_()
    return m.b(h).square().mean()


def in_a_function(m, x):
    h = m.a(x)
    with torch.no_grad():
        nn.functional.relu(h, inplace=True)
    return m.b(h).square().mean()


@pytest.mark.parametrize("function", [part_of_a_value, in_a_function])
def test_writes_through_views_are_refused_by_line(function):
    with pytest.raises(CaptureError, match=r"test_writes\.py:\d+.*old - old\.detach\(\)"):
        ColoTracer().trace(Layers(function).double(), (ROWS,))


def by_another(m, x):
    with torch.no_grad():
        m.a.weight.copy_(m.b.weight)
    return m.a(x).square().mean()


def by_its_norm(m, x):
    with torch.no_grad():
        m.a.weight.div_(m.a.weight.norm())
    return m.a(x).square().mean()


def after_use(m, x):
    y = m.a(x)
    with torch.no_grad():
        m.a.weight.clamp_(-0.1, 0.1)
    return y.square().mean()


@pytest.mark.parametrize("function", [by_another, by_its_norm, after_use])
def test_other_writes_into_parameters_are_refused(function):
    with pytest.raises(CaptureError, match=r"its parameter a\.weight.*outside of the forward"):
        ColoTracer().trace(Layers(function).double(), (ROWS,))
