"""Regions of a program in slices: exact, simulated as they run, kept in plans."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from autopar import auto_engine
from autopar.comm import world
from autopar.errors import PlanError
from autopar.ir.randomness import draws
from autopar.passes.fill_concatenations import fill_concatenations
from autopar.passes.local_step import UntracedStep
from autopar.passes.pipeline import LowerOptions
from autopar.passes.regions import may_split
from autopar.passes.split_regions import split_regions
from autopar.passes.verify import propagate_shapes
from autopar.plan import ShardingPlan
from autopar.plan_records import TimeSplit
from autopar.planner import time_splits
from autopar.planner.time_splits import choose_splits, forward_score, training_score
from autopar.schedule.build import schedule_of
from autopar.testing.live_memory import LiveMemory
from benchmarks.time_split_models import Head, ViT
from tests.regions import SMALL, case_of

OPTIONS = LowerOptions(scheduled=True)


def _equal(values, expected):
    for value, reference in zip(values, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=0, atol=1e-9)


@pytest.mark.sample(0.5)
@pytest.mark.parametrize("name", SMALL)
def test_random_regions_in_slices_give_what_the_whole_gives(name):
    case = case_of(name)
    for number, split in enumerate(case.random_splits(seed=1, count=2)):
        sliced = split_regions(case.gm, case.arguments, [split])
        recompute = (lambda program: schedule_of(program, ())) if number % 2 else None
        outcome = case.run(sliced, recompute)
        _equal(outcome.values, case.whole.values)
        # the loss and its gradient are 8 bytes each
        assert abs(outcome.peak_bytes - outcome.predicted_bytes) <= 64, split


def test_nested_regions_give_what_the_whole_gives():
    """A region within a slice of another one."""
    case = case_of("pairs")
    outer = TimeSplit("linear_default_12", "mul_tensor_6", 0, 6, 3)
    sliced = split_regions(case.gm, case.arguments, [outer])
    inner = [n.name for n in sliced.graph.nodes if "softmax" in n.name]
    assert len(inner) == 4  # three slices, and the other attention
    nested = TimeSplit(inner[1], inner[1], 1, 2, 2)
    outcome = case.run(split_regions(case.gm, case.arguments, [outer, nested]))
    _equal(outcome.values, case.whole.values)


def test_a_loss_at_once_scales_with_what_backward_brings():
    case = case_of("head")
    split = TimeSplit("linear_default_3", "token_cross_entropy_default", 1, 12, 3, at_once=True)
    sliced = split_regions(case.gm, case.arguments, [split])
    outcome = case.run(sliced, again=True)
    loss, *grads = outcome.values
    _equal([loss, *(g / 2 for g in grads)], case.whole.values)


def test_random_numbers_are_in_no_region():
    case = case_of("dropout")
    for node in case.gm.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or draws(node):
            assert node.target is not torch.ops.aten.native_dropout.default or not may_split(node)


def test_a_region_that_the_program_lacks_is_refused():
    case = case_of("head")
    split = TimeSplit("linear_default_3", "token_cross_entropy_default", 2, 50, 2)
    with pytest.raises(PlanError, match="has no such region"):
        split_regions(case.gm, case.arguments, [split])  # the softmax is over classes
    with pytest.raises(PlanError, match="has no such region"):
        split_regions(case.gm, case.arguments, [replace(split, first="conv")])


@pytest.mark.parametrize(("name", "share"), [("vit, many patches", 0.3), ("head, many words", 0.3)])
def test_what_is_chosen_lowers_the_peak_of_training(name, share):
    case = case_of(name)
    step = UntracedStep(case.gm, tuple(case.arguments), OPTIONS)
    score = partial(training_score, step)
    before = score(step.as_is)
    budget = share * before.peak_bytes
    choice = choose_splits(step, budget, score, training=True)
    assert choice is not None
    assert choice.after.peak_bytes <= budget
    again = split_regions(case.gm, case.arguments, choice.splits)
    assert str(again.graph) == str(choice.program.graph)
    outcome = case.run(again)
    _equal(outcome.values, case.whole.values)


def test_no_program_is_scored_that_takes_longer_than_the_search(monkeypatch):
    case = case_of("head")
    step = UntracedStep(case.gm, tuple(case.arguments), OPTIONS)
    now, sizes = [0.0], {}
    monkeypatch.setattr(time_splits.time, "process_time", lambda: now[0])
    trace = UntracedStep.traced

    def traced(step, gm):
        result, size = trace(step, gm), len(gm.graph.nodes)
        now[0] += size  # a second for each node
        sizes[id(result)] = result, size
        return result

    def slow(traced):
        now[0] += sizes[id(traced)][1]  # and one more
        return training_score(step, traced)

    monkeypatch.setattr(UntracedStep, "traced", traced)
    assert choose_splits(step, 0.0, slow, training=True, seconds=0.0) is None
    alone = now[0]
    assert len(sizes) == 1
    assert choose_splits(step, 0.0, slow, training=True, seconds=20.0 * alone) is not None
    assert now[0] - alone <= 20 * alone and len(sizes) > 2


def test_parts_of_concatenations_are_freed_as_they_come():
    def function(x):
        parts = [(x * k).exp() for k in range(4)]
        return torch.cat([torch.cat(parts[:2], 1), *parts[2:]], 1).sin()

    x = torch.randn(3, 5)
    gm = make_fx(function, tracing_mode="fake")(x)
    filled = fill_concatenations(copy.deepcopy(gm))
    filled.recompile()
    assert torch.equal(filled(x), function(x))
    copies = filled.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    assert len(copies) == 5
    assert not filled.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)


@pytest.fixture
def _no_process_group_left():
    yield
    world.stop()


@pytest.mark.usefixtures("_no_process_group_left")
def test_a_budget_below_what_recomputation_reaches_is_kept_by_slices():
    torch.manual_seed(0)
    model = Head(16, 1000).double()
    x, target = torch.randn(2, 64, 16).double(), torch.randint(0, 1000, (2, 64))
    reference = copy.deepcopy(model)
    loss = reference(x, target)
    loss.backward()
    state = 2 * sum(p.nbytes for p in model.parameters())
    logits = 2 * 64 * 1000 * 8
    memory = state + 0.8 * logits  # logits and their gradient are 2
    plans = []
    for plan in (None, "the same"):
        own = copy.deepcopy(model)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
        given = {} if plan is None else {"plan": ShardingPlan.from_json(plans[0].to_json())}
        engine, _ = auto_engine(own, optimizer, "1", memory=memory, **given)
        engine(x, target).backward()
        for p in engine.parameters():
            p.grad = None
        with LiveMemory() as live:
            result = engine(x, target)
            result.backward()
        assert live.peak < 0.8 * logits + state / 2
        grads = [p.grad.full_tensor() for p in engine.parameters()]
        expected = [loss.detach(), *(p.grad for p in reference.parameters())]
        _equal([result.detach(), *grads], expected)
        plans.append(engine.plan)
    assert plans[0].time_splits and plans[0].time_splits == plans[1].time_splits
    split = plans[0].time_splits[0]
    assert split.at_once and "linear" in split.factor
    assert any("time_split_models.py" in source for source in split.sources)


@pytest.mark.usefixtures("_no_process_group_left")
def test_inference_fits_a_budget_in_slices():
    torch.manual_seed(0)
    model = ViT(16, 2, 2).double().requires_grad_(False)
    x = torch.randn(1, 3, 64, 64).double()
    expected, score = model(x), 2 * 256 * 256 * 8
    engine, _ = auto_engine(copy.deepcopy(model), None, "1", memory=1.2 * score)
    with torch.no_grad():
        engine(x)
        with LiveMemory() as live:
            result = engine(x)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)
    assert len(engine.plan.time_splits) == 2  # one per block
    assert live.peak == engine.memory_plan.peak_bytes == engine.plan.step.peak_bytes
    assert live.peak < engine.plan.memory.total_bytes <= 1.2 * score


def test_inference_is_scored_by_its_forward():
    case = case_of("vit")
    frozen = [t.detach() for t in case.arguments]
    step = UntracedStep(case.gm, tuple(frozen), OPTIONS)
    score = forward_score(step, step.as_is)
    assert score.at in {n.name for n in propagate_shapes(case.gm, frozen).graph.nodes}
