"""Linear layers by oneDNN: which are replaced, and that they are the same product."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.kernels.linear import add_bias_within, linear_operator
from autopar.passes.runner import run_passes

aten = torch.ops.aten
pytestmark = pytest.mark.skipif(linear_operator() is None, reason="torch without oneDNN")


def linear(bias, x, weight):
    return aten.addmm(bias, x, weight.t())


def scaled(bias, x, weight):
    return aten.addmm(bias, x, weight.t(), alpha=2)


def replaced(function, *arguments):
    gm = make_fx(function, tracing_mode="fake")(*arguments)
    before = len(gm.graph.nodes)
    gm = run_passes(gm, [add_bias_within])
    done = bool(gm.graph.find_nodes(op="call_function", target=linear_operator()))
    assert len(gm.graph.nodes) == before - done  # the weight needs no turning
    return gm, done


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (5, 3, 7), (64, 256, 130)])
def test_the_same_product(rows, inputs, outputs):
    torch.manual_seed(0)
    arguments = torch.randn(outputs), torch.randn(rows, inputs), torch.randn(outputs, inputs)
    gm, done = replaced(linear, *arguments)
    assert done
    actual = gm(*arguments)
    assert actual.is_contiguous()
    exact = linear(*(x.double() for x in arguments)).float()
    torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["double", "scaled", "rows of bias", "turned", "empty"])
def test_what_is_left_alone(case):
    bias, x, weight = torch.randn(4), torch.randn(6, 3), torch.randn(4, 3)
    function = linear
    if case == "double":
        bias, x, weight = bias.double(), x.double(), weight.double()
    elif case == "scaled":
        function = scaled
    elif case == "rows of bias":
        bias = torch.randn(6, 4)
    elif case == "turned":
        x = torch.randn(3, 6).t()
    else:
        x = torch.randn(0, 3)
    gm, done = replaced(function, bias, x, weight)
    assert not done
    assert torch.equal(gm(bias, x, weight), function(bias, x, weight))
