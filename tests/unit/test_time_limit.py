"""The limit of planning time: searches end with what they have, and all see the same end."""

import math
import time
from dataclasses import replace

import pytest
import torch

from autopar import ClusterInfo
from autopar.cluster.device import device as device_of
from autopar.compile import plan_to_fit
from autopar.planner import fitted_step
from autopar.planner.planner import build_problem
from autopar.progress import Deadline
from autopar.schedule import budget as budgets
from autopar.schedule.budget import plan_memory
from autopar.schedule.chained import ChainSchedules
from autopar.schedule.options import StageModel
from autopar.schedule.pareto import ScheduleFront
from autopar.schedule.simulate import check
from tests.memory import step_of
from tests.planning import Classifier

BATCH = {"x": torch.zeros(512, 64), "y": torch.zeros(512, dtype=torch.long)}


def test_without_time_checkpointing_is_the_schedule(monkeypatch):
    program = step_of("gpt2").program
    common = ScheduleFront(program).checkpointed()

    def solve(*args, **options):
        raise AssertionError("no integer program may be solved")

    monkeypatch.setattr(StageModel, "solve", solve)
    plan = plan_memory(program, common.peak_bytes, until=0.0)
    check(program, plan.schedule)
    assert plan.peak_bytes <= common.peak_bytes


def test_a_chain_without_time_gives_up(monkeypatch):
    front = ScheduleFront(step_of("gpt2").program)
    with pytest.raises(TimeoutError):
        ChainSchedules(
            front.program, front._stages, front._common, front.cost, front.eager_bytes, until=0.0
        )


def test_more_time_is_never_worse():
    program = step_of("gpt2").program
    budget = 1.05 * ScheduleFront(program).checkpointed().peak_bytes
    at_once, later = (plan_memory(program, budget, until=until) for until in (0.0, math.inf))
    assert later.added_us <= at_once.added_us


def test_a_shorter_deadline_is_of_the_same_limit():
    deadline = Deadline(60.0)
    earlier = deadline.without(12.0)
    assert earlier.end == deadline.end - 12.0 and earlier.seconds == 60.0
    assert deadline.without(100.0).over and not deadline.over


def test_the_limit_begins_with_the_capture():
    deadline = Deadline(0.0)
    cluster = ClusterInfo.of("2", "H100")
    problem = build_problem(Classifier(64), (), BATCH, cluster=cluster, deadline=deadline)
    assert problem.deadline is deadline
    before = time.process_time()
    problem = build_problem(Classifier(64), (), BATCH, cluster=cluster, time_limit=60.0)
    assert problem.deadline.end - before < 60.1  # not when the space is there
    assert problem.deadline.left < 60.0


def test_every_schedule_and_search_for_slices_sees_the_limit(monkeypatch):
    deadline, ends = Deadline(60.0), []
    model, cluster = Classifier(64), ClusterInfo.of("1", "H100")
    needed = plan_to_fit(model, (), BATCH, cluster=cluster).planned.plan.memory.total_bytes
    small = replace(device_of("H100"), memory_bytes=0.75 * needed)

    def memory(program, budget_bytes, patience=math.inf, until=math.inf):
        ends.append(until)
        return plan_memory(program, budget_bytes, patience, until)

    chosen = fitted_step.choose_splits

    def splits(*args, seconds, **options):
        ends.append(time.process_time() + seconds)
        return chosen(*args, seconds=seconds, **options)

    monkeypatch.setattr(budgets, "plan_memory", memory)
    monkeypatch.setattr(fitted_step, "choose_splits", splits)
    joint = plan_to_fit(model, (), BATCH, cluster=ClusterInfo.of("1", small), deadline=deadline)
    assert joint.planned.plan.memory.total_bytes <= 0.75 * needed
    assert ends and max(ends) <= deadline.end
