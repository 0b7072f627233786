"""Fits a step to its memory: by a schedule, and by regions in slices where that is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from autopar.errors import InfeasibleError
from autopar.passes.lower import TracedStep, trace_step
from autopar.passes.pipeline import LowerOptions
from autopar.passes.split_regions import copy_of
from autopar.plan import TimeSplit
from autopar.planner.time_splits import SECONDS, choose_splits, forward_score, training_score
from autopar.schedule.budget import MemoryPlan, StepBudget
from autopar.schedule.program import Program, eager_schedule
from autopar.schedule.streams import step_us
from autopar.units import bytes_text

MOST_RECOMPUTED = 3e-2  # of a step: what fitting may cost before regions are split
_LARGE_RESULT = 0.2  # of the peak


@dataclass(frozen=True)
class FittedStep:
    """A step that fits its memory.

    Args:
        gm: its forward program.
        splits: the regions of it that run in slices.
        whole_results: as of a plan.
    """

    gm: fx.GraphModule
    traced: TracedStep
    memory: MemoryPlan
    splits: tuple[TimeSplit, ...] = ()
    whole_results: tuple[str, ...] = ()

    def compared_with(self, whole: Program) -> FittedStep:
        """The same, with the time of its slices in what it takes longer than a program without."""
        own, other = (step_us(p, eager_schedule(p)) for p in (self.traced.program, whole))
        added = max(0.0, self.memory.added_us + own - other)
        return replace(self, memory=replace(self.memory, added_us=added))


def split_step(
    gm: fx.GraphModule,
    arguments: Sequence[torch.Tensor],
    options: LowerOptions,
    budget: StepBudget,
    seconds: float = SECONDS,
) -> FittedStep | None:
    """Schedule a step with regions of it in slices; None if none lowers its peak, or if its states
    alone are too much.

    Args:
        gm: a rank's forward program; is not changed.
        arguments: tensors that it is called with; only their metadata is used.
        seconds: for the search.

    Raises:
        InfeasibleError: the step does not fit in slices either.
    """
    if budget.is_hopeless:
        return None
    training = any(t.requires_grad for t in arguments)
    score = (training_score if training else forward_score)(arguments, options)
    choice = choose_splits(
        gm, arguments, budget.step_bytes, score, training=training, seconds=seconds
    )
    if choice is None:
        return None
    traced = trace_step(copy_of(choice.program), arguments, options)
    memory = budget.choose(traced.program)
    whole = _whole_results(choice.program, memory.peak_bytes)
    return FittedStep(choice.program, traced, memory, choice.splits, whole)


def _whole_results(gm: fx.GraphModule, peak_bytes: float) -> tuple[str, ...]:
    """Results that are a large part of a peak."""
    outputs: Any = gm.graph.output_node().args[0]
    large = []
    for k, x in enumerate(outputs):
        value = x.meta["val"] if isinstance(x, fx.Node) else None
        if isinstance(value, torch.Tensor) and value.nbytes >= _LARGE_RESULT * peak_bytes:
            size = bytes_text(value.nbytes)
            large.append(f"result {k} of shape {list(value.shape)} ({size})")
    return tuple(large)


def fit_step(
    gm: fx.GraphModule,
    arguments: Sequence[torch.Tensor],
    options: LowerOptions,
    budget: StepBudget,
) -> FittedStep:
    """Schedule a step, with regions of it in slices if nothing else fits, or if that is faster.

    Args:
        gm: a rank's forward program; is not changed.
        arguments: tensors that it is called with; only their metadata is used.

    Raises:
        InfeasibleError: nothing fits.
    """
    traced = trace_step(copy_of(gm), arguments, options)
    whole: FittedStep | None = None
    errors: list[InfeasibleError] = []
    try:
        whole = FittedStep(gm, traced, budget.choose(traced.program))
        if whole.memory.added_us <= MOST_RECOMPUTED * whole.memory.timeline.us:
            return whole
    except InfeasibleError as error:
        errors.append(error)
    try:
        split = split_step(gm, arguments, options, budget)
        if split is not None and (
            whole is None or split.memory.timeline.us < whole.memory.timeline.us
        ):
            return split.compared_with(traced.program)
    except InfeasibleError as error:
        errors.append(error)
    if whole is None:
        raise min(errors, key=lambda error: error.smallest_bytes)
    return whole
