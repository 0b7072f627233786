"""A plan with the time and the memory of its schedule."""

from __future__ import annotations

from dataclasses import replace

from autopar.plan import ShardingPlan
from autopar.plan_records import MemoryEstimate
from autopar.schedule.budget import MemoryPlan, StepBudget
from autopar.schedule.program import Program


def with_schedule(
    plan: ShardingPlan, program: Program, memory: MemoryPlan, budget: StepBudget
) -> ShardingPlan:
    """The plan, whose records are of a step that keeps everything, with those of a schedule.

    Args:
        program: that was scheduled.
        budget: that it was scheduled for.
    """
    time_us = replace(
        plan.time,
        compute_us=plan.time.compute_us + memory.added_us - memory.exposed_us,
        exposed_us=plan.time.exposed_us + memory.exposed_us,
    )
    budget = replace(budget, state_on_host=memory.state_on_host, states_on=memory.states_on)
    return replace(
        plan,
        time=time_us,
        memory=_estimate(plan.forward, program, memory, budget),
        step=memory.summary(budget.resident_bytes),
        states_on=memory.states_on,
    )


def _estimate(
    forward: bool, program: Program, memory: MemoryPlan, budget: StepBudget
) -> MemoryEstimate:
    """What is in use at the peak, by kind."""
    if forward:
        held, rest = budget.frozen_bytes, budget.other_bytes - budget.frozen_bytes
        return MemoryEstimate(held, 0.0, 0.0, 0.0, rest, float(memory.peak_bytes))
    sequence = memory.schedule.forward + memory.schedule.backward
    at = memory.timeline.peak_at
    away = sum(event.evicted_bytes for event in memory.timeline.events[at : at + 1])
    storages = {s for i in sequence[: at + 1] for s in program.ops[i].makes}
    gradients = float(sum(n for s, n in program.gradient_bytes.items() if s in storages))
    sums = budget.sums_bytes
    return MemoryEstimate(
        parameters_bytes=0.0 if budget.states_on else budget.parameters_bytes - away,
        gradients_bytes=gradients + sums,
        optimizer_bytes=0.0 if budget.state_on_host or budget.states_on else budget.optimizer_bytes,
        activations_bytes=memory.peak_bytes + away - gradients,
        buffers_bytes=budget.other_bytes - (budget.frozen_bytes if budget.states_on else 0.0),
        transient_bytes=0.0,
    )
