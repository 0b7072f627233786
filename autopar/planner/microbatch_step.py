"""The plan of a step in microbatches without a pipeline: that of one, beside what all hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from autopar.errors import ConflictError, InfeasibleError
from autopar.plan import ShardingPlan
from autopar.plan_records import TimeEstimate
from autopar.planner.batch_bytes import BatchBytes
from autopar.planner.estimate import estimate_time, optimizer_us
from autopar.planner.joint import JointPlan
from autopar.planner.planner import Planned, PlanningProblem
from autopar.planner.space import SearchSpace
from autopar.units import budget_text, bytes_text

STATES_STAY = (
    "States of microbatches and of stages stay on the device; a tier takes those of steps without "
    "microbatches=, where gradients of several backwards add up on the host"
)

# Of fitting the results of all microbatches, whose bytes depend on the plan.
_ROUNDS = 3


def plan_microbatch(
    problem: PlanningProblem, samples: int, decide: Callable[[PlanningProblem], JointPlan]
) -> JointPlan:
    """The plan of a microbatch that leaves room for the results of all, with the time of all.

    Args:
        problem: of one of so many microbatches as its workload says.
        samples: of the batch.
        decide: the plan of a microbatch within a budget.

    Raises:
        InfeasibleError: there is none.
    """
    count, budget = problem.space.workload.microbatches, problem.budget_bytes
    results, needed = 0.0, 0.0
    for _ in range(_ROUNDS):
        try:
            joint = decide(replace(problem, budget_bytes=budget - results))
        except ConflictError:
            raise
        except InfeasibleError as error:
            if count == 1:
                raise
            if not results:  # of any plan, to name a budget that they are in
                results = _results_bytes(problem.planned(problem.decide(math.inf)), count)
            raise _refusal(problem, error, results) from error
        memory = joint.planned.plan.memory
        if count > 1:
            memory = BatchBytes.of(joint.planned).with_results(memory, count)
        if memory.total_bytes <= budget:
            plan = replace(joint.planned.plan, memory=memory, budget_bytes=budget)
            plan = _of_all(plan, joint.planned, samples, count)
            return replace(joint, planned=replace(joint.planned, plan=plan))
        results = memory.total_bytes - joint.planned.plan.memory.total_bytes
        needed = memory.total_bytes
    raise InfeasibleError(
        f"{count} microbatches need {bytes_text(needed)} with their results and the gradients of "
        f"these ({bytes_text(results)}), and there is {bytes_text(budget)}",
        budget_bytes=budget, smallest_bytes=needed,
    )  # fmt: skip


def _results_bytes(planned: Planned, count: int) -> float:
    """Of the results of all microbatches, and of the gradients of these."""
    memory = planned.plan.memory
    return BatchBytes.of(planned).with_results(memory, count).total_bytes - memory.total_bytes


def _refusal(
    problem: PlanningProblem, error: InfeasibleError, results: float
) -> InfeasibleError:  # fmt: skip
    """The error of one microbatch, beside the results of all."""
    message, smallest = str(error).rstrip("."), error.smallest_bytes + results
    if results:
        message += (
            f". With the results of all {problem.space.workload.microbatches} microbatches and the "
            f"gradients of these, {bytes_text(results)}, it takes at least {budget_text(smallest)}"
        )
    if problem.space.cluster.off_device_tiers:
        message += f". {STATES_STAY}"
    return InfeasibleError(message, budget_bytes=problem.budget_bytes, smallest_bytes=smallest)


def once_per_step_us(space: SearchSpace, choices: Sequence[int]) -> float:
    """The time of what a step does once, however many microbatches it has."""
    return optimizer_us(space, choices) + _waiting_us(estimate_time(space, choices))


def _waiting_us(time: TimeEstimate) -> float:
    """For what moves weights."""
    return time.weights_us - time.overlapped_us


def _of_all(plan: ShardingPlan, planned: Planned, samples: int, count: int) -> ShardingPlan:
    """The plan of one microbatch, with the work and the time of so many."""
    step_us = optimizer_us(planned.space, planned.choices)
    time = plan.time
    waiting = _waiting_us(time)
    times = TimeEstimate(
        (time.compute_us - step_us) * count + step_us,
        (time.exposed_us - waiting) * count + waiting,
        time.overlapped_us,
        time.weights_us,
    )
    work = None if plan.work is None else plan.work.of_samples(samples)
    return replace(plan, time=times, microbatches=count, work=work)
