"""Shards of parameters on the host for a part of the step: below what fits otherwise, as predicted,
and there whenever somebody looks."""

import copy
import functools
import io
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from autopar import ClusterInfo, auto_engine
from autopar.cluster.link import Link
from autopar.comm import world as environment
from autopar.comm.offloaded_parameters import evicted_shard, offloadable
from autopar.errors import InfeasibleError
from autopar.planner.joint import JointPlan, plan_jointly
from autopar.planner.planner import build_problem
from autopar.report.content import step_table
from autopar.schedule.budget import MemoryPlan, StepBudget, describe, plan_memory
from autopar.schedule.build import schedule_of
from autopar.schedule.live_ranges import live_ranges
from autopar.schedule.offload import host_bytes, with_offload
from autopar.schedule.program import Program, Schedule, eager_schedule
from autopar.schedule.refine import Refiner
from autopar.schedule.simulate import check, live_bytes
from autopar.schedule.streams import run_times
from autopar.testing.live_memory import LiveMemory
from tests.models import Classifier, words

ALONE = ClusterInfo.of("1")
# copies take next to nothing, so that moving costs less than recomputing
FAST = replace(ALONE, host_link=Link(1e-9, 1e-15))
SMALL = replace(FAST, host_memory_bytes=250_000.0)
CLUSTERS = {"alone": ALONE, "fast": FAST, "small": SMALL}


@pytest.fixture(autouse=True, scope="module")
def _no_process_group_left() -> Iterator[None]:
    yield
    environment.stop()


def built() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Classifier().double()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@functools.cache
def joint_plan(budget: float, name: str = "fast", count: int = 128) -> JointPlan:
    model, _ = built()
    cluster = CLUSTERS[name].with_memory(budget)
    return plan_jointly(
        build_problem(model, (), words(0, count), cluster=cluster, optimizer_state=0.0)
    )


@functools.cache
def smallest(name: str = "fast", count: int = 128) -> float:
    with pytest.raises(InfeasibleError) as error:
        joint_plan(1000.0, name, count)
    assert error.value.smallest_bytes is not None
    return error.value.smallest_bytes


def engine(budget: float) -> tuple:
    return auto_engine(*built(), FAST, memory=budget)


def offloaded(model: torch.nn.Module) -> list[str]:
    """Parameters that are on the host now."""
    return [n for n, p in model.named_parameters() if evicted_shard(p) is not None]


def whole(p: torch.Tensor) -> torch.Tensor:
    return p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()


def assert_same(model: torch.nn.Module, alone: torch.nn.Module) -> None:
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(p), whole(q), rtol=0, atol=1e-12)
        torch.testing.assert_close(whole(p.grad), whole(q.grad), rtol=0, atol=1e-12)


def test_training_is_the_same_below_what_fits_otherwise():
    low = smallest()
    assert low < 0.9 * smallest("alone")
    model, optimizer = engine(low)
    alone, beside = built()
    for step in range(3):
        data = words(step)
        optimizer.zero_grad()
        beside.zero_grad()
        with LiveMemory() as live:
            loss = model(**data)
            assert set(offloaded(model)) <= set(model.memory_plan.parameters_on_host)
            assert offloaded(model)
            loss.backward()
        assert not offloaded(model)
        alone(**data).backward()
        assert_same(model, alone)
        optimizer.step()
        beside.step()
    assert live.peak == pytest.approx(model.memory_plan.peak_bytes, abs=64)


def test_beside_the_optimizers_state():
    """The smallest budget of an optimizer without state is enough for one with it, on the host."""
    (model, _), (alone, _) = built(), built()
    optimizer, beside = (
        torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-3) for m in (model, alone)
    )
    count = 400
    model, _ = auto_engine(model, optimizer, FAST, memory=smallest("fast", count))
    for step in range(3):
        data = words(step, count)
        loss = model(**data)
        assert offloaded(model)
        loss.backward()
        alone(**data).backward()
        assert_same(model, alone)
        for each in (optimizer, beside):
            each.step()
            each.zero_grad()
    assert model.memory_plan.state_on_host


def test_the_report_names_them():
    joint = joint_plan(smallest())
    plan, program = joint.planned.plan, joint.step.program
    held = sum(p.nbytes for p in program.parameters.values())
    assert plan.memory.parameters_bytes < held <= plan.step.resident_bytes
    assert plan.memory.total_bytes <= smallest()
    table = step_table(plan)
    column = table.columns.index("on the host>")
    assert table.rows[table.total][column].endswith(" of parameters")
    names = joint.memory.parameters_on_host
    assert "head.weight" in names
    assert all(name in table.note and name in str(joint.memory) for name in names)
    events = {m.name: m for m in joint.memory.timeline.events}
    assert events["head.weight evicted"].start_us < events["head.weight reloaded"].start_us
    assert events["head.weight to the host"].module == "head"


def test_a_full_host_takes_no_more():
    joint = joint_plan(smallest("small"), "small")
    assert smallest() < smallest("small")
    assert 0 < host_bytes(joint.step.program, joint.memory.schedule) <= SMALL.host_memory_bytes


def simulated(program: Program, schedule: Schedule) -> list[int]:
    """Bytes of parameters that are missing at every position, computed a second way."""
    evicts = {program.transfers[s].evict: p.nbytes for s, p in program.parameters.items()}
    reloads = {program.transfers[s].reload: p.nbytes for s, p in program.parameters.items()}
    missing, at_position = 0, []
    for i in schedule.forward + schedule.backward:
        missing -= reloads.get(i, 0)
        at_position.append(missing)
        missing += evicts.get(i, 0)
    assert missing == 0
    return at_position


def wandering(program: Program, seed: int) -> Iterator[Schedule]:
    """Parameters are offloaded one after the other, at random positions, some more than once."""
    refiner = Refiner(program, {i: op.us for i, op in enumerate(program.ops)})
    draw = random.Random(seed)
    schedule = schedule_of(program, set()) if seed % 2 else eager_schedule(program)
    for _ in range(20):
        sequence = schedule.forward + schedule.backward
        own = live_ranges(program, schedule).each()
        s, start, end = draw.choice([x for x in own if x[0] in program.parameters])
        at, ops = draw.randint(start, end), [program.ops[i] for i in sequence]
        interval = refiner.idle_interval(ops, len(schedule.forward), s, start, end, at)
        if interval is not None:
            times = run_times(program, sequence)
            schedule = with_offload(program, schedule, times, s, interval, np.array([at]))
            # behind the two copies
            assert simulated(program, schedule)[at + 2] >= program.parameters[s].nbytes
            yield schedule


def test_offloaded_parameters_are_reloaded_for_their_readers():
    program = joint_plan(smallest()).step.program
    without_offload = replace(program, parameters={})
    count = 0
    for seed in range(20):
        for schedule in wandering(program, seed):
            check(program, schedule)
            missing = simulated(program, schedule)
            assert (
                live_bytes(program, schedule) == live_bytes(without_offload, schedule) - missing
            ).all()
            count += 1
    assert count > 100


def test_what_is_reloaded_was_evicted():
    """Keeping what there is room for takes no evict away, of a parameter that moves twice."""
    program = joint_plan(smallest()).step.program
    evicts = {program.transfers[s].evict for s in program.parameters}
    refiner = Refiner(program, {i: op.us for i, op in enumerate(program.ops)})
    twice = 0
    for seed in range(20):
        *_, schedule = wandering(program, seed)
        grown = refiner.grow(schedule, live_bytes(program, schedule).max())
        check(program, grown)
        count, sequence = len(grown.forward), grown.forward + grown.backward
        moved = [k for k, i in enumerate(sequence) if i in evicts]
        twice += len(moved) > len({sequence[k] for k in moved})
        for k in moved:
            without = (*sequence[:k], *sequence[k + 1 :])
            cut = count - (k < count)
            with pytest.raises(AssertionError, match=r"reloads .* which are not evicted"):
                check(program, Schedule(without[:cut], without[cut:]))
    assert twice


@pytest.mark.parametrize("seed", range(4))
def test_such_schedules_run(monkeypatch, seed):
    def choose(self: StepBudget, program: Program, *_: float, **__: float) -> MemoryPlan:
        *_, last = wandering(program, seed)
        return describe(program, last)

    monkeypatch.setattr(StepBudget, "choose", choose)
    (model, _), (alone, _) = engine(2.0**30), built()
    for step in range(2):
        data = words(step)
        with LiveMemory() as live:
            model(**data).backward()
        alone(**data).backward()
    plan = model.memory_plan
    calls = plan.schedule.forward + plan.schedule.backward
    assert len(calls) - len(set(calls)) > 2
    assert_same(model, alone)
    assert live.peak == pytest.approx(plan.peak_bytes, abs=64)


def plan_of(program: Program, share: float) -> MemoryPlan:
    return plan_memory(program, share * plan_memory(program, np.inf).peak_bytes)


@pytest.mark.parametrize("share", [0.9, 0.7, 0.6, 0.55])
def test_recomputed_operators_find_their_weights(share):
    program = joint_plan(smallest()).step.program
    check(program, plan_of(program, share).schedule)


def forwards_again(model, alone):
    model(**words(9))
    alone(**words(9))


def trains_again(model, alone):
    model(**words(9)).backward()
    alone(**words(9)).backward()


def evaluates(model, alone):
    with torch.no_grad():
        assert model(**words(9)) == alone(**words(9))
    assert not offloaded(model)


def prepares(model, alone):
    model.plan_for(**words(9, count=64))
    assert not offloaded(model)


def reads(model, alone):
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q)
        assert torch.equal(p.to_local(), q)


def copies(model, alone):
    state = copy.deepcopy(model.state_dict())
    assert all(torch.equal(state[n].full_tensor(), v) for n, v in alone.state_dict().items())
    torch.save(list(model.parameters()), io.BytesIO())


def keeps_an_array(model, alone):
    """NumPy holds what it was given, so that the weight stays on the device from here on."""
    array = model.head.weight.to_local().detach().numpy()
    forwards_again(model, alone)
    assert "head.weight" not in offloaded(model)
    assert (array == alone.head.weight.detach().numpy()).all()


@pytest.mark.sample(0.6)
@pytest.mark.parametrize(
    "happens", [forwards_again, trains_again, evaluates, prepares, reads, copies, keeps_an_array]
)
def test_between_forward_and_backward(happens):
    (model, _), (alone, _) = engine(smallest()), built()
    loss, expected = model(**words(0)), alone(**words(0))
    assert offloaded(model)
    happens(model, alone)
    loss.backward()
    expected.backward()
    assert_same(model, alone)


def test_a_penalty_on_weights_that_are_away():
    (model, _), (alone, _) = engine(smallest()), built()
    for m in (model, alone):
        loss = m(**words(0))
        penalty = sum(p.pow(2).sum() for p in m.parameters())
        (loss + (penalty if m is alone else penalty.full_tensor())).backward()
    assert_same(model, alone)


def test_a_loss_that_is_dropped_and_a_backward_that_fails():
    (model, optimizer), (alone, beside) = engine(smallest()), built()
    model(**words(0)).backward()
    alone(**words(0)).backward()
    model(**words(1))
    assert offloaded(model)
    optimizer.step()  # with the gradients of before
    beside.step()
    assert not offloaded(model)
    assert_same(model, alone)

    def fails(grad):
        raise OSError

    loss = model(**words(1))
    loss.register_hook(fails)
    with pytest.raises(OSError):
        loss.backward()
    assert offloaded(model)
    assert_same(model, alone)
    assert not offloaded(model)


def test_a_step_between_forward_and_backward_is_refused_as_ever():
    model, optimizer = engine(smallest())
    model(**words(0)).backward()
    loss = model(**words(1))
    gone = [e.shard for e in map(evicted_shard, model.parameters()) if e is not None]
    versions = [(shard, shard._version) for shard in gone]
    optimizer.step()
    assert versions and all(shard._version > before for shard, before in versions)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_others_hold_stays():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    model, _ = engine(2.0**30)
    model(**words(0))
    mesh = init_device_mesh("cpu", (1,))

    def parameter(local: torch.Tensor) -> torch.Tensor:
        return DTensor.from_local(local, mesh, [Replicate()])

    flat, tied, buffer = torch.zeros(8), torch.zeros(4), torch.zeros(4)
    array = torch.from_numpy(np.zeros(4))
    parameters = {
        "own": parameter(torch.zeros(2, 3)),
        "flat.a": parameter(flat[:4]),
        "flat.b": parameter(flat[4:]),
        "tied.a": parameter(tied),
        "tied.b": parameter(tied.view(2, 2)),
        "buffer": parameter(buffer),
        "array": parameter(array),
    }
    assert offloadable(parameters, [buffer]) == {"own"}
