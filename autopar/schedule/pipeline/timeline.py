"""When the actions of a pipeline schedule run, given what each stage costs, and what is in memory.

A rank runs one action at a time, in its order, as soon as what the action waits for is there.
Beside compute run

* transfers between stages on different ranks. From one rank to another, one result is sent at a
  time, in the order in which they are made. The other direction and other ranks have links of
  their own.
* parameter gathers: those of a rank's stages, one at a time from the beginning of the step, in the
  order in which the stages first run.
* gradient reductions: one at a time per rank, each after the last action of its stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

from autopar.errors import PlanError
from autopar.schedule.pipeline.actions import Action, Kind, PipelineSchedule
from autopar.schedule.pipeline.execution import Execution, execution


@dataclass(frozen=True)
class StageCost:
    """What a stage takes, for one microbatch where not said otherwise.

    Args:
        forward_us, input_us, weight_us: of F, I and W; B takes I and W.
        send_forward_us, send_backward_us: of sending its results to the next stage, and gradients
            of its inputs to the previous one, with latency. Not used if that stage is on its rank.
        state_bytes: parameters, gradients and optimizer state; all the time.
        held_bytes: activations, from the beginning of F until the end of B or I.
        recomputed_bytes: activations that the backward computes again: held beside those from the
            beginning until the end of B or I.
        weight_bytes: of both, what W needs: held until its end.
        before_us: of parameter gathers before the stage's first action, once a step.
        after_us: of gradient reductions after its last, once a step.
    """

    forward_us: float
    input_us: float = 0.0
    weight_us: float = 0.0
    send_forward_us: float = 0.0
    send_backward_us: float = 0.0
    state_bytes: float = 0.0
    held_bytes: float = 0.0
    recomputed_bytes: float = 0.0
    weight_bytes: float = 0.0
    before_us: float = 0.0
    after_us: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf"):
                raise PlanError(
                    f"cost of a pipeline stage: {field.name} is {value}; 0 is the least"
                )
        if self.weight_bytes > self.held_bytes + self.recomputed_bytes:
            more = f" and {self.recomputed_bytes:.0f} recomputed" if self.recomputed_bytes else ""
            raise PlanError(
                f"cost of a pipeline stage: W needs {self.weight_bytes:.0f} bytes of the"
                f" {self.held_bytes:.0f} that are held from F on{more}; raise held_bytes"
            )

    @property
    def backward_us(self) -> float:
        return self.input_us + self.weight_us


class Span(NamedTuple):
    """An action as it runs."""

    action: Action
    start_us: float
    end_us: float


@dataclass(frozen=True)
class Timeline:
    """A simulated step.

    Args:
        spans: by rank, its actions in order.
        step_us: until every rank has run and reduced everything.
        peak_bytes: by rank, `peak_bytes` of the schedule.
    """

    spans: tuple[tuple[Span, ...], ...]
    step_us: float
    peak_bytes: tuple[float, ...]

    @cached_property
    def busy_us(self) -> tuple[float, ...]:
        """By rank, the time in which it computes."""
        return tuple(sum(end - start for _, start, end in spans) for spans in self.spans)

    @property
    def bubble_fraction(self) -> float:
        """Idle time of all ranks, of their whole time."""
        whole_us = len(self.spans) * self.step_us
        return 1 - sum(self.busy_us) / whole_us if whole_us else 0.0

    @property
    def bubble_over_compute(self) -> float:
        """(step - ideal) / ideal, as GPipe, Megatron and Zero Bubble state bubbles. The ideal step
        takes what the busiest rank computes, so unequal ranks are no bubble."""
        ideal_us = max(self.busy_us)
        return self.step_us / ideal_us - 1 if ideal_us else 0.0

    @property
    def longest_span_us(self) -> float:
        """From the first to the last action of a rank, at most. It is the cost of a step in Zero
        Bubble (arXiv:2401.10241), where a rank begins the next step while others end this one."""
        return max(spans[-1].end_us - spans[0].start_us for spans in self.spans)

    @property
    def bubble_rate(self) -> float:
        """1 - ideal / `longest_span_us`: the bubble rate of Zero Bubble. 0 means that no rank is
        idle between its first and its last action; the step is still longer than the ideal, by
        the time until the last rank has something to do."""
        span_us = self.longest_span_us
        return 1 - max(self.busy_us) / span_us if span_us else 0.0


def simulate(schedule: PipelineSchedule, costs: Sequence[StageCost]) -> Timeline:
    """The step, action by action.

    Args:
        costs: by stage.
    """
    step = execution(schedule)
    ends, step_us = _run(schedule, step, costs)
    durations = _durations(costs)
    spans: list[list[Span]] = [[] for _ in schedule.ranks]
    for action, rank, duration, end in zip(
        step.actions, step.ranks, step.durations, ends, strict=True
    ):
        spans[rank].append(Span(action, end - durations[duration], end))
    return Timeline(tuple(map(tuple, spans)), step_us, peak_bytes(schedule, costs))


def step_time_us(schedule: PipelineSchedule, costs: Sequence[StageCost]) -> float:
    """`simulate(schedule, costs).step_us`, in a fraction of its time."""
    return _run(schedule, execution(schedule), costs)[1]


def peak_bytes(schedule: PipelineSchedule, costs: Sequence[StageCost]) -> tuple[float, ...]:
    """By rank, the most that it holds at once. It follows from the order of its actions alone.

    Received results that wait for their action are not counted.
    """
    _check_costs(schedule, costs)
    held = [cost.held_bytes for cost in costs]
    changes = {
        Kind.FORWARD: held,
        Kind.BACKWARD: [-nbytes for nbytes in held],
        Kind.INPUT: [cost.weight_bytes - cost.held_bytes for cost in costs],
        Kind.WEIGHT: [-cost.weight_bytes for cost in costs],
    }
    peaks = []
    for actions, stages in zip(schedule.ranks, schedule.stages_of_rank, strict=True):
        live = peak = sum(costs[stage].state_bytes for stage in stages)
        for stage, kind, _ in actions:
            if kind is Kind.BACKWARD or kind is Kind.INPUT:
                peak = max(peak, live + costs[stage].recomputed_bytes)
            live += changes[kind][stage]
            if live > peak:
                peak = live
            if kind is Kind.FORWARD and not schedule.trains:
                live -= held[stage]
        peaks.append(peak)
    return tuple(peaks)


def _check_costs(schedule: PipelineSchedule, costs: Sequence[StageCost]) -> None:
    if len(costs) != schedule.stages:
        raise PlanError(
            f"pipeline schedule {schedule.name} has {schedule.stages} stages, but there are costs"
            f" of {len(costs)}; give one StageCost per stage"
        )


def _durations(costs: Sequence[StageCost]) -> list[float]:
    """By the numbers of `Execution.durations`."""
    return [
        us
        for cost in costs
        for us in (cost.forward_us, cost.backward_us, cost.input_us, cost.weight_us)
    ]


def _run(
    schedule: PipelineSchedule, step: Execution, costs: Sequence[StageCost]
) -> tuple[list[float], float]:
    """When each action ends, and the step."""
    _check_costs(schedule, costs)
    durations = _durations(costs)
    sends = [
        us
        for cost in costs
        for us in (cost.send_forward_us, cost.send_backward_us, cost.send_backward_us, 0.0)
    ]
    ranks = len(schedule.ranks)
    free = [0.0] * ranks
    link_free = [0.0] * step.link_count
    gathered = _gathered(step, costs, ranks)
    ends: list[float] = []
    arrivals: list[float] = []
    for at, (rank, duration, wait, link) in enumerate(
        zip(step.ranks, step.durations, step.waits_for, step.links, strict=True)
    ):
        start = free[rank]
        if wait >= 0 and arrivals[wait] > start:
            start = arrivals[wait]
        if at in gathered and gathered[at] > start:
            start = gathered[at]
        free[rank] = arrival = end = start + durations[duration]
        ends.append(end)
        if link >= 0:
            if link_free[link] > arrival:
                arrival = link_free[link]
            link_free[link] = arrival = arrival + sends[duration]
        arrivals.append(arrival)
    reduced = [0.0] * ranks
    for end, stage in sorted((ends[at], stage) for stage, at in enumerate(step.last)):
        rank = schedule.rank_of_stage[stage]
        reduced[rank] = max(reduced[rank], end) + costs[stage].after_us
    return ends, max(*free, *reduced)


def _gathered(step: Execution, costs: Sequence[StageCost], ranks: int) -> dict[int, float]:
    """By the position of a stage's first action, when its parameters are there, if it gathers."""
    times: dict[int, float] = {}
    busy = [0.0] * ranks
    for at, stage in sorted((at, stage) for stage, at in enumerate(step.first)):
        if costs[stage].before_us:
            busy[step.ranks[at]] += costs[stage].before_us
            times[at] = busy[step.ranks[at]]
    return times
