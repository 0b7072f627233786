"""Keys that a model repeats for its heads reach attention unrepeated."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from autopar.ir.graph import bound_arguments
from autopar.tracer import grouped_keys
from tests.captures import Holder, captured

torch.manual_seed(0)
Q = torch.randn(2, 6, 5, 4, dtype=torch.float64)
K = torch.randn(2, 3, 5, 4, dtype=torch.float64)
MASK = torch.rand(2, 1, 5, 5) < 0.7
MASK[..., 0] = True


def expanded(x, n=2):
    b, kv, s, d = x.shape
    return x[:, :, None, :, :].expand(b, kv, n, s, d).reshape(b, kv * n, s, d)


def unsqueezed(x):
    b, kv, s, d = x.shape
    return x.unsqueeze(2).repeat(1, 1, 2, 1, 1).contiguous().view(b, kv * 2, s, d)


def interleaved(x):
    return x.repeat_interleave(2, dim=-3)


def tiled(x):
    return x.repeat(1, 2, 1, 1)


def attention(repeat_keys, repeat_values, **options):
    def function(m, q, k, *mask):
        k, v = m.linear(k), m.linear(k).tanh()
        return F.scaled_dot_product_attention(
            m.linear(q), repeat_keys(k), repeat_values(v), *mask, **options
        )

    return function


def check(model, graph, *args):
    """Value and gradients equal eager's, whose sum over heads has another order."""
    results = [run(*args) for run in (graph.bind(model), model)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-13)
    weights = list(model.parameters())
    gradients = [torch.autograd.grad(r.sin().sum(), weights) for r in results]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def call(graph):
    (node,) = [n for n in graph.nodes if "scaled_dot" in str(n.target)]
    return bound_arguments(node)


@pytest.mark.parametrize("repeat", [expanded, unsqueezed, interleaved])
@pytest.mark.parametrize("mask", [(), (MASK,), (MASK.double(),)])
def test_repeated_keys_are_shared(repeat, mask):
    model, graph = captured(attention(repeat, expanded, scale=0.3), Q, K, *mask)
    arguments = call(graph)
    assert arguments["enable_gqa"] and arguments["scale"] == 0.3
    assert [arguments[n].meta["val"].shape[1] for n in ("query", "key", "value")] == [6, 3, 3]
    assert not any("expand" in str(n.target) or "repeat" in str(n.target) for n in graph.nodes)
    check(model, graph, Q, K, *mask)


def test_one_head_of_keys_is_shared_by_all():
    model, graph = captured(
        attention(lambda x: expanded(x, 6), lambda x: expanded(x, 6)), Q, K[:, :1]
    )
    assert call(graph)["key"].meta["val"].shape == (2, 1, 5, 4)
    check(model, graph, Q, K[:, :1])


def test_causal_attention_stays_causal():
    model, graph = captured(attention(expanded, expanded, is_causal=True), Q, K)
    assert call(graph)["is_causal"] and call(graph)["enable_gqa"]
    check(model, graph, Q, K)


def test_source_lines_stay():
    _, graph = captured(attention(expanded, expanded), Q, K)
    (node,) = [n for n in graph.nodes if "scaled_dot" in str(n.target)]
    line = inspect.getsourcelines(Holder.forward)[1] + 1
    assert graph.info(node).source == f"{inspect.getfile(Holder)}:{line}"


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (tiled, tiled),  # another order of heads
        (expanded, tiled),
        (expanded, lambda x: expanded(x).tanh()),
        (lambda x: x.repeat_interleave(2, dim=-2)[:, :, :5].repeat(1, 2, 1, 1), expanded),
    ],
)
def test_other_repeats_are_left_alone(keys, values):
    model, graph = captured(attention(keys, values), Q, K)
    assert "enable_gqa" not in call(graph)
    check(model, graph, Q, K)


def test_keys_and_values_must_repeat_alike():
    q = torch.randn(2, 6, 5, 4, dtype=torch.float64)

    def function(m, q, k):
        k = m.linear(k)
        return F.scaled_dot_product_attention(q, expanded(k, 2), expanded(k[:, :1], 6))

    model, graph = captured(function, q, K)
    assert "enable_gqa" not in call(graph)
    check(model, graph, q, K)


def test_kernels_that_take_no_shared_keys_get_repeated_ones(monkeypatch):
    monkeypatch.setattr(grouped_keys, "_kernel_shares", lambda *_: False)
    _, graph = captured(attention(expanded, expanded), Q, K)
    assert "enable_gqa" not in call(graph)
