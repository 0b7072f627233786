"""What capturing rewrites keeps its values, its gradients and its draws."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autopar import ColoTracer
from autopar.errors import CaptureError
from tests.captures import LABELS, X, captured, check


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.clone(), x > 0

    @staticmethod
    def backward(ctx, grad, _):
        return -ctx.scale * grad, None


apply_reversed = Reversed.apply


def test_custom_functions_keep_their_backward():
    def function(m, x):
        h, positive = apply_reversed(m.linear(x), 3.0)
        h, _ = Reversed.apply(h, 0.5)
        return h * positive

    model, graph = captured(function, X)
    check(model, graph, X)
    assert sum("Reversed" in str(n.target) for n in graph.nodes) == 2


def test_no_grad_regions_stay_without_gradient():
    def function(m, x):
        with torch.no_grad():
            scale = m.linear(x).mean()
        return m.linear(x) * scale

    model, graph = captured(function, X)
    check(model, graph, X)


def test_writes_into_views_have_gradients():
    def function(m, x):
        h = torch.zeros(6, 4, dtype=torch.float64)
        h[:, 1:3] = m.linear(x)[:, :2]
        h[0] = m.linear(x)[0].float()
        return h

    model, graph = captured(function, X)
    check(model, graph, X)


def test_constants_and_buffers_reach_their_places():
    def function(m, x):
        return m.linear(x)[:, [1, 3]] * m.limit + torch.tensor([1.0, 2.0])

    model, graph = captured(function, X)
    check(model, graph, X)
    assert len(graph.constants) == 2


def test_data_stays_in_the_capture():
    def function(m, x):
        h = m.linear(x)
        return h * h.data.max() * h.detach().min()

    model, graph = captured(function, X)
    check(model, graph, X)
    assert not graph.constants


def _packed(graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if "packed" in str(n.target)]


def test_products_that_are_cut_have_their_parts_as_a_dim():
    def cut(m, x):
        h = F.linear(x, m.linear.weight.repeat(3, 1), m.linear.bias.repeat(3))
        q, k, v = h.split(4, dim=-1)
        a, b = torch.addmm(m.linear.bias, q * k, m.linear.weight).view(2, 3, 4).chunk(2, dim=-1)
        return v.sum() + a.tanh() * b

    model, graph = captured(cut, X)
    check(model, graph, X)
    assert _packed(graph) == ["autopar.packed_linear.default", "autopar.packed_addmm.default"]

    def regrouped(m, x):
        h = F.linear(x.view(2, 3, 4), m.linear.weight.repeat(3, 1), m.linear.bias.repeat(3))
        h = h.reshape(2, 3, 3, 2, 2)
        q, k, v = h.permute(2, 0, 3, 1, 4).unbind(0)
        return q * k + v

    model, graph = captured(regrouped, X)
    check(model, graph, X)
    assert _packed(graph) == ["autopar.packed_linear.default"]


@pytest.mark.parametrize("rows", [None, 1, 6])
def test_cut_products_that_are_scaled_or_add_a_matrix_stay(rows):
    def cut(m, x):
        bias = m.linear.bias if rows is None else m.linear.bias.repeat(rows, 1)
        scales = {"beta": 0.5, "alpha": 2.0} if rows is None else {}
        a, b = torch.addmm(bias, x, m.linear.weight, **scales).split(2, dim=-1)
        return a.tanh() * b

    model, graph = captured(cut, X)
    check(model, graph, X)
    assert not _packed(graph)


def test_products_that_are_not_cut_stay():
    def full_buffers(m, x):
        h = m.linear(x)
        heads = h.view(6, 2, 2).transpose(0, 1)  # all of them go on
        one, rest = h.split([1, 3], dim=-1)
        first, second = m.linear(x).split(2, dim=-1)
        used = m.linear(x)
        third, _ = used.split(2, dim=-1)
        early, _ = m.linear(x).split(3, dim=0)
        return (
            heads.sum()
            + rest * one
            + (first * second).sum()
            + (third.sum() + used.sum())
            + (early.sum())
        )

    model, graph = captured(full_buffers, X)
    check(model, graph, X)
    assert len(_packed(graph)) == 1  # first and second


def test_a_dropout_that_is_off_draws_nothing():
    def function(m, x):
        h = F.dropout(m.linear(x), 0.0)
        if h.sum() > 0:
            return h
        return -h

    with pytest.raises(CaptureError, match="depends on activations"):
        captured(function, X)


@pytest.mark.parametrize("writes", [False, True])
def test_draws_that_nobody_uses_are_made(writes):
    def function(m, x):
        if writes:  # captured another way
            m.limit.add_(1)
        h = F.dropout(m.linear(x), 0.5)
        F.dropout(F.dropout(h, 0.5), 0.5)
        torch.native_dropout(h, 0.5, True)
        with torch.no_grad():
            h.new_empty(3).uniform_()
            torch.rand_like(h)
        return F.dropout(h, 0.5)

    model, graph = captured(function, X)
    run = graph.bind(model)
    torch.manual_seed(5)
    actual = run(X)
    torch.manual_seed(5)
    assert torch.equal(actual, model(X))


def test_a_parameter_that_is_clamped_in_the_forward_keeps_its_gradient():
    def function(m, x):
        m.linear.weight.data.clamp_(-0.1, 0.1)
        return m.linear(x)

    model, graph = captured(function, X)
    assert list(graph.updates) == ["linear.weight"]
    alone = copy.deepcopy(model)
    actual, expected = graph.bind(model)(X), alone(X)
    assert torch.equal(actual, expected)
    assert torch.equal(model.linear.weight, alone.linear.weight)
    weights = [list(m.parameters()) for m in (model, alone)]
    for a, b in zip(torch.autograd.grad(actual.sum(), weights[0]),
                    torch.autograd.grad(expected.sum(), weights[1]), strict=True):  # fmt: skip
        assert torch.equal(a, b) and a.abs().max() > 0


def test_a_parameter_that_is_written_after_its_use_is_refused():
    def function(m, x):
        h = m.linear(x)
        m.linear.weight.data.mul_(0.5)
        return m.linear(h)

    with pytest.raises(CaptureError, match="and then writes into it"):
        captured(function, X)


def test_the_callers_inputs_change_as_in_eager():
    def function(m, x, labels):
        labels.clamp_(0, 3)
        return m.linear(x) * labels.unsqueeze(1)

    model, graph = captured(function, X, LABELS.clone())
    labels = LABELS.clone()
    actual = graph.bind(model)(X, labels)
    assert torch.equal(labels, LABELS.clamp(0, 3))
    assert torch.equal(actual, model(X, LABELS.clone()))
    assert graph.guards == ()


def test_functions_over_modules_are_refused():
    class Reversible(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, layer):
            return layer(x)

        @staticmethod
        def backward(ctx, grad):
            return grad, None

    with pytest.raises(CaptureError, match="takes modules"):
        captured(lambda m, x: Reversible.apply(x.requires_grad_(), m.linear), X.clone())


def test_writing_where_activations_say_needs_no_count():
    def function(m, x):
        h = m.linear(x)
        h[torch.where(h > 0)] = 2.0
        h[(h < -0.5).nonzero(as_tuple=True)] = -1.0
        return h

    model, graph = captured(function, X)
    check(model, graph, X)
    check(model, graph, X.flip(0))
    assert not graph.guards


def test_reading_where_activations_say_is_refused():
    with pytest.raises(CaptureError, match="depends on activations"):
        captured(lambda m, x: x[torch.where(m.linear(x).sum(1) > 0)], X)
    with pytest.raises(CaptureError, match="depends on activations"):
        captured(lambda m, x: x[m.linear(x).sum(1) > 0], X)


class Caching(nn.Module):
    """Keeps what it computed from the shape of its input."""

    def __init__(self):
        super().__init__()
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x):
        if self.cache.shape[0] != x.shape[1]:
            self.cache = torch.arange(x.shape[1], dtype=x.dtype)
        return x * self.cache


def test_a_buffer_that_is_replaced_by_a_larger_one_is_said():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Caching())).double()
    graph = ColoTracer().trace(model, (X,))
    assert [(g.source, g.value) for g in graph.guards] == [("1.0.cache", (4,))]
    run = graph.bind(model)
    first = run(X)
    assert torch.equal(first, run(X))
    assert model[1][0].cache.shape == (1,)
    assert torch.equal(first, model(X))
