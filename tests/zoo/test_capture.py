"""Families of both libraries that autopar promises to capture: the graph equals the model."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from autopar import ColoTracer
from tests.zoo import check
from tests.zoo.examine import TOLERANCE
from tests.zoo.family import Family
from tests.zoo.installed import INSTALLED


def assert_equal(actual: check.Step, expected: check.Step, family: Family) -> None:
    differing = {
        name: size
        for name, size in check.differences(actual, expected)
        if size > TOLERANCE[family.dtype]
    }
    assert not differing


@pytest.mark.sample(0.25)
@pytest.mark.parametrize("family", INSTALLED)
def test_captured_graph_equals_the_model(family: Family) -> None:
    """Loss, results, every gradient and the buffers; on the next batch too, unless a guard
    fails."""
    model, alone = family.build(), family.build()
    batch = family.batch(model)
    before = check.snapshot(model)
    graph = ColoTracer().trace(model, (), batch)
    assert check.changed(before, check.snapshot(model)) == []
    run = graph.bind(model)
    assert_equal(check.step(run, model, batch), check.step(alone, alone, batch), family)

    other = family.batch(model, seed=1)
    buffers = dict(model.named_buffers())
    if all(g.holds(pytree.tree_leaves(((), other)), buffers) for g in graph.guards):
        assert_equal(check.step(run, model, other), check.step(alone, alone, other), family)


@pytest.mark.sample(0.5)
@pytest.mark.parametrize("family", INSTALLED[::3])
def test_captured_graph_draws_what_the_model_draws(family: Family) -> None:
    """From one seed, with the library's dropout: the same loss and the same gradients."""
    model, alone = family.build(dropout=True), family.build(dropout=True)
    batch = family.batch(model)
    before = check.snapshot(model)
    graph = ColoTracer().trace(model, (), batch)
    assert check.changed(before, check.snapshot(model)) == []
    run = graph.bind(model)
    if family.not_replayed is None:
        for seed in (3, 4):
            actual = check.step(run, model, batch, seed)
            assert_equal(actual, check.step(alone, alone, batch, seed), family)
    else:
        _assert_draws(run, model, alone, batch, family)


def _assert_draws(run: Any, model: nn.Module, alone: nn.Module, batch: Any, family: Family) -> None:
    """The graph draws other numbers than the model, reproducibly and with a similar mean loss."""
    first, again, other = (check.step(run, model, batch, seed) for seed in (3, 3, 4))
    assert_equal(again, first, family)
    assert other.loss != first.loss
    expected = torch.stack([check.step(alone, alone, batch, s).loss for s in range(20)])
    actual = torch.stack([check.step(run, model, batch, s).loss for s in range(20)])
    assert abs(expected.mean() - actual.mean()) < expected.std() + actual.std()
