"""Whether a pipeline schedule computes a step, and can run to its end."""

from __future__ import annotations

from collections import Counter

from autopar.errors import PlanError
from autopar.schedule.pipeline.actions import Action, Kind, PipelineSchedule
from autopar.schedule.pipeline.execution import execution


def check(schedule: PipelineSchedule) -> None:
    """Raises PlanError unless

    * every stage runs one F for every microbatch, and either one B or one I and one W (or, where
      there are forwards alone, none), and
    * no rank waits for ever: what an action waits for (`autopar/schedule/pipeline/execution.py`)
      can run before it.
    """
    counts = Counter(action for actions in schedule.ranks for action in actions)
    for stage in range(schedule.stages):
        for microbatch in range(schedule.microbatches):
            runs = tuple(counts[Action(stage, kind, microbatch)] for kind in Kind)
            if runs not in (((1, 1, 0, 0), (1, 0, 1, 1)) if schedule.trains else ((1, 0, 0, 0),)):
                raise PlanError(_incomplete(schedule, stage, microbatch, runs))
    execution(schedule)


def _incomplete(
    schedule: PipelineSchedule, stage: int, microbatch: int, runs: tuple[int, ...]
) -> str:
    names = [str(Action(stage, kind, microbatch)) for kind in Kind]
    found = ", ".join(f"{n} × {name}" for name, n in zip(names, runs, strict=True) if n)
    forward, full, inputs, weights = names
    return (
        f"pipeline schedule {schedule.name}: rank {schedule.rank_of_stage[stage]} runs"
        f" {found or 'nothing'} for stage {stage} and microbatch {microbatch}; make it one"
        f" {forward} and one {full}, or one {forward}, one {inputs} and one {weights}"
    )
