"""The joint plan: how a model is sharded and what its step keeps, decided together.

Less memory can be had by sharding more or by recomputing more, and which is faster shows only when
both are known. So sharding plans are made for several memory limits, each is scheduled within the
true budget, and the fastest combination is chosen. Among them are the plan without a limit
(sharding first, the schedule after it) and the one that fits without a schedule, so that the joint
plan is no slower than either.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch.fx as fx

from autopar.errors import InfeasibleError, PlanError
from autopar.ir.spec import ShardingSpec
from autopar.passes.local_step import LocalStep, UntracedStep, local_step, untraced_step
from autopar.passes.split_regions import split_regions
from autopar.plan import ShardingPlan
from autopar.planner.estimate import estimate_memory, estimate_time
from autopar.planner.fitted_step import FittedStep, fit_program, split_step
from autopar.planner.limited_plans import limited_plans, lower_plans
from autopar.planner.liveness import Liveness
from autopar.planner.planner import Planned, PlanningProblem, make_plan
from autopar.planner.scheduled_plan import with_schedule
from autopar.planner.search import SearchResult
from autopar.planner.space import SearchSpace
from autopar.planner.time_splits import SECONDS
from autopar.schedule.budget import MemoryPlan, StepBudget, frozen_bytes
from autopar.units import bytes_text, time_text

log = logging.getLogger(__name__)

_PATIENCE = 1.5  # times the budget: if checkpointing needs more, slices are looked for at once
_NEARLY = 1.25  # times the budget
_TIED = 5e-3  # of a step: what untied blocks must save to be scheduled
_FIRST_SHARE = 0.75  # of the time that is left: to schedule a plan before any is known to fit
_SURE = 0.98  # of the budget: a plan that is estimated to need more is scheduled to see if it fits
EVEN = 1e-2  # of a step: the cost of fitting the budget at which no other plans are tried


@dataclass(frozen=True)
class Trial:
    """A sharding plan with its schedule.

    Args:
        plan_us: step that keeps everything.
        added_us: by recomputation, re-gathers and reloads within the budget; infinite where no
            schedule fits, NaN where the plan was not expected to be faster than the best.
    """

    plan_us: float
    added_us: float

    @property
    def step_us(self) -> float:
        return self.plan_us + self.added_us


@dataclass(frozen=True)
class JointPlan:
    """A plan and its schedule.

    Args:
        planned: its time and memory are those of the schedule, if there is one.
        memory: the schedule; None where the plan fits without one.
        step: that is scheduled.
        tried: all trials; sharding first is the first of them.
        unscheduled_bytes: the least memory of a plan that keeps everything, as far as known.
    """

    planned: Planned
    memory: MemoryPlan | None = None
    step: LocalStep | None = None
    tried: tuple[Trial, ...] = ()
    unscheduled_bytes: float = 0.0


def plan_jointly(
    problem: PlanningProblem,
    *,
    output_specs: Sequence[ShardingSpec] | None = None,
    always: bool = False,
) -> JointPlan:
    """The fastest joint plan within the budget of a problem.

    Args:
        output_specs: layouts in which the caller gets the results; replicated if None.
        always: schedule even where memory does not bind.

    Raises:
        InfeasibleError: no joint plan fits; it names the smallest budget of those tried.
    """
    unlimited = problem.decide(math.inf)
    needed = estimate_memory(problem.space, unlimited.choices).total_bytes
    if not always and _surely_fits(problem, unlimited):
        return JointPlan(problem.planned(unlimited))
    trials = _Trials(problem, output_specs, needed)
    # no plan is faster than the one without a limit
    even = (1 + EVEN) * unlimited.step_us
    if needed <= problem.budget_bytes:
        trials.add(math.inf, unlimited)
        if trials.best is not None and trials.best.trial.step_us <= even:
            return trials.fastest()
    limited = limited_plans(problem, needed, trials.errors)
    fitting = next(limited, None)
    known = None if fitting is None or always else fitting[1]
    if known is not None and known.step_us <= even and _surely_fits(problem, known):
        return JointPlan(problem.planned(known))
    trials.add(math.inf, unlimited)
    limited = itertools.chain([] if fitting is None else [fitting], limited)
    while trials.best is None or trials.best.trial.added_us > EVEN * unlimited.step_us:
        if trials.best is None and trials.out_of_reach:
            break
        if problem.deadline.over:
            break
        limit_and_result = next(limited, None)
        if limit_and_result is None:
            break
        trials.add(*limit_and_result)
    if trials.best is None and not trials.out_of_reach:
        for limit, result in lower_plans(problem, trials.last_refusal):
            trials.add(limit, result)
    if known is not None and problem.deadline.over and trials.is_beaten_by(known):
        return JointPlan(problem.planned(known))
    return trials.fastest()


@dataclass(frozen=True)
class _Scheduled:
    """A joint plan that fits."""

    trial: Trial
    result: SearchResult
    step: LocalStep
    memory: MemoryPlan
    split: FittedStep | None = None


@dataclass
class _Trials:
    """The trials for one model and budget.

    Attributes:
        needed: bytes of the plan without a limit.
        best: the fastest so far.
        seconds: of scheduling.
    """

    problem: PlanningProblem
    output_specs: Sequence[ShardingSpec] | None
    needed: float
    best: _Scheduled | None = None
    seconds: float = 0.0
    tried: dict[tuple[int, ...], Trial] = field(default_factory=dict)
    errors: list[InfeasibleError] = field(default_factory=list)

    def add(self, limit: float, result: SearchResult) -> None:
        """Schedule a plan, unless that was done or it cannot be the fastest."""
        problem, space = self.problem, self.problem.space
        result = result.tied_within(_TIED)  # of equal blocks, few are traced
        choices = without_reshard(space, result.choices)
        if choices in self.tried:
            return
        liveness = Liveness(space, math.inf)
        us = estimate_time(space, choices, liveness).step_us
        if self.best is not None:
            freed = self.needed - estimate_memory(space, choices, liveness).total_bytes
            expected = us + self.best.memory.added_us_with(max(0.0, freed))
            if expected >= (1 - EVEN) * self.best.trial.step_us:
                self.tried[choices] = Trial(us, math.nan)
                return
        text = "without a limit" if math.isinf(limit) else f"for {bytes_text(limit)}"
        start = time.perf_counter()
        with problem.progress.stage("schedule") as stage:
            try:
                step, memory, split = self._schedule(choices)
            except InfeasibleError as error:
                stage.done = f"no schedule of the plan {text} fits"
                # the estimate that named this limit is known to be too small
                self.errors[:] = [e for e in self.errors if e.smallest_bytes != limit]
                self.errors.append(error)
                self.tried[choices] = Trial(us, math.inf)
                return
            finally:
                self.seconds += time.perf_counter() - start
            stage.done = (
                f"scheduled memory of the plan {text}: {time_text(us)}, and "
                f"{time_text(memory.added_us)} to fit"
            )
        trial = self.tried[choices] = Trial(us, memory.added_us)
        if self.best is None or trial.step_us < self.best.trial.step_us:
            self.best = _Scheduled(trial, replace(result, choices=choices), step, memory, split)

    def is_beaten_by(self, result: SearchResult) -> bool:
        """Whether a plan that was not scheduled, for lack of time, fits and is faster as it is."""
        choices = without_reshard(self.problem.space, result.tied_within(_TIED).choices)
        if choices in self.tried or not _fits(self.problem, result):
            return False
        return self.best is None or result.step_us < self.best.trial.step_us

    def _schedule(
        self, choices: tuple[int, ...]
    ) -> tuple[LocalStep, MemoryPlan, FittedStep | None]:
        """The first rank's step, its schedule within the budget, and its regions in slices.

        Raises:
            InfeasibleError: no schedule fits.
        """
        states_on = self.problem.space.workload.states_on
        if states_on is not None or not self.problem.space.cluster.off_device_tiers:
            return self._scheduled_with(choices, states_on or "")
        budget = self._whole_budget(choices)
        if not budget.is_too_small_for_states:
            try:
                return self._scheduled_with(choices, "")
            except InfeasibleError as error:
                refused = error
            off_device = budget.off_device()
            if off_device is None:
                raise refused
        else:
            off_device = budget.off_device()
        return self._scheduled_with(choices, "" if off_device is None else off_device.states_on)

    def _whole_budget(self, choices: tuple[int, ...]) -> StepBudget:
        """Of the step with all of its blocks, before it is traced."""
        graph, workload = self.problem.space.graph, self.problem.space.workload
        plan = make_plan(self.problem.space, choices, self.problem.model)
        step = untraced_step(graph, graph, plan, workload.trainable, self.output_specs)
        return _step_budget(self.problem, step)

    def _scheduled_with(
        self, choices: tuple[int, ...], states_on: str
    ) -> tuple[LocalStep, MemoryPlan, FittedStep | None]:
        """The same with the states on a tier, or on the device if that is empty."""
        space = self.problem.space
        plan = replace(
            make_plan(space, choices, self.problem.model), states_on=states_on,
            budget_bytes=self.problem.budget_bytes, microbatches=space.workload.microbatches,
        )  # fmt: skip
        chosen: dict[fx.Node, tuple[str, ...]] = defaultdict(tuple)
        for decision, c in zip(space.decisions, choices, strict=True):
            if decision.kind != "output":
                chosen[decision.node] += (decision.candidates[c].name,)
        given = self.output_specs
        step = local_step(
            space.graph, plan, trainable=space.workload.trainable, output_specs=given,
            choices=chosen,
        )  # fmt: skip
        budget = replace(_step_budget(self.problem, step), states_on=states_on)
        source = step.source
        assert source is not None
        now, left = time.process_time(), self.problem.deadline.left
        until = now + (left if self.best is not None else _FIRST_SHARE * left)

        def in_slices(whole: MemoryPlan | None, spent: float) -> FittedStep | None:
            if whole is not None and self.problem.deadline.over:
                return None
            return self._in_slices(plan, budget, source, whole, spent, until)

        memory, split = fit_program(step.program, budget, in_slices, _PATIENCE, until)
        program = step.program if split is None else split.program
        return replace(step, program=program, source=None), memory, split

    def _in_slices(
        self, plan: ShardingPlan, budget: StepBudget, source: UntracedStep,
        whole: MemoryPlan | None, spent: float, until: float,
    ) -> FittedStep | None:  # fmt: skip
        """The step with regions in slices; None if no region helps.

        Args:
            source: that was traced.
            whole: its schedule without slices, if it fits.
            spent: seconds on it.
            until: as of `split_step`.

        Raises:
            InfeasibleError: slices do not make it fit.
        """
        space, trainable = self.problem.space, self.problem.space.workload.trainable

        @cache
        def all_blocks() -> UntracedStep:
            if source.gap is None:
                return source
            return untraced_step(space.graph, space.graph, plan, trainable, self.output_specs)

        lacks_some = None if source.gap is None else all_blocks
        try:
            fitted = split_step(source, budget, SECONDS, lacks_some, whole, spent, until)
        except PlanError as error:  # a region of the few blocks that all of them do not have
            log.info("no slices: %s", error)
            return None
        if fitted is None:
            return None
        last = untraced_step(
            space.graph, space.graph, plan, trainable, self.output_specs,
            coords=[size - 1 for size in plan.mesh],
        )  # fmt: skip
        if [t.shape for t in last.arguments] != [t.shape for t in all_blocks().arguments]:
            try:  # its shards are the smallest
                split_regions(last.gm, last.arguments, fitted.splits)
            except PlanError as error:
                log.info("no slices, as the last rank has too few rows for them: %s", error)
                return None
        return fitted

    def last_refusal(self) -> InfeasibleError | None:
        """Why the last plan has no schedule; None if some plan has one."""
        return self.errors[-1] if self.best is None else None

    @property
    def out_of_reach(self) -> bool:
        """Whether neither the fastest plan nor the smallest one has a schedule that nearly fits."""
        failed = sum(math.isinf(trial.added_us) for trial in self.tried.values())
        least = min((error.smallest_bytes for error in self.errors), default=0.0)
        return failed > 1 and least > _NEARLY * self.problem.budget_bytes

    def fastest(self) -> JointPlan:
        """The fastest joint plan.

        Raises:
            InfeasibleError: none fits; the error with the smallest budget.
        """
        if self.best is None:
            raise self._refusal()
        best, problem = self.best, self.problem
        planned = problem.planned(best.result, {"schedule": self.seconds})
        budget = _step_budget(problem, best.step)
        plan = with_schedule(planned.plan, best.step.program, best.memory, budget)
        if best.split is not None:
            split = best.split
            plan = replace(plan, time_splits=split.splits, whole_results=split.whole_results)
        if len(self.tried) > 1:
            method = f"{plan.solver.method}; the fastest of {len(self.tried)} joint plans"
            plan = replace(plan, solver=replace(plan.solver, method=method))
        trials = tuple(self.tried.values())
        least = min((e.smallest_bytes for e in self.errors), default=0.0)
        return JointPlan(replace(planned, plan=plan), best.memory, best.step, trials, least)

    def _refusal(self) -> InfeasibleError:
        """The error of the plan that needs least, with that of tiers that have no room, and with
        the time limit if that was over."""
        least = min(self.errors, key=lambda error: error.smallest_bytes)
        tiers = [error for error in self.errors if math.isinf(error.smallest_bytes)]
        sentences = [str(least).rstrip(".")]
        if tiers and least not in tiers:
            sentences.append(f"The states cannot rest off the device: {tiers[0]}")
        if self.problem.deadline.over:
            sentences.append(
                f"Planning was stopped by its time limit of {self.problem.deadline.seconds:g} s; "
                "with a longer one, less may be enough"
            )
        if len(sentences) == 1:
            return least
        return InfeasibleError(
            ". ".join(sentences), budget_bytes=least.budget_bytes,
            smallest_bytes=least.smallest_bytes,
        )  # fmt: skip


def _fits(problem: PlanningProblem, result: SearchResult) -> bool:
    """Whether a plan is estimated to fit the budget without a schedule."""
    needed = estimate_memory(problem.space, result.choices).total_bytes
    return needed <= problem.budget_bytes


def _surely_fits(problem: PlanningProblem, result: SearchResult) -> bool:
    """Whether a plan fits the budget without a schedule, with room for what a conversion of a value
    and of its gradient packs or receives beside both: estimates of training steps leave it out."""
    space, choices, budget = problem.space, result.choices, problem.budget_bytes
    liveness = Liveness(space, math.inf)
    live = liveness.memory.values(choices)
    if live.max() > _SURE * budget:
        return False
    if space.workload.forward:  # they are in the estimate
        return True
    for edge in space.edges:
        source, target = (
            space.decisions[i].candidates[choices[i]] for i in (edge.source, edge.target)
        )
        before, after = source.outputs[edge.result], target.inputs[edge.operand]
        if after is None or (before.dims == after.dims and before.partial == after.partial):
            continue
        sizes = (space.local_bytes(edge.shape, edge.itemsize, s) for s in (before, after))
        # the gradients of all users of a weight are reduced together
        if (
            live[liveness.first_use(edge.source if edge.weight else edge.target)] + sum(sizes)
            > budget
        ):
            return False
    return True


def without_reshard(space: SearchSpace, choices: Sequence[int]) -> tuple[int, ...]:
    """The choices without re-gathered parameters: the schedule decides on these."""
    stored = []
    for decision, c in zip(space.decisions, choices, strict=True):
        names = [candidate.name for candidate in decision.candidates]
        name = names[c].removesuffix(" reshard")
        stored.append(names.index(name) if name in names else c)
    return tuple(stored)


def _step_budget(problem: PlanningProblem, step: LocalStep | UntracedStep) -> StepBudget:
    workload, cluster = problem.space.workload, problem.space.cluster
    arguments, graph, count = step.arguments, problem.space.graph, workload.microbatches
    budget = StepBudget.of(
        arguments, problem.budget_bytes, workload.state_bytes_per_param_byte,
        step.copied_bytes, cluster.host_link,
    )  # fmt: skip
    if count > 1:  # their states stay on the device
        budget = budget.of_microbatch(arguments, arguments[graph.input_arguments], count)
        return replace(budget, host=None)
    frozen = frozen_bytes(arguments[: len(graph.parameters)])
    return replace(
        budget,
        tiers=cluster.off_device_tiers,
        steps_on=workload.steps_on,
        frozen_bytes=frozen,
    )
