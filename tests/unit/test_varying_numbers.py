"""Numbers that vary are inputs of a captured program, or the program says for which it is right."""

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autopar import ColoTracer
from autopar.errors import CaptureError
from autopar.ir.bound_reads import bind
from autopar.ir.numbers import Argument, Attribute

X = torch.arange(12, dtype=torch.float64).reshape(3, 4) / 7


class Net(nn.Module):
    """A model with a number, whose forward is a function."""

    def __init__(self, forward: Callable, number: float):
        super().__init__()
        self.linear = nn.Linear(4, 4).double()
        self.beta, self.config = number, SimpleNamespace(beta=number)
        self.body = forward

    def forward(self, x, *numbers):
        return self.body(self, self.linear(x), *numbers)


def captures(model: nn.Module, values, x=X, names=("beta", "config.beta")) -> int:
    """How many captures serve all values; each result is compared with the model's own."""
    origins = [Attribute("", name) for name in names]
    programs = []
    for value in values:
        model.beta = model.config.beta = value
        alone = copy.deepcopy(model)
        for graph, holds in programs:
            if holds() and graph.numbers.failed(graph.numbers.values(model, (x,))) is None:
                break
        else:
            graph = ColoTracer().trace(model, (x,), varying=origins)
            programs.append((graph, bind(model, graph.reads)))
        found, expected = graph.bind(model)(x), alone(x)
        pairs = zip(
            found if isinstance(found, tuple) else (found,),
            expected if isinstance(expected, tuple) else (expected,),
            strict=True,
        )
        for a, b in pairs:
            assert type(a) is type(b)
            assert not isinstance(a, torch.Tensor) or a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-15, atol=0, equal_nan=True)
        assert (model.beta, model.config.beta) == (alone.beta, alone.config.beta)
        assert type(model.beta) is type(alone.beta)
    return len(programs)


def counted(m, h):
    m.beta += 1
    return h * min(1.0, m.beta / 10)


def kept(m, h):
    m.config.beta = m.beta * 2
    return h * m.config.beta


LIFTED = {
    "a factor": lambda m, h: h * m.beta,
    "before": lambda m, h: m.beta * h + (m.beta + h) + (m.beta - h) + m.beta / (2 + h.abs()),
    "of an object": lambda m, h: h.mean() * m.config.beta,
    "computed": lambda m, h: h * (1 - m.beta) + h * (m.beta / 3 + 2 * m.beta**2),
    "of integers": lambda m, h: (h * 10).long() * m.beta,
    "of single precision": lambda m, h: h.float() * m.beta + h.float().sum() / (m.beta + 1),
    "of half precision": lambda m, h: h.bfloat16() * m.beta,
    "a power": lambda m, h: h.abs() ** m.beta + m.beta ** h.sigmoid(),
    "in place": lambda m, h: h.clone().mul_(m.beta).add_(m.beta),
    "augmented": lambda m, h: operator_in_place(h.clone(), m.beta),
    "where": lambda m, h: torch.where(h > m.beta, h, m.beta),
    "lerp": lambda m, h: torch.lerp(h, -h, m.beta),
    "clamp": lambda m, h: h.clamp(max=m.beta) + h.clamp(-m.beta, m.beta),
    "masked": lambda m, h: h.masked_fill(h > 0, m.beta),
    "of torch's Python": lambda m, h: (F.gumbel_softmax(0 * h + 1, tau=m.beta + 1) >= 0) * 1.0,
    "a float": lambda m, h: h * m.beta if isinstance(m.beta, float | int) else h,
    "vars": lambda m, h: h * vars(m)["beta"],
    "returned": lambda m, h: (h * m.beta, m.beta, m.beta + 1),
    "kept": kept,
    "counted in the forward": counted,
}  # fmt: skip


def operator_in_place(h, beta):
    h *= beta
    h += beta
    return h


@pytest.mark.parametrize("kind", LIFTED)
@pytest.mark.parametrize("values", [(0.5, 0.25, 0.1, 0.7), (3, 4, 7, 2)], ids=["float", "int"])
def test_one_program_serves_all_values(kind, values):
    assert captures(Net(LIFTED[kind], values[0]), values) == 1


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.factor * gradient, None


VALUES = {
    "math": lambda m, h: h * math.exp(m.beta),
    "float()": lambda m, h: h * float(m.beta),
    "a text": lambda m, h: h * len(f"{m.beta:.6g}"),
    "a key": lambda m, h: h * {0.5: 2.0}.get(m.beta, 3.0),
    "a tensor": lambda m, h: h * torch.tensor(m.beta, dtype=h.dtype),
    "a tensor of several": lambda m, h: h * torch.tensor([m.beta, 1.0, 1.0, 2.0], dtype=h.dtype),
    "dropout": lambda m, h: F.dropout(h, m.beta, training=False) * m.beta,
    "alpha": lambda m, h: torch.add(h, h, alpha=m.beta),
    "a slope": lambda m, h: F.leaky_relu(h, m.beta),
    "a full tensor": lambda m, h: h + torch.full((4,), m.beta, dtype=h.dtype),
    "a function of its own": lambda m, h: Reversed.apply(h, m.beta),
    "its type": lambda m, h: h * (m.beta if type(m.beta) is float else 1.0),
    "its methods": lambda m, h: h * m.beta.hex().__len__(),
}  # fmt: skip


def hooked(m, h):
    beta = m.beta
    h.register_hook(lambda g: -beta * g)
    return h


def reversed_by_a_function(m, h):
    return Reversed.apply(h, m.beta)


def hooked_by_the_module(m, h):
    h.register_hook(lambda g: -m.beta * g)
    return h * m.beta


@pytest.mark.parametrize("forward", [hooked, reversed_by_a_function, hooked_by_the_module])
def test_gradients_have_the_number_of_the_call(forward):
    model = Net(forward, 0.5)
    programs = []
    for value in (0.5, 0.25, 0.125):
        model.beta = value
        for graph in programs:
            if graph.numbers.failed(graph.numbers.values(model, (X,))) is None:
                break
        else:
            graph = ColoTracer().trace(model, (X,), varying=[Attribute("", "beta")])
            programs.append(graph)
        (found,) = torch.autograd.grad(graph.bind(model)(X).sum(), model.linear.weight)
        (expected,) = torch.autograd.grad(model(X).sum(), model.linear.weight)
        assert torch.equal(found, expected)
    assert len(programs) == (1 if forward is hooked_by_the_module else 3)


def test_a_number_that_leaves_the_capture_is_refused():
    kept = []
    model = Net(lambda m, h: (kept.append(m.beta), h * m.beta)[1], 0.5)
    ColoTracer().trace(model, (X,), varying=[Attribute("", "beta")])
    with pytest.raises(CaptureError, match="kept from the capture"):
        float(kept[0])


@pytest.mark.parametrize("kind", VALUES)
def test_what_needs_the_value_is_captured_for_each(kind):
    assert captures(Net(VALUES[kind], 0.5), (0.5, 0.25, 0.5, 0.125)) == 3


def test_branches_are_captured_for_each_side():
    def forward(m, h):
        if m.beta < 10 and m.beta != 3:
            return h * m.beta
        return h + m.beta

    assert captures(Net(forward, 1), (1, 2, 3, 4, 10, 20, 5, 3)) == 3


def test_sizes_are_captured_for_each():
    def forward(m, h):
        for _ in range(m.beta // 10):
            h = h.tanh()
        return h.view(3, 2, -1)[:, : 1 + m.beta // 100] * m.beta

    assert captures(Net(forward, 1), (1, 2, 9, 10, 19, 100, 109)) == 3


def test_a_branch_of_tensors_made_of_the_number():
    def forward(m, h):
        limit = torch.ones(4, dtype=torch.float64) * m.beta
        return h * 2 if limit.sum() > 3 else h * 3

    assert captures(Net(forward, 0.5), (0.5, 0.25, 1.0)) == 3


def test_a_zero_stays_behind_its_branch():
    assert captures(Net(lambda m, h: h / m.beta if m.beta > 0 else h, 0.5), (0.5, 0.1, 0.0)) == 2


def test_another_type_is_another_program():
    assert captures(Net(lambda m, h: h * m.beta, 0.5), (0.5, 1, 2, 0.25, True, False)) == 4


def test_hooks_that_observe_read_what_they_like():
    seen = []
    model = Net(lambda m, h: h * m.beta, 0.5)
    model.linear.register_forward_hook(lambda *_: seen.append(f"{model.beta}"))
    ColoTracer().trace(model, (X,))
    graph = ColoTracer().trace(model, (X,), varying=[Attribute("", "beta")])
    assert not graph.numbers.conditions
    model.beta = 0.25
    assert torch.equal(graph.bind(model)(X), model.linear(X) * 0.25)


def test_hooks_that_return_values_are_part_of_the_program():
    model = Net(lambda m, h: h + 1, 0.5)
    model.linear.register_forward_hook(lambda module, args, y: y * model.beta)
    assert captures(model, (0.5, 0.25, 0.125)) == 1


def test_arguments_and_their_gradients():
    model = Net(lambda m, h, a, b: (h * a + b * h.abs()).sum() if a > 0 else h.sum(), 0.5)
    graph = ColoTracer().trace(model, (X, 0.5, 2), varying=[Argument(1), Argument(2)])
    run = graph.bind(model)
    for a, b in ((0.5, 2), (0.125, 5)):
        (found,) = torch.autograd.grad(run(X, a, b), model.linear.weight)
        (expected,) = torch.autograd.grad(model(X, a, b), model.linear.weight)
        assert torch.equal(found, expected)
    assert graph.numbers.failed(graph.numbers.values(model, (X, -0.5, 2))) is not None
    assert graph.numbers.failed(graph.numbers.values(model, (X, 1, 2))) is not None


def test_the_model_keeps_its_numbers():
    class Shared:
        def __init__(self):
            self.beta = 0.5

        def __deepcopy__(self, memo):
            return self

    model = Net(lambda m, h: h * m.beta * m.config.beta, 0.5)
    model.config = Shared()
    ColoTracer().trace(model, (X,), varying=[Attribute("", "beta"), Attribute("", "config.beta")])
    assert type(model.beta) is float
    assert type(model.config.beta) is float
