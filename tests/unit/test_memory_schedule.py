"""Memory schedules: prediction against measurement, exact gradients, and the Pareto front."""

import numpy as np
import pytest
import torch

from autopar.errors import InfeasibleError
from autopar.schedule.budget import plan_memory
from autopar.schedule.build import schedule_of
from autopar.schedule.live_ranges import live_ranges
from autopar.schedule.order import in_order
from autopar.schedule.pareto import ScheduleFront
from autopar.schedule.program import Op, Program, Schedule, eager_schedule
from autopar.schedule.simulate import check, peak_bytes, timeline
from autopar.schedule.stages import linearize
from tests.memory import chain, step_of, without_overwriting


@pytest.mark.parametrize("name", ["mlp", "gpt2", "resnet", "mixtral"])
def test_measured_as_predicted_and_exact_to_the_bit(name):
    step = step_of(name)
    program, front = step.program, step.front
    plain = step.lowered(disable=frozenset({"overwrite"}))
    _, expected, buffers = step.run(plain)
    budgets = np.linspace(front.smallest().peak_bytes, front.eager_bytes, 4)
    for budget, point in zip(budgets, front.solve(budgets), strict=True):
        assert point is not None
        check(program, point.schedule)
        peak, grads, updated = step.run(step.lowered(point.schedule))
        assert point.peak_bytes <= budget
        assert peak == pytest.approx(point.peak_bytes, rel=0.03, abs=2048)
        for actual, reference in zip(grads, expected, strict=True):
            assert torch.equal(actual, reference)
        for actual, reference in zip(updated, buffers, strict=True):  # statistics updated once
            assert torch.equal(actual, reference)


@pytest.mark.parametrize("dropout", [0.1, 0.3, 0.5])
def test_dropout_is_replayed(dropout):
    step = step_of("gpt2", dropout)
    _, expected, _ = step.run(step.lowered())
    nothing_kept = schedule_of(step.program, ())
    names = [step.program.ops[i].name for i in nothing_kept.recomputed(step.program)]
    assert any("keep_mask" in n for n in names)
    _, grads, _ = step.run(step.lowered(nothing_kept))
    for actual, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=0, atol=1e-9)


def test_recomputed_operators_are_in_the_backward_graph():
    step = step_of("gpt2")
    program = step.program
    smallest = schedule_of(program, ())
    lowered_step = step.lowered(smallest)
    calls = [n for n in lowered_step.step.backward.graph.nodes if n.op == "call_function"]
    attention = [n for n in calls if "attention_for_cpu.default" in str(n.target)]
    recomputed = [i for i in smallest.recomputed(program) if "attention" in program.ops[i].name]
    assert len(attention) == len(recomputed) > 0


def test_the_pareto_front_is_never_worse_than_checkpointing():
    front = step_of("gpt2").front
    for point in [c for c in front.candidates if c.name == "checkpointing"]:
        (best,) = front.solve([point.peak_bytes])
        assert best is not None and best.cost <= point.cost


def test_the_smallest_peak_does_not_depend_on_what_was_searched_before():
    program = step_of("mixtral").program
    first, searched = ScheduleFront(program), ScheduleFront(program)
    least = first.low()
    searched.solve([1.1 * least.peak_bytes])
    assert searched.low() == least
    assert searched.smallest().peak_bytes <= least.peak_bytes


def test_writing_over_operands_saves_memory_and_changes_nothing():
    step = step_of("gpt2")
    schedule = eager_schedule(step.program)
    over = step.lowered(schedule)
    apart = step.lowered(schedule, disable=frozenset({"overwrite"}))
    peak_over, grads_over, _ = step.run(over)
    peak_apart, grads_apart, _ = step.run(apart)
    assert peak_over < peak_apart
    assert peak_apart == pytest.approx(
        peak_bytes(without_overwriting(step.program), schedule), rel=0.03
    )
    assert all(map(torch.equal, grads_over, grads_apart))


def test_a_budget_too_small_is_refused_with_the_smallest():
    program = step_of("resnet").program
    with pytest.raises(InfeasibleError, match="smallest peak the search found") as error:
        plan_memory(program, 1000.0)
    plan = plan_memory(program, error.value.smallest_bytes)
    assert plan.peak_bytes <= error.value.smallest_bytes
    assert plan.schedule.recompute_cost(program) > 0


def test_blocks_are_one_kind_and_the_backward_is_divided_among_them():
    program = step_of("gpt2").program
    stages = linearize(program)
    kinds = [s.kind for s in stages]
    assert max(map(kinds.count, kinds)) >= 2
    assert [i for s in stages for i in s.forward] == list(program.forward)
    assert sorted(i for s in stages for i in s.backward) == sorted(program.backward)


def test_live_bytes_of_a_chain():
    program = chain([4, 2, 1])
    schedule = eager_schedule(program)
    # f0: a; f1: a b; f2: a b c; b2 (reads b, makes 1): a b c' ; b1 (reads a): a + 1 + 2; b0: 2 + 0
    assert timeline(program, schedule).live_bytes == (4, 6, 7, 7, 7, 2)
    assert schedule.saved(program) == (1, 2)
    recomputing = Schedule((0, 1, 2), (3, 0, 4, 5))
    assert recomputing.recomputed(program) == (0,)
    assert recomputing.saved(program) == (2,)
    check(program, recomputing)
    assert recomputing.recompute_cost(program) == 10.0
    with pytest.raises(AssertionError, match="that are not there"):
        check(program, Schedule((0, 1, 2), (4, 3, 5)))


def test_an_order_in_which_fewer_bytes_are_alive():
    # two readers of the same gradient: the one that ends the life of a large value goes first
    ops = (
        Op("f0", "f", (0,), (1,), 1.0, 1.0),
        Op("f1", "f", (1,), (2,), 1.0, 1.0),
        Op("pass_on", "b", (3, 0), (4,), 1.0, 1.0),
        Op("weight", "b", (3, 1), (5,), 1.0, 1.0),
        Op("end", "b", (4,), (6,), 1.0, 1.0),
    )
    program = Program(
        ops, (0, 1), (0, 100, 1, 0, 50, 0, 0), frozenset({2}), frozenset({5, 6}), frozenset({3})
    )
    assert in_order(program).order == (3, 2, 4)
    better = in_order(program)
    assert peak_bytes(better, eager_schedule(better)) < peak_bytes(program, eager_schedule(program))
    assert len(live_ranges(better, eager_schedule(better)).storage) == 5
