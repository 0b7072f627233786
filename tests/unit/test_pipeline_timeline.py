"""Simulated pipelines: bubbles and memory as published, transfers, and lower bounds."""

import dataclasses
import itertools
import math
import time

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from autopar.errors import PlanError
from autopar.schedule.pipeline.actions import Kind, PipelineSchedule
from autopar.schedule.pipeline.schedules import SCHEDULES, make_schedule
from autopar.schedule.pipeline.timeline import (
    StageCost,
    Timeline,
    peak_bytes,
    simulate,
    step_time_us,
)

TRAINING = [row.name for row in SCHEDULES.values() if row.trains]
EQUAL = StageCost(1, 1, 1)
SIZES = list(itertools.product((1, 2, 3, 4, 6), (1, 2, 3, 4, 6, 8, 12, 13)))


def run(name: str, p: int, m: int, cost: StageCost = EQUAL, v: int | None = None) -> Timeline:
    schedule = make_schedule(name, p, m, v)
    return simulate(schedule, [cost] * schedule.stages)


# --- published bubbles, for equal stages without transfers --------------------------------------


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_bubble_of_gpipe_and_1f1b(name: str, p: int, m: int):
    """(p - 1)/m of the ideal step, (p - 1)/(m + p - 1) of the whole one, for any m."""
    timeline = run(name, p, m)
    assert timeline.step_us == (m + p - 1) * 3
    assert timeline.bubble_over_compute == pytest.approx((p - 1) / m)
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize(("p", "m"), [(p, m) for p, m in SIZES if m >= p])
@pytest.mark.parametrize("v", [2, 3])
def test_bubble_of_interleaved_1f1b(p: int, m: int, v: int):
    """(p - 1)/(v m): Megatron's, where m is a multiple of p. Rounds of p microbatches or more, as
    equal as can be, keep it for any other m."""
    assert run("interleaved", p, m, v=v).bubble_over_compute == pytest.approx((p - 1) / (v * m))


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_bubble_of_zb_h1(p: int, m: int):
    """(p - 1)(F + I - W), a third of 1F1B's, if there are as many microbatches as ranks."""
    zb, one = run("zb-h1", p, m), run("1f1b", p, m)
    assert zb.step_us <= one.step_us
    if m >= p:
        assert 3 * zb.bubble_over_compute == pytest.approx(one.bubble_over_compute)
        assert zb.step_us - max(zb.busy_us) == p - 1


times = st.integers(1, 8)


@given(times, times, times, st.integers(1, 6), st.integers(0, 6))
@settings(max_examples=50, deadline=None)
def test_bubbles_for_any_times(f: int, i: int, w: int, p: int, more: int):
    m = p + more
    cost = StageCost(f, i, w)
    for name in ("gpipe", "1f1b"):
        assert run(name, p, m, cost).step_us == (m + p - 1) * (f + i + w)
    if w <= min(f, i):
        assert run("zb-h1", p, m, cost).step_us == m * (f + i + w) + (p - 1) * (f + i - w)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_zbv_is_never_idle_between_first_and_last_action(p: int, m: int):
    """The zero of Zero Bubble: bubble rate (cost - m (F + I + W)) / cost, where the cost is the
    longest time of a rank from its first to its last action, if F, I and W take the same. A step
    with a barrier takes longer than m (F + I + W): rank p - 1 begins p - 1 chunks after rank 0."""
    timeline = run("zbv", p, m)
    if m >= 2 * p - 1:
        assert timeline.bubble_rate == 0
        assert timeline.longest_span_us == 6 * m
        assert timeline.step_us == 6 * m + p - 1
    assert timeline.step_us <= run("1f1b", p, m, StageCost(2, 2, 2)).step_us


@pytest.mark.parametrize(("p", "m"), [(p, m) for p, m in SIZES if m >= 2 * p])
@pytest.mark.parametrize(("f", "i", "w"), [(1, 1, 1), (3, 2, 1), (2, 3, 2)])
def test_bubble_of_dualpipev(p: int, m: int, f: int, i: int, w: int):
    """At most DualPipe's (p - 1)(F&B + B - 3W), where an F and a B that could overlap do not: each
    sends its result when it ends, not when both end."""
    timeline = run("dualpipev", p, m, StageCost(f, i, w))
    b = i + w
    assert timeline.step_us - max(timeline.busy_us) <= (p - 1) * ((f + b) + b - 3 * w)
    if f == i == w:
        assert timeline.step_us - max(timeline.busy_us) == p - 1


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_evaluation_fills_the_pipeline_once(p: int, m: int):
    for name, v in (("forward-only", 1), ("forward-only", 3), ("forward-only-v", 2)):
        if v == 1 or name == "forward-only-v" or m % p == 0:
            idle = p - 1 if name == "forward-only" else 2 * (p - 1)
            timeline = run(name, p, m, v=v)
            assert timeline.step_us <= v * m + idle
            assert timeline.step_us >= max(v * m, v * p + m - 1)


# --- published memory ---------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_peak_activations(p: int, m: int):
    """In microbatches of a stage that holds all that it has until its W."""
    held = StageCost(1, 1, 1, held_bytes=1, weight_bytes=1)
    ranks = range(p)
    assert run("gpipe", p, m, held).peak_bytes == (m,) * p
    assert run("1f1b", p, m, held).peak_bytes == tuple(min(m, p - r) for r in ranks)
    assert max(run("zb-h1", p, m, held).peak_bytes) == min(m, p)
    # chunks of half the size: as much as 1F1B's first rank
    assert max(run("zbv", p, m, held).peak_bytes) <= min(2 * m, 2 * p)
    assert max(run("dualpipev", p, m, held).peak_bytes) <= min(2 * m, 2 * p + 1)
    if m >= 2 * p:
        assert run("zb-h1", p, m, held).peak_bytes == (p,) * p
        assert run("zbv", p, m, held).peak_bytes == (2 * p,) * p
        assert run("dualpipev", p, m, held).peak_bytes == (2 * p + 1,) * p
    if m % p == 0:  # Megatron's (1 + (p - 1)/(p v)) of 1F1B's, in chunks
        first = run("interleaved", p, m, held, v=2).peak_bytes[0]
        assert first == min(2 * m, 2 * p * (1 + (p - 1) / (2 * p)))


def test_bytes_are_held_until_their_last_use():
    cost = StageCost(1, 1, 1, state_bytes=100, held_bytes=10, weight_bytes=4)
    for text, peak in (
        ("0F0 0B0 0F1 0B1", 110),
        ("0F0 0F1 0B0 0B1", 120),
        ("0F0 0I0 0W0 0F1 0B1", 110),
        ("0F0 0I0 0F1 0B1 0W0", 114),
        ("0F0 0F1", 110),  # evaluation keeps nothing
    ):
        schedule = PipelineSchedule.parse(text)
        assert peak_bytes(schedule, [cost]) == (peak,) == simulate(schedule, [cost]).peak_bytes
    # What is recomputed is there during B or I, and until W what W needs of it.
    recomputes = StageCost(1, 1, 1, held_bytes=1, recomputed_bytes=10, weight_bytes=4)
    for text, peak in (
        ("0F0 0F1 0B0 0B1", 12),
        ("0F0 0F1 0I0 0I1 0W0 0W1", 15),
        ("0F0 0I0 0F1 0W0 0I1 0W1", 11),
    ):
        assert peak_bytes(PipelineSchedule.parse(text), [recomputes]) == (peak,)
    two = PipelineSchedule.parse("0F0 1F0 1B0 0B0")
    assert peak_bytes(two, [cost, dataclasses.replace(cost, held_bytes=7)]) == (217,)


# --- transfers, gathers, reductions -------------------------------------------------------------


def spans(text: str, *costs: StageCost) -> tuple[dict[str, tuple[float, float]], float]:
    timeline = simulate(PipelineSchedule.parse(text), costs)
    rows = itertools.chain.from_iterable(timeline.spans)
    return {str(a): (start, end) for a, start, end in rows}, timeline.step_us


def test_a_link_sends_one_result_at_a_time():
    first = StageCost(1, 1, 1, send_forward_us=5)
    second = StageCost(1, 1, 1, send_backward_us=0.5)
    found, step_us = spans("0F0 0F1 0B0 0B1\n1F0 1F1 1B0 1B1", first, second)
    assert (found["0F0"], found["0F1"]) == ((0, 1), (1, 2))
    assert found["1F0"] == (6, 7)
    assert found["1F1"] == (11, 12)  # sent at 6, not at 2
    assert (found["1B0"], found["0B0"]) == ((12, 14), (14.5, 16.5))
    assert step_us == 18.5


def test_nothing_is_sent_within_a_rank():
    cost = StageCost(1, 1, 1, send_forward_us=5, send_backward_us=5)
    assert spans("0F0 1F0 1B0 0B0", cost, cost)[1] == 6
    # V of 2 ranks: stage 1 to 2 is on one rank
    assert spans("0F0 3F0 3B0 0B0\n1F0 2F0 2B0 1B0", *[cost] * 4)[1] == 4 * 3 + 4 * 5


def test_gathers_and_reductions_run_beside_compute():
    cost = StageCost(2, 1, 1, before_us=3, after_us=4)
    found, step_us = spans("0F0 1F0 1B0 0B0", cost, cost)
    assert found["0F0"] == (3, 5)
    assert found["1F0"] == (6, 8)  # gathered at 6, after stage 0
    assert (found["1B0"], found["0B0"]) == ((8, 10), (10, 12))
    assert step_us == 18  # reductions: 10 to 14, 14 to 18


def test_idle_time_of_unequal_ranks():
    timeline = simulate(
        PipelineSchedule.parse("0F0 0B0\n1F0 1B0"), [StageCost(1, 1, 1), StageCost(2, 1, 2)]
    )
    assert timeline.step_us == 8
    assert timeline.busy_us == (3, 5)
    assert timeline.bubble_fraction == pytest.approx(1 - 8 / 16)
    assert timeline.bubble_over_compute == pytest.approx(8 / 5 - 1)
    nothing = simulate(PipelineSchedule.parse("0F0"), [StageCost(0)])
    assert nothing.bubble_fraction == nothing.bubble_over_compute == nothing.bubble_rate == 0


def test_costs_are_validated():
    with pytest.raises(PlanError, match="input_us is -1; 0 is the least"):
        StageCost(1, -1)
    with pytest.raises(PlanError, match="forward_us is nan"):
        StageCost(math.nan)
    with pytest.raises(PlanError, match="W needs 5 bytes of the 4 that are held from F on"):
        StageCost(1, 1, 1, held_bytes=4, weight_bytes=5)
    with pytest.raises(
        PlanError, match=r"W needs 9 bytes of the 4 .* F on and 4 recomputed; raise"
    ):
        StageCost(1, 1, 1, held_bytes=4, recomputed_bytes=4, weight_bytes=9)
    schedule = make_schedule("1f1b", 2, 2)
    for function in (simulate, step_time_us, peak_bytes):
        with pytest.raises(PlanError, match="has 2 stages, but there are costs of 1; give one"):
            function(schedule, [EQUAL])


# --- any costs ----------------------------------------------------------------------------------

us = st.floats(0, 100).map(lambda x: round(x, 3))
costs = st.builds(StageCost, us, us, us, us, us, before_us=us, after_us=us)


@st.composite
def priced(draw: st.DrawFn) -> tuple[PipelineSchedule, list[StageCost]]:
    name = draw(st.sampled_from(list(SCHEDULES)))
    schedule = make_schedule(name, draw(st.integers(1, 5)), draw(st.integers(1, 10)))
    return schedule, draw(st.lists(costs, min_size=schedule.stages, max_size=schedule.stages))


@given(priced())
@settings(max_examples=150, deadline=None)
def test_a_step_takes_as_long_as_it_has_to(drawn: tuple[PipelineSchedule, list[StageCost]]):
    schedule, costs = drawn
    timeline = simulate(schedule, costs)
    assert step_time_us(schedule, costs) == timeline.step_us
    step_us, m, trains = timeline.step_us + 1e-6, schedule.microbatches, schedule.trains
    for busy_us, stages in zip(timeline.busy_us, schedule.stages_of_rank, strict=True):
        expected = (costs[s].forward_us + trains * costs[s].backward_us for s in stages)
        assert busy_us == pytest.approx(m * sum(expected))
        assert busy_us <= step_us
        assert sum(costs[s].before_us for s in stages[:1]) <= step_us
        assert sum(costs[s].after_us for s in stages) <= step_us
    rank_of = schedule.rank_of_stage
    crossings = [s for s in range(schedule.stages - 1) if rank_of[s] != rank_of[s + 1]]
    path_us = sum(cost.forward_us + trains * cost.input_us for cost in costs)
    path_us += sum(costs[s].send_forward_us for s in crossings)
    path_us += trains * sum(costs[s + 1].send_backward_us for s in crossings)
    assert costs[0].before_us + path_us + trains * costs[0].after_us <= step_us
    for link in crossings:
        assert m * costs[link].send_forward_us <= step_us


@given(priced())
@settings(max_examples=100, deadline=None)
def test_spans_keep_what_actions_wait_for(drawn: tuple[PipelineSchedule, list[StageCost]]):
    schedule, costs = drawn
    timeline = simulate(schedule, costs)
    when = {}
    for spans_, actions in zip(timeline.spans, schedule.ranks, strict=True):
        assert tuple(span.action for span in spans_) == actions
        for one, two in itertools.pairwise(spans_):
            assert one.end_us <= two.start_us + 1e-6
        when.update({(a.stage, a.kind, a.microbatch): (start, end) for a, start, end in spans_})
    for (stage, kind, k), (start, _) in when.items():
        before = [(stage - 1, Kind.FORWARD, k)] if kind is Kind.FORWARD else []
        if kind in (Kind.BACKWARD, Kind.INPUT):
            before = [(stage, Kind.FORWARD, k)]
            before += [(stage + 1, other, k) for other in (Kind.BACKWARD, Kind.INPUT)]
        if kind is Kind.WEIGHT:
            before = [(stage, Kind.INPUT, k)]
        assert all(when[key][1] <= start + 1e-6 for key in before if key in when)


@pytest.mark.parametrize("name", ["interleaved", "zbv"])
def test_simulation_is_fast(name: str):
    """The planner simulates thousands of steps, in 0.3 to 2 ms each on an idle machine: were they
    quadratic in the actions of a rank, they would take a hundred times as long."""
    schedule = make_schedule(name, 8, 64)

    def least_ms(function) -> float:
        taken = []
        for _ in range(5):
            begin = time.process_time()
            function(schedule, [EQUAL] * 16)
            taken.append(1e3 * (time.process_time() - begin))
        return min(taken)

    assert least_ms(simulate) < 60
    assert least_ms(step_time_us) < 30
