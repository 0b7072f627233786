"""The stages of a plan's pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from autopar.errors import PlanError
from autopar.plan import PipelinePlan
from autopar.planner.planner import Planned
from autopar.schedule.pipeline.actions import PipelineSchedule
from autopar.schedule.pipeline.schedules import SCHEDULES, make_schedule


def schedule_of(plan: PipelinePlan) -> PipelineSchedule:
    """The order of actions on every rank."""
    if any(c.isspace() for c in plan.schedule):
        return PipelineSchedule.parse(plan.schedule)
    stages = len(plan.firsts) + 1
    return make_schedule(plan.schedule, plan.ranks, plan.microbatches, stages // plan.ranks)


def plan_stages(
    planned: Planned,
    axis: int,
    ranks: int,
    microbatches: int,
    *,
    schedule: str | None = None,
    stages: str | None = None,
) -> PipelinePlan:
    """Cut a planned microbatch into stages of about equal time.

    Args:
        axis: of the mesh, of the pipeline's ranks.
        schedule: its name; 1f1b if None.
        stages: names of the operators at which stages begin.
    """
    name = schedule or "1f1b"
    if name not in SCHEDULES:
        raise PlanError(f"unknown schedule {name!r}; it is one of {', '.join(SCHEDULES)}")
    count = ranks * SCHEDULES[name].stages_per_rank
    decisions = {
        d.node: (d, c)
        for d, c in zip(planned.space.decisions, planned.choices, strict=True)
        if d.kind == "op"
    }
    nodes = list(planned.graph.compute_nodes())
    times = [float(decisions[n][0].time_us[decisions[n][1]]) for n in nodes]
    if stages is not None:
        firsts = tuple(stages.split(","))
    else:
        firsts = tuple(nodes[k].name for k in _even(times, count))
    return PipelinePlan(axis, ranks, firsts, " | ".join(firsts), name, microbatches)


def _even(times: Sequence[float], count: int) -> list[int]:
    """Where to cut for parts of about equal sums."""
    if len(times) < count:
        raise PlanError(f"{count} stages of {len(times)} operators; use fewer")
    total = sum(times)
    firsts: list[int] = []
    for k, before in enumerate([0.0, *accumulate(times)][:-1]):
        if k and len(firsts) < count - 1 and before >= total * (len(firsts) + 1) / count:
            firsts.append(k)
    while len(firsts) < count - 1:
        firsts = sorted(
            {*firsts, next(k for k in reversed(range(1, len(times))) if k not in firsts)}
        )
    return firsts
