"""Hooks on gradients inside of a model are called at each step, as eager PyTorch calls them."""

import functools

import pytest
import torch
from torch import nn

from autopar import ColoTracer, auto_engine
from autopar.errors import CaptureError

X = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(4, 8)


class Hooked(nn.Module):
    """Two layers whose forward is a function; hooks may keep gradients in `grads`."""

    def __init__(self, function, setup=None):
        super().__init__()
        self.a, self.b, self.function = nn.Linear(8, 8), nn.Linear(8, 8), function
        self.grads, self.factor = [], 3.0
        if setup is not None:
            setup(self)

    def keep(self, grad):
        self.grads.append(grad)
        return grad * self.factor

    def forward(self, x):
        return self.function(self, x)


def doubled(m, x):
    h = torch.tanh(m.a(x))
    h.register_hook(lambda g: g * 2)
    return m.b(h).square().mean()


def after_first_use(m, x):
    h = torch.tanh(m.a(x))
    y = m.b(h)
    h.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    return (y + h).square().mean()


def method(m, x):
    h = m.a(x)
    h.register_hook(m.keep)
    return m.b(h).square().mean()


def tensor(m, x):
    h = m.a(x)
    weight = h.detach().abs()
    h.register_hook(lambda g: g * weight)
    return m.b(h).square().mean()


def default(m, x):
    h, weight = m.a(x), x.abs()
    h.register_hook(lambda g, w=weight: g * w)
    return m.b(h).square().mean()


def partial(m, x):
    h = m.a(x)
    h.register_hook(functools.partial(lambda w, g: g * w, x.abs()))
    return m.b(h).square().mean()


def two(m, x):
    h = m.a(x)
    h.register_hook(lambda g: g * 2)
    h.register_hook(lambda g: g + 1)
    return m.b(h).square().mean()


def removed(m, x):
    h = m.a(x)
    h.register_hook(lambda g: g * 2).remove()
    return m.b(h).square().mean()


def in_place(m, x):
    h = m.a(x)

    def double(grad):
        grad.mul_(2)

    h.register_hook(double)
    h.mul_(3)
    return m.b(h).square().mean()


def loop(m, x):
    for i in range(3):
        x = torch.tanh(m.a(x))
        x.register_hook(lambda g, i=i: g / (g.norm() + i + 1))
    return x.square().mean()


def plain(m, x):
    return m.b(torch.tanh(m.a(x))).square().mean()


def twice(m, x):
    return m.b(m.b(m.a(x))).square().mean()


def full(m):
    m.b.register_full_backward_hook(lambda _, gi, go: (gi[0] * 2 + go[0],))


def records(m):
    m.b.register_full_backward_hook(lambda _, gi, go: m.grads.append(go[0]))


def no_graded_input(m):
    m.a.register_full_backward_hook(lambda _, gi, go: m.grads.append(go[0]))


def before(m):
    m.b.register_full_backward_pre_hook(lambda _, go: (go[0] * 2,))


def by_forward_hook(m):
    m.a.register_forward_hook(lambda _, x, out: out.register_hook(lambda g: g * 2) and None)


CASES = [
    *((f, None) for f in (doubled, after_first_use, method, tensor, default, partial, two)),
    *((f, None) for f in (removed, in_place, loop)),
    *((plain, s) for s in (full, records, no_graded_input, before, by_forward_hook)),
    (twice, full),
]


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize(("function", "setup"), CASES)
def test_hooks_change_and_see_gradients_as_in_eager(function, setup, engine):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Hooked(function, setup).double())
    model, eager = models
    if engine:
        run, _ = auto_engine(model, torch.optim.SGD(model.parameters(), 0.1), "1")
    else:
        run = ColoTracer().trace(model, (X,)).bind(model)
    for scale in (1, 2):
        for call in (run, eager):
            call(X * scale).backward()
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        grad = p.grad.full_tensor() if engine and p.grad is not None else p.grad
        torch.testing.assert_close(grad, q.grad, rtol=0, atol=1e-14)
    torch.testing.assert_close(model.grads, eager.grads, rtol=0, atol=1e-14)


def graded_operand(m, x):
    h = m.a(x)
    weight = h.abs()
    h.register_hook(lambda g: g * weight)
    return (m.b(h) + weight).square().mean()


def in_a_list(m, x):
    h, weights = m.a(x), [x.abs()]
    h.register_hook(lambda g: g * weights[0])
    return m.b(h).square().mean()


def on_a_parameter(m, x):
    m.a.weight.register_hook(lambda g: g * 2)
    return m.a(x).square().mean()


def on_a_node(m, x):
    h = m.a(x)
    h.grad_fn.register_hook(lambda gi, go: None)
    return m.b(h).square().mean()


def several(m, x):
    h = m.a(x)
    torch.autograd.graph.register_multi_grad_hook((h,), lambda grads: None)
    return m.b(h).square().mean()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (graded_operand, "right after the value"),
        (in_a_list, "inside of a list"),
        (on_a_parameter, "register it once"),
        (on_a_node, "h.register_hook"),
        (several, "inside of a list"),
    ],
)
def test_hooks_that_would_be_lost_are_refused_by_line(function, message):
    with pytest.raises(CaptureError, match=rf"test_gradient_hooks\.py:\d+.*{message}"):
        ColoTracer().trace(Hooked(function).double(), (X,))


def test_a_hook_on_one_operator_of_a_module_is_refused():
    model = Hooked(plain, lambda m: m.b.register_backward_hook(lambda *_: None)).double()
    with pytest.raises(CaptureError, match=r"b has a hook by register_backward_hook.*full"):
        ColoTracer().trace(model, (X,))
