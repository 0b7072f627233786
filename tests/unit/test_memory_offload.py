"""Offloading values: exact, within the budget as predicted, and hidden where it can be."""

import functools
from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from autopar import ClusterInfo
from autopar.cluster.link import Link
from autopar.schedule.offload import host_bytes
from autopar.schedule.order import in_order
from autopar.schedule.pareto import ScheduleFront
from autopar.schedule.program import SIDE, Program, Resource
from autopar.schedule.simulate import check, peak_bytes, timeline
from autopar.schedule.streams import host_wait_us
from tests import lowering
from tests.memory import step_of, without_gradients

# copies take next to nothing, so that moving a value costs less than recomputing it
FAST = replace(ClusterInfo.of("1"), host_link=Link(1e-9, 1e-15))


@functools.cache
def program_of(name: str, cluster: ClusterInfo = FAST) -> Program:
    step = step_of(name)
    return in_order(
        without_gradients(lowering.program_of(step.gm, step.arguments, cluster=cluster))
    )


def between(program: Program, share: float) -> float:
    """A budget between the smallest peak without the host, and everything kept."""
    alone = ScheduleFront(replace(program, transfers={}))
    smallest = alone.smallest().peak_bytes
    return smallest + share * (alone.eager_bytes - smallest)


@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_exact_to_the_bit_and_as_predicted(name):
    step, program = step_of(name), program_of(name)
    _, expected, buffers = step.run(step.lowered())
    (point,) = ScheduleFront(program).solve([between(program, 0.2)])
    check(program, point.schedule)
    assert point.schedule.offloaded(program)
    lowered = step.lowered(point.schedule, cluster=FAST)
    calls = [str(n.target) for n in lowered.step.backward.graph.nodes]
    moved = len(point.schedule.offloaded(program))
    assert calls.count("autopar.reload.default") == moved
    assert calls.count("autopar.finish_reload.default") == moved
    peak, grads, updated = step.run(lowered)
    assert peak == pytest.approx(point.peak_bytes, rel=0.03, abs=2048)
    for actual, reference in zip((*grads, *updated), (*expected, *buffers), strict=True):
        assert torch.equal(actual, reference)


def test_a_full_host_takes_no_more():
    program = replace(program_of("gpt2"), host_bytes=20_000)
    budget = between(program, 0.2)
    (point,) = ScheduleFront(program).solve([budget])
    assert 0 < host_bytes(program, point.schedule) <= 20_000
    assert point.peak_bytes <= budget


def test_where_copies_run_beside_compute_they_are_hidden_or_waited_for():
    program = replace(program_of("gpt2"), beside=SIDE)
    budget = between(program, 0.3)
    (point,) = ScheduleFront(program).solve([budget])
    assert point.schedule.offloaded(program)
    predicted = timeline(program, point.schedule)
    assert predicted.waited_us[Resource.HOST] < 1e-4 * predicted.us
    # the same copies by a link on which one takes as long as the step_us step
    step_us = predicted.us
    slow = tuple(
        replace(op, us=step_us) if op.resource is Resource.HOST else op for op in program.ops
    )
    delayed = replace(program, ops=slow)
    assert host_wait_us(delayed, point.schedule) > step_us
    # so values are recomputed instead
    (recomputing,) = ScheduleFront(delayed).solve([budget])
    assert not recomputing.schedule.offloaded(delayed)
    assert recomputing.cost < host_wait_us(delayed, point.schedule)
    assert peak_bytes(delayed, recomputing.schedule) <= budget


def test_offloading_needs_less_than_recomputing():
    """The host holds values that would stay on the device otherwise."""
    program = program_of("gpt2")
    smallest = ScheduleFront(replace(program, transfers={})).smallest().peak_bytes
    assert ScheduleFront(program).smallest().peak_bytes <= smallest


def test_a_concatenation_is_offloaded_after_it_runs() -> None:
    """It has memory from its first part on, which is copied into it before the other is made."""

    def joined(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            y = torch.cat([(x @ w).sin(), (x @ w).cos() * 2], 1)
            x = (y * y)[:, ::2]
        return x.square().sum()

    arguments = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((64, 32), (32, 32))]
    gm = make_fx(lambda *given: (joined(*given),))(*(x.detach() for x in arguments))
    cluster = replace(FAST, device=replace(FAST.device, overlaps=True))
    program = in_order(lowering.program_of(gm, arguments, cluster=cluster))
    front = ScheduleFront(program)
    smallest = front.smallest().peak_bytes
    budgets = [smallest + k / 8 * (front.eager_bytes - smallest) for k in range(8)]
    moved = set()
    for point in front.solve(budgets):
        check(program, point.schedule)
        moved |= point.schedule.offloaded(program)
    fills = {s for op in program.ops if op.fills for s in op.makes}
    assert moved & fills
