"""The predicted timeline: its parts, its trace, its charts."""

import itertools
from dataclasses import replace

import pytest

from autopar import ClusterInfo, autoplan
from autopar.cluster.curve import Curve
from autopar.cluster.link import Link
from autopar.passes.local_step import local_step
from autopar.plan_records import ModuleMemory
from autopar.planner.planner import trainable_inputs
from autopar.report.charts import live_figure, modules_figure
from autopar.report.content import alike_blocks
from autopar.report.trace import trace_of
from autopar.schedule.budget import describe
from autopar.schedule.build import schedule_of
from autopar.schedule.program import eager_schedule
from autopar.schedule.simulate import live_bytes, timeline
from autopar.schedule.timeline import Timeline, block_of
from autopar.units import bytes_unit
from tests.memory import chain, step_of
from tests.models import CASES


@pytest.fixture(scope="module")
def checkpointed() -> tuple:
    """GPT-2 of two layers with half of its values kept."""
    program = step_of("gpt2").program
    needed = sorted(program.needed)
    schedule = schedule_of(program, needed[::2])
    return program, schedule, timeline(program, schedule)


def test_parts_add_up_to_what_is_alive(checkpointed):
    program, schedule, predicted = checkpointed
    assert predicted.live_bytes == tuple(live_bytes(program, schedule))
    assert all(m.recomputed_bytes == 0 for m in predicted.events[: predicted.forward])
    names = [m.name for m in predicted.events if m.recomputed]
    assert names == [program.ops[i].name for i in schedule.recomputed(program)]
    kept = sum(program.nbytes[s] for s in schedule.saved(program))
    assert predicted.events[predicted.forward - 1].kept_bytes <= kept
    assert predicted.events[predicted.forward].kept_bytes == kept
    assert predicted.us == pytest.approx(sum(m.us for m in predicted.events))


def test_modules_share_out_what_is_kept_and_recomputed(checkpointed):
    program, schedule, predicted = checkpointed
    rows = predicted.by_module()
    modules = [r.module for r in rows]
    assert [m for m in modules if m.endswith((".h.0", ".h.1"))] == [
        "gpt2.transformer.h.0", "gpt2.transformer.h.1",
    ]  # fmt: skip
    assert sum(r.kept_bytes for r in rows) == sum(
        program.nbytes[s] for s in schedule.saved(program)
    )
    assert sum(r.recompute_flops for r in rows) == schedule.recompute_cost(program)


def test_blocks():
    assert block_of("gpt2.transformer.h.3.attn.c_proj") == "gpt2.transformer.h.3"
    assert block_of("layer1.0.conv2") == "layer1.0"
    assert block_of("head") == "head"


def test_a_trace_is_a_row_and_counters(checkpointed):
    *_, predicted = checkpointed
    events = trace_of(predicted)["traceEvents"]
    calls = [e for e in events if e["ph"] == "X"]
    assert [e["name"] for e in calls] == [m.name for m in predicted.events]
    for before, after in itertools.pairwise(calls):  # one stream: nothing overlaps
        assert before["ts"] + before["dur"] == pytest.approx(after["ts"])
    assert {e["cat"] for e in calls} == {"forward", "backward", "recompute"}
    live = [e for e in events if e["ph"] == "C" and e["name"] == "live bytes"]
    assert max(e["args"]["bytes"] for e in live) == predicted.peak_bytes
    assert live[-1]["args"]["bytes"] == 0
    parts = [e for e in events if e["name"] == "live by origin"]
    assert [sum(e["args"].values()) for e in parts] == list(predicted.live_bytes)
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"predicted step", "compute"}


def test_charts_show_the_numbers(checkpointed):
    program, schedule, predicted = checkpointed
    plan = describe(program, schedule)
    step = plan.summary(2.0**20)
    figure = live_figure(step)
    stacked = [sum(ys) for ys in zip(*(trace.y for trace in figure.data), strict=True)]
    unit, scale = bytes_unit(predicted.peak_bytes)
    assert figure.layout.yaxis.title.text == f"{unit} that the step makes"
    assert max(stacked) * scale == pytest.approx(predicted.peak_bytes)
    bars = {t.name: sum(t.x) for t in modules_figure(step).data}
    assert set(bars) == {
        "kept",
        "offloaded",
        "parameters on the host",
        "recomputed",
        "re-gathered",
    }
    kept = [r.kept_bytes for r in predicted.by_module()]
    assert bars["kept"] * bytes_unit(max(kept))[1] == pytest.approx(sum(kept))
    assert bars["recomputed"] * 1e3 == pytest.approx(plan.added_us)
    assert predicted.events[predicted.peak_at].name in step.peak_at


def test_alike_blocks_are_one_bar():
    numbers = (100, 0, 0, 2.0, 3.0, 0.0)
    modules = [ModuleMemory("embed", 7, 0, 0, 0.0, 0.0, 0.0)]
    modules += [ModuleMemory(f"layers.{k}", *numbers) for k in range(4)]
    modules += [ModuleMemory("layers.4", 300, *numbers[1:])]
    rows = {m.module: (m.kept_bytes, m.recompute_us) for m in alike_blocks(modules)}
    assert rows == {"embed": (7, 0.0), "layers.{0-3}": (400, 8.0), "layers.4": (300, 2.0)}


def test_an_eager_step_recomputes_nothing():
    program = chain([4, 2, 1])
    predicted = timeline(program, eager_schedule(program))
    assert [m.kept_bytes for m in predicted.events] == [4, 6, 6, 6, 4, 0]
    assert not any(m.recomputed or m.recomputed_bytes for m in predicted.events)
    assert Timeline((), 0).peak_bytes == 0


def test_a_measured_device_has_one_time_for_plans_and_schedules():
    known = replace(
        ClusterInfo.of("1").device,
        flops_by_size={"matmul.float32": Curve.constant(1e11)},
        extra_ns={"function": 20.0, "reduction": 5.0},
        launch_us=0.0,  # the model is too small to tell anything else
    )
    case = CASES["gpt2"]
    times = []
    for device in (replace(known, extra_ns={"index": 0.0}), known):
        model = case.build()
        cluster = ClusterInfo((1,), device, (Link(1e-6, 1e-9),))
        planned = autoplan(model, (), case.batch(0), cluster=cluster)
        trainable = trainable_inputs(planned.graph, model)
        program = local_step(planned.graph, planned.plan, trainable=trainable).program
        predicted = timeline(program, eager_schedule(program))
        assert predicted.us == pytest.approx(planned.plan.time.compute_us, rel=0.1)
        times.append(predicted.us)
    assert times[1] > 1.1 * times[0]
