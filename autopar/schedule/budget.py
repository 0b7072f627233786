"""From a joint graph and a budget to the schedule that runs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from autopar.cluster.link import Link
from autopar.errors import InfeasibleError
from autopar.plan import StepSummary
from autopar.schedule.build import schedule_of
from autopar.schedule.order import in_order
from autopar.schedule.pareto import Front
from autopar.schedule.prefetch import GATHER, exposed_share, prefetched, step_us
from autopar.schedule.program import Program, Resource, Schedule, eager_schedule
from autopar.schedule.simulate import timeline
from autopar.schedule.timeline import Timeline
from autopar.units import bytes_text

log = logging.getLogger(__name__)

_RUNGS = 8  # budgets from keeping everything down to the one asked for
_AHEAD = (1, 2)  # gathers under way for which a schedule leaves room
_LEAST_SHARE = 0.02  # of its time that a gather costs, if it hides


@dataclass(frozen=True)
class MemoryPlan:
    """What a step keeps and computes again.

    Args:
        schedule: what runs, in order.
        timeline: its live bytes, predicted.
        eager_bytes: the peak if everything were kept.
        added_flops, step_flops: computed again, and of the step without that.
        added_us: how much longer the step is predicted to take than with everything kept, by what
            runs again and what compute waits for.
        exposed_us: of that, by waiting for collectives.
        state_on_host: the optimizer's state is on the host but for its step.
        parameters_on_host: names of those that are there for a part of the step.
    """

    schedule: Schedule
    timeline: Timeline
    eager_bytes: int
    added_flops: float
    step_flops: float
    added_us: float
    exposed_us: float = 0.0
    state_on_host: bool = False
    parameters_on_host: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        return self.timeline.peak_bytes

    def summary(self, resident_bytes: float) -> StepSummary:
        """In short.

        Args:
            resident_bytes: what is there before the step.
        """
        found = self.timeline
        events = found.events
        at = events[found.peak_at] if events else None
        return StepSummary(
            us=found.us,
            backward_us=events[found.forward].issued_us if found.forward < len(events) else 0.0,
            added_us=self.added_us,
            waited_us={str(resource): us for resource, us in found.waited_us},
            peak_bytes=found.peak_bytes,
            eager_bytes=self.eager_bytes,
            peak_at="" if at is None else at.name + (f" of {at.module}" if at.module else ""),
            resident_bytes=resident_bytes,
            state_on_host=self.state_on_host,
            parameters_on_host=self.parameters_on_host,
            live=tuple(
                (round(m.issued_us, 2), m.kept_bytes, m.again_bytes, m.other_bytes, m.away_bytes)
                for m in events
            ),
            modules=found.by_module(),
        )

    def __str__(self) -> str:
        share = 100 * self.added_flops / max(1.0, self.step_flops)
        state = ", the optimizer's state on the host" if self.state_on_host else ""
        if self.parameters_on_host:
            state += f", parameters on the host meanwhile: {', '.join(self.parameters_on_host)}"
        return (
            f"peak {bytes_text(self.peak_bytes)} (everything kept: "
            f"{bytes_text(self.eager_bytes)}), {share:.1f}% more FLOPs{state}"
        )


@dataclass(frozen=True)
class StepBudget:
    """A device's memory, and what the step cannot decide about. Bytes.

    Args:
        memory_bytes: of the device, for this model.
        parameters_bytes, gradients_bytes, optimizer_bytes: of the parameters.
        other_bytes: inputs, buffers and constants, and copies of buffers that the step updates.
        host: the link to the host, if there is one.
        state_on_host: the optimizer's state is there while the model runs.
    """

    memory_bytes: float
    parameters_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    other_bytes: float
    host: Link | None = None
    state_on_host: bool = False

    @staticmethod
    def of(
        arguments: Sequence[torch.Tensor],
        memory_bytes: float,
        optimizer_state: float,
        copied_bytes: float = 0.0,
        host: Link | None = None,
    ) -> StepBudget:
        """Of the program that takes these arguments.

        Args:
            optimizer_state: bytes per byte of a trainable parameter.
            copied_bytes: of arguments that are copied for the step.
        """
        trained = sum(t.nbytes for t in arguments if t.requires_grad)
        other = sum(t.nbytes for t in arguments if not t.requires_grad) + copied_bytes
        return StepBudget(memory_bytes, trained, trained, optimizer_state * trained, other, host)

    @property
    def resident_bytes(self) -> float:
        """What is there while the model runs."""
        state = 0.0 if self.state_on_host else self.optimizer_bytes
        return self.parameters_bytes + state + self.other_bytes

    @property
    def step_bytes(self) -> float:
        """What is left for all that the step makes, gradients of parameters included."""
        return self.memory_bytes - self.resident_bytes

    def choose(self, program: Program) -> MemoryPlan:
        """The schedule that runs, with the optimizer's state here or on the host, whichever costs
        less.

        Raises:
            InfeasibleError: no schedule fits the memory; it names the smallest that does.
        """
        away = self._away(program)
        try:
            here = self._plan(program)
        except InfeasibleError:
            if away is None:
                raise
            return away._plan(program)
        if away is None or here.added_us <= away._round_trip_us:
            return here
        return min(here, away._plan(program), key=lambda plan: plan.added_us)

    def _away(self, program: Program) -> StepBudget | None:
        """With the optimizer's state on the host; None where it cannot be."""
        step = self.resident_bytes + self.gradients_bytes
        fits = step <= self.memory_bytes and self.optimizer_bytes <= program.host_bytes
        if self.host is None or not self.optimizer_bytes or not fits:
            return None
        return replace(self, state_on_host=True)

    @property
    def _round_trip_us(self) -> float:
        """Of the optimizer's state, before and after its step, when nothing else runs."""
        if self.host is None or not self.state_on_host:
            return 0.0
        return 2e6 * (self.host.alpha + self.host.beta * self.optimizer_bytes)

    def _plan(self, program: Program) -> MemoryPlan:
        if self.state_on_host:
            program = replace(program, host_bytes=program.host_bytes - self.optimizer_bytes)
        try:
            plan = plan_memory(program, self.step_bytes)
        except InfeasibleError as error:
            smallest = self.resident_bytes + error.smallest_bytes
            raise InfeasibleError(
                f"{error}. Of {bytes_text(self.memory_bytes)}, parameters take "
                f"{bytes_text(self.parameters_bytes)}, the optimizer "
                f"{bytes_text(0 if self.state_on_host else self.optimizer_bytes)}, inputs and "
                f"buffers {bytes_text(self.other_bytes)}, and gradients of parameters come to "
                f"{bytes_text(self.gradients_bytes)} as backward proceeds. Give at "
                f"least {bytes_text(smallest)} ({smallest:.0f} bytes), more devices, or a "
                "smaller batch",
                budget_bytes=self.memory_bytes,
                smallest_bytes=smallest,
            ) from error
        added = plan.added_us + self._round_trip_us
        return replace(plan, state_on_host=self.state_on_host, added_us=added)


def describe(program: Program, schedule: Schedule) -> MemoryPlan:
    """A schedule with its figures."""
    kept = eager_schedule(program)
    found, eager = timeline(program, schedule), timeline(program, kept)
    free = timeline(program, prefetched(program, kept, math.inf))
    communication = Resource.COMMUNICATION
    return MemoryPlan(
        schedule,
        found,
        eager.peak_bytes,
        schedule.added(program),
        program.flops(range(len(program.ops))),
        max(0.0, found.us - free.us),
        max(0.0, found.exposed_us(communication) - free.exposed_us(communication)),
        parameters_on_host=tuple(
            parameter.name
            for s, parameter in program.parameters.items()
            if s in schedule.moved(program)
        ),
    )


def plan_memory(
    program: Program, budget_bytes: float, *, cost: Mapping[int, float] | None = None
) -> MemoryPlan:
    """The cheapest schedule found whose peak is within the budget, with its collectives split where
    that hides them (`prefetch.py`). So also schedules for somewhat less memory are looked at, which
    leave room for gathers under way.

    Args:
        budget_bytes: for all that the step makes.
        cost: of running each operator again; if None its predicted time, of a gather what does not
            hide.

    Raises:
        InfeasibleError: no schedule was found; it names the smallest budget with one.
    """
    program = in_order(program)
    eager = eager_schedule(program)
    whole = timeline(program, eager)
    if whole.peak_bytes <= budget_bytes:
        return describe(program, prefetched(program, eager, budget_bytes))
    front = Front(program, cost or _costs(program))
    step = (max(1.0, budget_bytes) / whole.peak_bytes) ** (1 / _RUNGS)
    ladder = [whole.peak_bytes * step**k for k in range(1, _RUNGS)]
    budgets = [*ladder, budget_bytes, *_with_room(program, budget_bytes)]
    points = [point for point in front.solve(budgets)[len(ladder) :] if point is not None]
    if not points:
        smallest = front.smallest()
        if smallest.peak_bytes > budget_bytes:
            raise _infeasible(program, smallest.schedule, budget_bytes)
        points = [front.grown(smallest, budget_bytes)]
    schedules = [prefetched(program, point.schedule, budget_bytes) for point in points]
    best = min(schedules, key=lambda schedule: step_us(program, schedule))
    plan = describe(program, best)
    log.info("memory: %s", plan)
    return plan


def _costs(program: Program) -> dict[int, float]:
    """Of running operators again: their time, and of gathers the part of it that does not hide, if
    all are run again."""
    times = {i: op.us for i, op in enumerate(program.ops)}
    gathers = {
        i
        for i in set(program.forward) & program.splits.keys()
        if program.ops[i].kind.startswith(GATHER)
    }
    if not gathers:
        return times
    kept = {s for s in program.needed if program.maker[s] not in gathers}
    share = exposed_share(program, eager_schedule(program), schedule_of(program, kept))
    return times | {i: max(share, _LEAST_SHARE) * times[i] for i in gathers}


def _with_room(program: Program, budget_bytes: float) -> list[float]:
    """The budget but for the largest buffers of gathers."""
    largest = max(
        (
            sum(program.nbytes[s] for s in program.ops[split.start].makes)
            for i, split in program.splits.items()
            if program.ops[i].kind.startswith(GATHER)
        ),
        default=0,
    )
    rooms = (budget_bytes - count * largest for count in _AHEAD)
    return [room for room in rooms if largest and room > 0]


def _infeasible(program: Program, smallest: Schedule, budget_bytes: float) -> InfeasibleError:
    found = timeline(program, smallest)
    op = program.ops[(smallest.forward + smallest.backward)[found.peak_at]]
    read = sum(program.nbytes[s] for s in op.reads)
    made = sum(program.nbytes[s] for s in op.makes)
    where = f" of {op.module}" if op.module else ""
    return InfeasibleError(
        f"the step needs {bytes_text(found.peak_bytes)} for what it makes, and there is "
        f"{bytes_text(max(0.0, budget_bytes))}. That is the smallest found, whatever is computed "
        f"again; it is reached at {op.name}{where}, which alone reads {bytes_text(read)} and "
        f"makes {bytes_text(made)}",
        budget_bytes=budget_bytes,
        smallest_bytes=found.peak_bytes,
    )
