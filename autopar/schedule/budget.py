"""From a program and a memory budget to the schedule that runs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from autopar.cluster.link import Link
from autopar.cluster.tiers import NVME, StateBytes, Tier
from autopar.errors import InfeasibleError
from autopar.plan_records import HostStep, StepSummary
from autopar.schedule.build import schedule_of
from autopar.schedule.chunk_states import Changes, chunk_states
from autopar.schedule.host_step import host_step, room_bytes
from autopar.schedule.order import in_order
from autopar.schedule.pareto import ScheduleFront, has_many_operators, undominated
from autopar.schedule.prefetch import GATHERS, exposed_share, prefetched
from autopar.schedule.program import Program, Resource, Schedule, eager_schedule
from autopar.schedule.simulate import peak_bytes, timeline
from autopar.schedule.streams import step_us
from autopar.schedule.timeline import Timeline
from autopar.units import budget_text, bytes_text

log = logging.getLogger(__name__)

_RUNGS = 8  # budgets that refining goes through, from keeping everything to the true one
_AHEAD = (1, 2)  # gathers in flight for which a schedule leaves room
_LEAST_SHARE = 0.02  # of its time that a hidden gather costs


@dataclass(frozen=True)
class MemoryPlan:
    """A schedule, with what it is predicted to take.

    Args:
        timeline: of the schedule.
        eager_bytes: the peak if everything were kept.
        added_us: how much longer the step takes than with everything kept.
        exposed_us: the part of that spent waiting for collectives.
        state_on_host: the optimizer's state is on the host outside of the optimizer step.
        parameters_on_host: names of parameters that are on the host for a part of the step.
        states_on: the tier that all states are on between steps; the device if empty.
        chunks: the states of each module's parameters over the step, if they are on a tier.
        host_step: the optimizer's step, if it runs on the host.
        room_bytes: of the host, for what of that step runs beside the backward.
        front: peaks, and what schedules of them add, that the search has seen; from the largest
            peak down.
    """

    schedule: Schedule
    timeline: Timeline
    eager_bytes: int
    added_us: float
    exposed_us: float = 0.0
    state_on_host: bool = False
    parameters_on_host: tuple[str, ...] = ()
    states_on: str = ""
    chunks: Mapping[str, Changes] = field(default_factory=dict)
    host_step: HostStep | None = None
    room_bytes: float = 0.0
    front: tuple[tuple[int, float], ...] = ()

    def added_us_with(self, more_bytes: float) -> float:
        """What the step is estimated to take longer if it had more memory."""
        peaks, added = zip(*reversed(self.front), strict=True) if self.front else ((0,), (0.0,))
        less, now = np.interp([self.peak_bytes + more_bytes, self.peak_bytes], peaks, added)
        return self.added_us * float(less / now) if now > 0 else self.added_us

    @property
    def peak_bytes(self) -> int:
        return self.timeline.peak_bytes

    def summary(self, resident_bytes: float) -> StepSummary:
        """The summary that a plan holds.

        Args:
            resident_bytes: in use before the step.
        """
        events, first = self.timeline.events, self.timeline.forward
        peak = events[self.timeline.peak_at] if events else None
        return StepSummary(
            us=self.timeline.us,
            backward_us=events[first].issued_us if first < len(events) else 0.0,
            added_us=self.added_us,
            waited_us={str(r): us for r, us in self.timeline.waited_us.items() if us},
            peak_bytes=self.peak_bytes,
            eager_bytes=self.eager_bytes,
            peak_at="" if peak is None else _place(peak.name, peak.module),
            resident_bytes=resident_bytes,
            state_on_host=self.state_on_host,
            parameters_on_host=self.parameters_on_host,
            live=tuple(
                (
                    round(e.issued_us, 2), e.kept_bytes, e.recomputed_bytes, e.other_bytes,
                    e.evicted_bytes,
                )
                for e in events
            ),
            modules=self.timeline.by_module(),
            host_step=self.host_step,
        )  # fmt: skip


@dataclass(frozen=True)
class StepBudget:
    """A device's memory, and what a schedule cannot change. Bytes.

    Args:
        memory_bytes: of the device, for this model.
        other_bytes: inputs, buffers and constants, copies of buffers that the step updates, and
            frozen parameters.
        host: the link to the host, if there is one.
        state_on_host: the optimizer's state is on the host while the model runs.
        tiers: of the cluster, for states that the device has no room for.
        steps_on: the tiers that the optimizer can step on.
        states_on: the tier that parameters, gradients and the optimizer's state are on; the device
            if empty.
        frozen_bytes: of the parameters that are not trained.
        sums_bytes: sums of the gradients of earlier microbatches.
    """

    memory_bytes: float
    parameters_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    other_bytes: float
    host: Link | None = None
    state_on_host: bool = False
    tiers: tuple[Tier, ...] = ()
    steps_on: tuple[str, ...] = ()
    states_on: str = ""
    frozen_bytes: float = 0.0
    sums_bytes: float = 0.0

    @staticmethod
    def of(
        arguments: Sequence[torch.Tensor], memory_bytes: float, optimizer_state: float,
        copied_bytes: float = 0.0, host: Link | None = None,
    ) -> StepBudget:  # fmt: skip
        """The budget of a program with these arguments.

        Args:
            optimizer_state: bytes per byte of a trainable parameter.
            copied_bytes: of arguments that are copied for the step.
        """
        trained = sum(t.nbytes for t in arguments if t.requires_grad)
        other = sum(t.nbytes for t in arguments if not t.requires_grad) + copied_bytes
        return StepBudget(memory_bytes, trained, trained, optimizer_state * trained, other, host)

    def of_microbatch(
        self, arguments: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], count: int
    ) -> StepBudget:
        """The budget of one of several microbatches.

        Args:
            arguments: of its program.
            inputs: those that are slices of the batch; the others' slices are there, too.
        """
        others = (count - 1) * sum(x.nbytes for x in inputs)
        return replace(self, other_bytes=self.other_bytes + others).with_sums(arguments, count)

    def with_sums(self, arguments: Sequence[torch.Tensor], count: int) -> StepBudget:
        """The budget beside sums of the gradients of so many microbatches."""
        trained = [t for t in arguments if t.requires_grad]
        sums = sum(width_of_sums(t.itemsize) * t.nbytes for t in trained) if count > 1 else 0.0
        return replace(self, sums_bytes=sums)

    @property
    def resident_bytes(self) -> float:
        """In use while the model runs."""
        if self.states_on:
            return self.other_bytes - self.frozen_bytes
        state = 0.0 if self.state_on_host else self.optimizer_bytes
        return self.parameters_bytes + state + self.other_bytes + self.sums_bytes

    @property
    def step_bytes(self) -> float:
        """Left for what the step makes, gradients of parameters included."""
        return self.memory_bytes - self.resident_bytes

    @property
    def is_hopeless(self) -> bool:
        """Whether gradients alone need more, with all parameters on the host."""
        gradients = 0.0 if self.states_on else self.gradients_bytes
        return self.step_bytes + self.parameters_bytes < gradients

    @property
    def is_too_small_for_states(self) -> bool:
        """Whether all parameters, gradients and the optimizer's state, which are on the device
        together before its step, need more."""
        return self.gradients_bytes + self.optimizer_bytes > self.memory_bytes - (
            self.parameters_bytes + self.other_bytes
        )

    @property
    def states(self) -> StateBytes:
        """Of this device's part of the model."""
        parameters = self.parameters_bytes + self.frozen_bytes
        return StateBytes(parameters, self.gradients_bytes, self.optimizer_bytes)

    def off_device(self) -> StepBudget | None:
        """The same with all states on the nearest tier that has room for them; None if there is
        none, or if the optimizer's step cannot run there.

        Raises:
            InfeasibleError: the tiers are too small.
        """
        if self.states_on or not self.steps_on or not self.parameters_bytes:
            return None
        try:
            place = self.states.place(self.tiers, self.steps_on)
        except ValueError as error:
            raise InfeasibleError(
                str(error), budget_bytes=self.memory_bytes, smallest_bytes=math.inf
            ) from error
        return None if place is None else replace(self, states_on=place)

    def choose(
        self, program: Program, patience: float = math.inf, until: float = math.inf
    ) -> MemoryPlan:
        """The fastest schedule, with the optimizer's state on the device or on the host.

        Args:
            patience: times the budget that checkpointing of blocks may need; if it needs more, no
                other schedule is looked for. For programs of many operators.
            until: the processor time at which the search ends with what it has.

        Raises:
            InfeasibleError: no schedule fits the memory; it names the smallest budget that does.
        """
        if self.states_on:
            return self._plan(program, patience, until)
        offloading = self._with_state_on_host(program)
        try:
            plan = self._plan(program, patience, until)
        except InfeasibleError:
            if offloading is None:
                raise
            return offloading._plan(program, patience, until)
        if offloading is None or plan.added_us <= offloading._round_trip_us:
            return plan
        other = offloading._plan(program, until=until)
        return min(plan, other, key=lambda plan: plan.added_us)

    def _with_state_on_host(self, program: Program) -> StepBudget | None:
        """None if the optimizer's state cannot be on the host."""
        step = self.resident_bytes + self.gradients_bytes
        fits = step <= self.memory_bytes and self.optimizer_bytes <= program.host_bytes
        if self.host is None or not self.optimizer_bytes or not fits:
            return None
        return replace(self, state_on_host=True)

    @property
    def _round_trip_us(self) -> float:
        """Of the optimizer's state, before and after its step."""
        if self.host is None or not self.state_on_host:
            return 0.0
        return 2e6 * (self.host.alpha + self.host.beta * self.optimizer_bytes)

    def _plan(
        self, program: Program, patience: float = math.inf, until: float = math.inf
    ) -> MemoryPlan:
        if self.state_on_host:
            program = replace(program, host_bytes=program.host_bytes - self.optimizer_bytes)
        if self.states_on:
            held = self.states.on_host(self.states_on)
            program = replace(program, host_bytes=program.host_bytes - held)
        try:
            plan = plan_memory(program, self.step_bytes, patience, until)
        except InfeasibleError as error:
            smallest = self.resident_bytes + error.smallest_bytes
            if self.states_on:
                raise InfeasibleError(
                    f"{error}. Parameters, gradients and the optimizer's state are on the "
                    f"{self.states_on} already; inputs and buffers take "
                    f"{bytes_text(self.resident_bytes)}. Give at least {budget_text(smallest)}, "
                    "more devices, or a smaller batch",
                    budget_bytes=self.memory_bytes,
                    smallest_bytes=smallest,
                ) from error
            raise InfeasibleError(
                f"{error}. Of {bytes_text(self.memory_bytes)}, {self._held}. Give at least "
                f"{budget_text(smallest)}, more devices, or a smaller batch",
                budget_bytes=self.memory_bytes,
                smallest_bytes=smallest,
            ) from error
        plan = replace(
            plan, state_on_host=self.state_on_host, added_us=plan.added_us + self._round_trip_us
        )
        return self.with_host_step(plan, program)

    @property
    def _held(self) -> str:
        """What takes memory beside the values of the step, in words."""
        if not self.parameters_bytes:
            rest = self.other_bytes - self.frozen_bytes
            return (
                f"parameters take {bytes_text(self.frozen_bytes)}, inputs and buffers "
                f"{bytes_text(rest)}"
            )
        state = 0 if self.state_on_host else self.optimizer_bytes
        sums = ""
        if self.sums_bytes:
            sums = f"gradients of earlier microbatches {bytes_text(self.sums_bytes)}, "
        return (
            f"parameters take {bytes_text(self.parameters_bytes)}, the optimizer "
            f"{bytes_text(state)}, inputs and buffers {bytes_text(self.other_bytes)}, {sums}and "
            f"gradients of parameters come to {bytes_text(self.gradients_bytes)} as backward "
            "proceeds"
        )

    def with_host_step(self, plan: MemoryPlan, program: Program) -> MemoryPlan:
        """A schedule with the optimizer's step, if that is where the states are."""
        if not self.states_on:
            return plan
        where = self.states, self.tiers, self.states_on
        room = room_bytes(program, plan.schedule, *where) if NVME in self.steps_on else 0.0
        step = host_step(program, plan.schedule, *where, room)
        room = room if step.exposed_us < step.us else 0.0
        return replace(
            plan, states_on=self.states_on, added_us=plan.added_us + step.exposed_us,
            host_step=step, room_bytes=room,
        )  # fmt: skip


def width_of_sums(itemsize: int) -> float:
    """Bytes of a sum of gradients over microbatches per byte of a gradient: those of two bytes are
    summed in float32."""
    return 2.0 if itemsize == 2 else 1.0


def frozen_bytes(parameters: Sequence[torch.Tensor]) -> float:
    """Of parameters that are not trained."""
    return float(sum(p.nbytes for p in parameters if not p.requires_grad))


def describe(program: Program, schedule: Schedule) -> MemoryPlan:
    """Simulate a schedule, and compare it with keeping everything."""
    eager, offloaded = eager_schedule(program), schedule.offloaded(program)
    scheduled = timeline(program, schedule)
    fastest = timeline(program, prefetched(program, eager, math.inf))
    exposed_us, least_exposed_us = (
        t.waited_us[Resource.COMMUNICATION] for t in (scheduled, fastest)
    )
    return MemoryPlan(
        schedule,
        scheduled,
        peak_bytes(program, eager),
        max(0.0, scheduled.us - fastest.us),
        max(0.0, exposed_us - least_exposed_us),
        chunks=chunk_states(program, schedule),
        parameters_on_host=tuple(p.name for s, p in program.parameters.items() if s in offloaded),
    )


def plan_memory(
    program: Program, budget_bytes: float, patience: float = math.inf, until: float = math.inf
) -> MemoryPlan:
    """The fastest schedule whose peak is within the budget, with its collectives split where that
    hides them. Schedules for somewhat less memory are also tried: they leave room for gathers in
    flight.

    Args:
        budget_bytes: for what the step makes.
        patience, until: as of `StepBudget.choose`.

    Raises:
        InfeasibleError: no schedule fits; it names the smallest budget with one.
    """
    program = in_order(program)
    eager = eager_schedule(program)
    eager_bytes = peak_bytes(program, eager)
    if eager_bytes <= budget_bytes:
        return describe(program, prefetched(program, eager, budget_bytes))
    front = ScheduleFront(program, _costs(program), until)
    if has_many_operators(program):
        common = front.checkpointed()
        if common.peak_bytes > patience * budget_bytes:
            raise _infeasible(program, common.schedule, budget_bytes)
        if budget_bytes < least_bytes(program):
            raise _infeasible(program, front.low().schedule, budget_bytes)
    step = (max(1.0, budget_bytes) / eager_bytes) ** (1 / _RUNGS)
    ladder = [eager_bytes * step**k for k in range(1, _RUNGS)]
    budgets = [budget_bytes, *_with_room(program, budget_bytes)]
    points = [point for point in front.solve(budgets, through=ladder) if point is not None]
    if not points:
        smallest = front.low(budget_bytes)
        if smallest.peak_bytes > budget_bytes:
            smallest = front.smallest()
        if smallest.peak_bytes > budget_bytes:
            raise _infeasible(program, smallest.schedule, budget_bytes)
        points = [front.grown(smallest, budget_bytes)]
    schedules = [prefetched(program, point.schedule, budget_bytes) for point in points]
    plan = describe(program, min(schedules, key=lambda schedule: step_us(program, schedule)))
    seen = undominated(front.candidates)
    plan = replace(plan, front=tuple((point.peak_bytes, point.cost) for point in seen))
    log.info("the step's values peak at %s", bytes_text(plan.peak_bytes))
    return plan


def least_bytes(program: Program) -> int:
    """What the largest operator reads and makes, with all parameters that can be elsewhere
    elsewhere: no schedule needs less."""
    nbytes = program.nbytes
    most = 0
    for op in program.ops:
        held = {*op.reads, *(() if op.overwrites else op.makes)} - set(op.fills)
        most = max(most, sum(nbytes[s] for s in held))
    return most - sum(parameter.nbytes for parameter in program.parameters.values())


def _gathers(program: Program) -> list[int]:
    """Gathers that can be split."""
    return [i for i in program.splits if program.ops[i].kind.startswith(GATHERS)]


def _costs(program: Program) -> dict[int, float]:
    """Of recomputing operators: their time, and of gathers the part of it that is exposed if all
    of them are re-gathered."""
    times = {i: op.us for i, op in enumerate(program.ops)}
    gathers = set(program.forward).intersection(_gathers(program))
    if not gathers:
        return times
    kept = {s for s in program.needed if program.maker[s] not in gathers}
    share = exposed_share(program, eager_schedule(program), schedule_of(program, kept))
    return times | {i: max(share, _LEAST_SHARE) * times[i] for i in gathers}


def _with_room(program: Program, budget_bytes: float) -> list[float]:
    """The budget less one or two of the largest buffers of gathers."""
    starts = (program.ops[program.splits[i].start] for i in _gathers(program))
    largest = max((sum(program.nbytes[s] for s in op.makes) for op in starts), default=0)
    rooms = (budget_bytes - count * largest for count in _AHEAD)
    return [room for room in rooms if largest and room > 0]


def _infeasible(program: Program, smallest: Schedule, budget_bytes: float) -> InfeasibleError:
    simulated = timeline(program, smallest)
    op = program.ops[(smallest.forward + smallest.backward)[simulated.peak_at]]
    read = bytes_text(sum(program.nbytes[s] for s in op.reads))
    output = bytes_text(sum(program.nbytes[s] for s in op.makes))
    left = bytes_text(budget_bytes) if budget_bytes >= 1 else "nothing"
    how = " with recomputation" if program.backward else ""
    return InfeasibleError(
        f"the step needs {bytes_text(simulated.peak_bytes)} for what it makes, and there is {left} "
        f"left. That is the smallest peak the search found{how}; it is reached at "
        f"{_place(op.name, op.module)}, which alone reads {read} and makes {output}",
        budget_bytes=budget_bytes,
        smallest_bytes=simulated.peak_bytes,
    )


def _place(name: str, module: str) -> str:
    return f"{name} of {module}" if module else name
