"""The families of both libraries that autopar promises: one graph each, equal to the model."""

import importlib.util

import pytest
import torch
from torch.utils import _pytree as pytree

from autopar import ColoTracer
from tests.zoo import check, hf, timm_rows
from tests.zoo.examine import TOLERANCE
from tests.zoo.family import Family

FAMILIES = [
    pytest.param(family, id=f"{family.library}-{family.name.replace(' ', '-')}")
    for library, families in (("transformers", hf.FAMILIES), ("timm", timm_rows.FAMILIES))
    if importlib.util.find_spec(library) is not None
    for family in families
]


def assert_equal(found: check.Step, expected: check.Step, family: Family) -> None:
    apart = {
        name: size
        for name, size in check.differences(found, expected)
        if size > TOLERANCE[family.dtype]
    }
    assert not apart


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_graph_equals_the_model(family: Family) -> None:
    """Loss, results, every gradient and the buffers; on the next batch too, or a guard says no."""
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


@pytest.mark.parametrize("family", FAMILIES)
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
            found = check.step(run, model, batch, seed)
            assert_equal(found, check.step(alone, alone, batch, seed), family)
        return
    # draws of its own, so only that it draws, again from the seed, and within reach of the model's
    first, again, other = (check.step(run, model, batch, seed) for seed in (3, 3, 4))
    assert_equal(again, first, family)
    assert other.loss != first.loss
    expected = torch.stack([check.step(alone, alone, batch, s).loss for s in range(20)])
    drawn = torch.stack([check.step(run, model, batch, s).loss for s in range(20)])
    spread = expected.std() + drawn.std()
    assert abs(expected.mean() - drawn.mean()) < spread
