"""Backwards that add gradients of weights to those of earlier microbatches."""

import pytest
import torch
import torch.fx as fx
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.passes.accumulate import adding_backward

aten = torch.ops.aten


def _graph(function, *arguments) -> fx.GraphModule:
    return make_fx(lambda *given: tuple(function(*given)), tracing_mode="fake")(*arguments)


def _check(function, arguments, gradients, expected):
    """Two runs give what twice the gradients are, and the totals themselves are written."""
    gm = _graph(function, *arguments)
    added = adding_backward(gm, gradients)
    assert (added is None) == (not expected)
    if added is None:
        return
    graph, positions = added
    assert positions == expected
    known = list(gm(*arguments))
    first = [None if g is None else g.clone() for g in known]
    given = graph(*arguments, *(known[k] for k in positions))
    for k, x in enumerate(given):
        if k in positions:
            assert x is None
            torch.testing.assert_close(known[k], 2 * first[k])
        else:
            torch.testing.assert_close(x, first[k])


A, B = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("function", "gradients", "expected"),
    [
        (lambda a, b: [aten.mm(a, b)], 1, (0,)),
        (lambda a, b: [aten.t(aten.t(aten.mm(a, b))), aten.sum(a)], 2, (0,)),
        (lambda a, b: [aten.t(aten.mm(a, b))], 1, (0,)),
        (lambda a, b: [aten.view(aten.mm(a, b), [4, 5, 1])], 1, (0,)),
        (lambda a, b: [aten.sum(b), aten.view(aten.t(aten.t(aten.mm(a, b))), [20])], 2, (1,)),
        # another result is one of an input, which the stage before waits for
        (lambda a, b: [aten.mm(a, b), aten.mm(a, b)], 1, (0,)),
    ],
)
def test_products_add_to_totals(function, gradients, expected):
    _check(function, (A, B), gradients, expected)


def test_products_that_something_else_reads_stay():
    def twice(a, b):
        product = aten.mm(a, b)
        return [product, aten.exp(product)]

    def viewed(a, b):
        product = aten.mm(a, b)
        return [aten.t(product), aten.exp(aten.t(product))]

    _check(twice, (A, B), 2, ())
    _check(viewed, (A, B), 2, ())
    _check(lambda a, b: [aten.sum(aten.mm(a, b))], (A, B), 1, ())


def test_totals_of_two_bytes_are_wider_and_stay():
    _check(lambda a, b: [aten.mm(a, b)], (A.bfloat16(), B.bfloat16()), 1, ())
