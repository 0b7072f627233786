"""Fits a step to its memory: by a schedule, and by regions in slices where that is better."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from autopar.errors import InfeasibleError, PlanError
from autopar.passes.local_step import UntracedStep
from autopar.passes.lower import TracedStep
from autopar.passes.pipeline import LowerOptions
from autopar.plan_records import TimeSplit
from autopar.planner.time_splits import (
    SECONDS,
    Choice,
    Score,
    choose_splits,
    forward_score,
    training_score,
    with_candidates,
)
from autopar.schedule.budget import MemoryPlan, StepBudget
from autopar.schedule.pareto import has_many_operators
from autopar.schedule.program import Program, eager_schedule
from autopar.schedule.streams import step_us
from autopar.units import bytes_text

log = logging.getLogger(__name__)

_MOST_RECOMPUTED = 3e-2  # of a step: what fitting may cost before regions are split
# of the budget: where a step fits, but recomputes much, slices bring its least peak down to that
_ROOMY = 0.5
_LARGE_RESULT = 0.2  # of the peak
_UNTIL_IT_FITS = 3.0  # times the seconds of a search, as the step is refused otherwise
# Seconds at least, and times those of its schedule, for slices that make a step faster that fits.
_FASTER_S, _FASTER = 5.0, 1.0
# Of the time that there is: for a schedule without slices; of the rest, for the search for them.
_SCHEDULE_SHARE, _SEARCH_SHARE = 0.6, 0.6
_LEAST_S = 1.0  # for a schedule, also if time is over: some plan is better than none
_HOPELESS_S = 2.0  # for the smallest budget, where slices cannot make a forward fit


@dataclass(frozen=True)
class FittedStep:
    """A step that fits its memory.

    Args:
        gm: its forward program.
        program: its operators.
        traced: None if a part of the program was traced.
        splits: the regions of it that run in slices.
        whole_results: as of a plan.
    """

    gm: fx.GraphModule
    program: Program
    traced: TracedStep | None
    memory: MemoryPlan
    splits: tuple[TimeSplit, ...] = ()
    whole_results: tuple[str, ...] = ()

    def compared_with(self, whole: Program) -> FittedStep:
        """The same, with the time of its slices in what it takes longer than a program without."""
        own, other = (step_us(p, eager_schedule(p)) for p in (self.program, whole))
        added = max(0.0, self.memory.added_us + own - other)
        return replace(self, memory=replace(self.memory, added_us=added))


def split_step(
    step: UntracedStep,
    budget: StepBudget,
    seconds: float = SECONDS,
    all_blocks: Callable[[], UntracedStep] | None = None,
    whole: MemoryPlan | None = None,
    spent: float = 0.0,
    until: float = math.inf,
) -> FittedStep | None:
    """Schedule a step with regions of it in slices: until it fits, and further if it recomputes
    much. None if no region lowers its peak, or if the states of training alone are too much.

    Args:
        step: of a rank, with all of its blocks or a few; is not changed.
        seconds: of processor time for the search; three times as many if nothing fits before, and
            few if what a forward holds alone is too much.
        all_blocks: the same with all of them, if it lacks some.
        whole: its schedule without slices, if it fits.
        spent: seconds on that schedule; if there is one, the search takes about as long at most.
        until: the processor time at which all ends, the schedule after the search included.

    Raises:
        InfeasibleError: the step does not fit in slices either.
    """
    now = time.process_time()
    most = _SEARCH_SHARE * max(0.0, until - now)
    if budget.is_hopeless:
        if _trains(step):
            return None
        most = min(most, _HOPELESS_S)  # to say what a forward would take
    if whole is None:
        share, longest = 1.0, min(_UNTIL_IT_FITS * seconds, most)
    else:
        seconds = min(seconds, max(_FASTER_S, _FASTER * spent))
        share, longest = _ROOMY, min(seconds, most)
    deadline, last = now + min(seconds, most), now + longest
    best = _split_to(step, budget, share, last, all_blocks, until)
    if best is None or whole is not None or recomputes_little(best.memory):
        return best
    if time.process_time() > deadline:
        return best
    try:
        split = _split_to(step, budget, _ROOMY, deadline, all_blocks, until)
    except InfeasibleError:
        return best
    better = split is not None and split.memory.timeline.us < best.memory.timeline.us
    return split if better else best


def fit_program(
    program: Program,
    budget: StepBudget,
    in_slices: Callable[[MemoryPlan | None, float], FittedStep | None],
    patience: float = math.inf,
    until: float = math.inf,
) -> tuple[MemoryPlan, FittedStep | None]:
    """The schedule of a program, or the program with regions in slices if it does not fit without
    them, or is faster with them.

    Args:
        in_slices: the latter, for the schedule without slices, if there is one, and the seconds
            that it took.
        patience: as of `StepBudget.choose`, unless slices do not make it fit either.
        until: the processor time at which schedules end with what they have.

    Raises:
        InfeasibleError: nothing fits; it names the smallest budget that does.
    """
    start = time.process_time()
    whole: MemoryPlan | None = None
    errors: list[InfeasibleError] = []
    try:
        first = start + _SCHEDULE_SHARE * (until - start)
        whole = budget.choose(program, patience, _with_least(first))
        if recomputes_little(whole):
            return whole, None
    except InfeasibleError as error:
        errors.append(error)
    try:
        split = in_slices(whole, time.process_time() - start)
        if split is not None and (whole is None or split.memory.timeline.us < whole.timeline.us):
            split = split.compared_with(program)
            return split.memory, split
    except InfeasibleError as error:
        errors.append(error)
    if whole is None and math.isfinite(patience) and has_many_operators(program):
        whole = budget.choose(program, until=_with_least(until))
    if whole is None:
        raise min(errors, key=lambda error: error.smallest_bytes)
    return whole, None


def _with_least(until: float) -> float:
    """A processor time that leaves the least time for a schedule."""
    return max(until, time.process_time() + _LEAST_S)


def recomputes_little(memory: MemoryPlan) -> bool:
    """Whether fitting costs too little to look for slices, which shorten no optimizer's step."""
    step_us = 0.0 if memory.host_step is None else memory.host_step.exposed_us
    return memory.added_us - step_us <= _MOST_RECOMPUTED * memory.timeline.us


def _split_to(
    step: UntracedStep, budget: StepBudget, share: float, deadline: float,
    all_blocks: Callable[[], UntracedStep] | None, until: float,
) -> FittedStep | None:  # fmt: skip
    """The same with its least peak at a share of the budget; what is left keeps more values."""
    target = share * budget.step_bytes
    try:
        choice = _choice(step, target, deadline)
    except PlanError:
        if all_blocks is None:
            raise
        step, all_blocks = all_blocks(), None
        choice = _choice(step, target, deadline)
    if choice is None:
        return None
    traced, program = choice.after.traced, choice.after.program
    assert program is not None, "it was scored"
    memory = budget.choose(program, until=_with_least(until))
    if all_blocks is None:
        gm, splits = choice.program, choice.splits
    else:
        gm, splits = with_candidates(all_blocks(), choice.candidates)
        traced = None
    results = _whole_results(gm, memory.peak_bytes)
    return FittedStep(gm, program, traced, memory, splits, results)


def _trains(step: UntracedStep) -> bool:
    return any(t.requires_grad for t in step.arguments)


def _choice(step: UntracedStep, budget_bytes: float, deadline: float) -> Choice | None:
    training = _trains(step)

    def scored(traced: TracedStep) -> Score:
        if training:
            return training_score(step, traced, budget_bytes, deadline)
        return forward_score(step, traced)

    seconds = max(0.0, deadline - time.process_time())
    return choose_splits(step, budget_bytes, scored, training=training, seconds=seconds)


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
    seconds: float = math.inf,
) -> FittedStep:
    """Schedule a step, with regions of it in slices if nothing else fits, or if that is faster; and
    with its states on a tier, if it does not fit the device with them.

    Args:
        gm: a rank's forward program; is not changed.
        arguments: tensors that it is called with; only their metadata is used.
        seconds: of processor time, after which searches end with what they have.

    Raises:
        InfeasibleError: nothing fits.
    """
    until = time.process_time() + seconds
    off_device = budget.off_device() if budget.is_too_small_for_states else None
    if off_device is None:
        try:
            return _fit(gm, arguments, options, budget, until)
        except InfeasibleError as error:
            off_device = budget.off_device()
            if off_device is None:
                raise
            log.info("states move off the device: %s", error)
    options = replace(options, states_on=off_device.states_on)
    return _fit(gm, arguments, options, off_device, until)


def _fit(
    gm: fx.GraphModule,
    arguments: Sequence[torch.Tensor],
    options: LowerOptions,
    budget: StepBudget,
    until: float,
) -> FittedStep:
    """The same, with the states where the budget has them."""
    step = UntracedStep(gm, tuple(arguments), options)

    def in_slices(whole: MemoryPlan | None, spent: float) -> FittedStep | None:
        return split_step(step, budget, whole=whole, spent=spent, until=until)

    memory, split = fit_program(step.as_is.program, budget, in_slices, until=until)
    return split or FittedStep(gm, step.as_is.program, step.as_is, memory)
