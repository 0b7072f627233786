"""Backwards that add gradients of weights to those of earlier microbatches."""

import pytest
import torch
import torch.fx as fx
from torch.fx.experimental.proxy_tensor import make_fx

from autopar import ClusterInfo, autoplan
from autopar.comm.groups import planning_groups
from autopar.passes.accumulate import adding_backward
from autopar.passes.apply_sharding import apply_sharding
from autopar.passes.local_step import fake_arguments
from autopar.passes.lower import lower, trace_step
from autopar.passes.pipeline import LowerOptions
from autopar.schedule.order import in_order
from autopar.schedule.program import eager_schedule
from tests.models import CASES

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


def test_products_that_are_returned_under_their_views_stay():
    def both(a, b):
        product = aten.mm(a, b)
        return [aten.t(product), product]

    _check(both, (A, B), 2, ())


@pytest.mark.parametrize("name", ["mlp", "gpt2", "resnet", "vit"])
def test_schedules_know_what_is_added_in_place(name):
    """The gradients that a schedule leaves no room for are those that the backward adds."""
    case = CASES[name]
    planned = autoplan(case.build(), (), case.batch(0), cluster=ClusterInfo.of("1"))
    local = apply_sharding(
        planned.graph, planned.plan, coords=(0,), groups=planning_groups((1,), (0,))
    )
    trainable = planned.space.workload.trainable
    arguments = fake_arguments(planned.graph, local, trainable)
    count = len(planned.graph.parameters)
    traced = trace_step(local.gm, arguments, LowerOptions(scheduled=True, added=count))
    alone = trace_step(local.gm, arguments, LowerOptions(scheduled=True))
    lowered = lower(traced, eager_schedule(in_order(traced.program)))
    added = adding_backward(lowered.backward, count)
    assert added is not None
    gradients = [p for p in planned.graph.parameters if p in trainable]
    assert len(alone.program.gradient_bytes) == len(gradients)
    assert len(traced.program.gradient_bytes) == len(gradients) - len(added[1])


def test_totals_of_two_bytes_are_wider_and_stay():
    _check(lambda a, b: [aten.mm(a, b)], (A.bfloat16(), B.bfloat16()), 1, ())
