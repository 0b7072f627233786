"""The fastest pair within a budget: how a model is sharded, and what its step keeps.

Less memory can be had by splitting more and by computing again, and which is cheaper shows only
when both are known. So sharding plans are made for several limits of memory, each of them is
scheduled within the true budget, and the pair with the least time wins. Among them are the plan
without any limit (sharding first, what is kept after it) and the one that fits as it is, so that
no pair is slower than either.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from autopar.errors import InfeasibleError
from autopar.ir.spec import ShardingSpec
from autopar.passes.local_step import LocalStep, local_step
from autopar.plan import MemoryEstimate, ShardingPlan
from autopar.planner.estimate import estimate_memory, estimate_time
from autopar.planner.liveness import Liveness
from autopar.planner.pareto import with_budget
from autopar.planner.planner import Planned, PlanningProblem, make_plan
from autopar.planner.search import Found, search
from autopar.planner.space import SearchSpace
from autopar.schedule.budget import MemoryPlan, StepBudget
from autopar.units import bytes_text

_UNLIMITED = 2.0**60  # bytes; more than any device has
_BETWEEN = 2  # limits between none and the budget
_EVEN = 5e-3  # of a step: what fitting the budget may cost without other plans being looked for


@dataclass(frozen=True)
class Tried:
    """A sharding plan with the schedule that it gets.

    Args:
        limit_bytes: that the plan was made for; infinite for none.
        plan_us: of a step in which everything is kept.
        added_us: by what is computed, gathered or fetched again within the budget; infinite where
            no schedule fits, not a number where `plan_us` alone was too much.
    """

    limit_bytes: float
    plan_us: float
    added_us: float

    @property
    def step_us(self) -> float:
        return self.plan_us + self.added_us


@dataclass(frozen=True)
class JointPlan:
    """A plan and what its step keeps.

    Args:
        planned: its time and memory are those of the schedule, if there is one.
        memory: the schedule; None where the plan fits as it is, and nothing was scheduled.
        step: what the schedule is of.
        tried: all pairs, sharding first being the first of them.
    """

    planned: Planned
    memory: MemoryPlan | None = None
    step: LocalStep | None = None
    tried: tuple[Tried, ...] = ()


def plan_jointly(
    problem: PlanningProblem,
    *,
    output_specs: Sequence[ShardingSpec] | None = None,
    always: bool = False,
) -> JointPlan:
    """The fastest pair found within the budget of the space.

    Args:
        output_specs: layouts in which the caller wants the results; replicated if None.
        always: schedule even where memory does not bind.

    Raises:
        InfeasibleError: no pair fits; it names the smallest budget of those tried.
    """
    free = problem.decide(with_budget(problem.space, _UNLIMITED))
    needed = estimate_memory(problem.space, free.choices).total_bytes
    binds = needed > problem.space.cluster.budget_bytes
    if not binds and not always:
        return JointPlan(problem.planned(free))
    pairs = _Pairs(problem, output_specs)
    pairs.add(math.inf, free)
    start = time.monotonic()
    limited = _limited(problem, needed)
    # no plan is faster than the one without a limit
    while pairs.best is None or (binds and pairs.best.tried.added_us > _EVEN * free.step_us):
        late = time.monotonic() - start > problem.time_limit
        limit, found = (math.inf, None) if late else next(limited, (math.inf, None))
        if found is None:
            break
        pairs.add(limit, found)
    return pairs.chosen()


@dataclass(frozen=True)
class _Scheduled:
    """A pair that fits."""

    tried: Tried
    found: Found
    step: LocalStep
    memory: MemoryPlan


class _Pairs:
    """The pairs of one model and budget.

    Attributes:
        best: the fastest so far.
    """

    def __init__(
        self, problem: PlanningProblem, output_specs: Sequence[ShardingSpec] | None
    ) -> None:
        self.problem, self.output_specs = problem, output_specs
        self.best: _Scheduled | None = None
        self._tried: dict[tuple[int, ...], Tried] = {}
        self._refused: list[InfeasibleError] = []

    def add(self, limit: float, found: Found) -> None:
        """Schedule a plan, unless that was done or cannot be the fastest."""
        problem, space = self.problem, self.problem.space
        choices = all_kept(space, found.choices)
        if choices in self._tried:
            return
        us = estimate_time(space, choices, Liveness(space, math.inf)).step_us
        if self.best is not None and us >= self.best.tried.step_us:
            self._tried[choices] = Tried(limit, us, math.nan)
            return
        with problem.clock("schedule"):
            step = local_step(
                space.graph, make_plan(space, choices, problem.model),
                trainable=space.workload.trainable, output_specs=self.output_specs,
            )  # fmt: skip
            try:
                memory = _budget(space, step).choose(step.program)
            except InfeasibleError as error:
                self._refused.append(error)
                self._tried[choices] = Tried(limit, us, math.inf)
                return
        tried = self._tried[choices] = Tried(limit, us, memory.added_us)
        where = "no limit" if math.isinf(limit) else bytes_text(limit)
        problem.clock.say(f"planned for {where}: {us:.0f} us, and {memory.added_us:.0f} us to fit")
        if self.best is None or tried.step_us < self.best.tried.step_us:
            self.best = _Scheduled(tried, replace(found, choices=choices), step, memory)

    def chosen(self) -> JointPlan:
        """The fastest.

        Raises:
            InfeasibleError: the smallest of those that say what they lack.
        """
        if self.best is None:
            raise min(self._refused, key=lambda error: error.smallest_bytes)
        best, problem = self.best, self.problem
        planned = problem.planned(best.found)
        plan = _with_schedule(planned.plan, best, _budget(problem.space, best.step))
        if len(self._tried) > 1:
            method = (
                f"{plan.solver.method}; the fastest of {len(self._tried)} pairs with a schedule"
            )
            plan = replace(plan, solver=replace(plan.solver, method=method))
        tried = tuple(self._tried.values())
        return JointPlan(replace(planned, plan=plan), best.memory, best.step, tried)


def all_kept(space: SearchSpace, choices: Sequence[int]) -> tuple[int, ...]:
    """The choices with no parameter gathered again: that is for the schedule to say."""
    kept = []
    for decision, c in zip(space.decisions, choices, strict=True):
        names = [candidate.name for candidate in decision.candidates]
        name = names[c].removesuffix(" reshard")
        kept.append(names.index(name) if name in names else c)
    return tuple(kept)


def _limited(problem: PlanningProblem, needed: float) -> Iterator[tuple[float, Found]]:
    """Plans for the budget (or the smallest limit that has one), and for limits between that and
    what is needed without a limit."""

    def within(limit: float) -> Found | float:
        space = with_budget(problem.space, limit)
        try:
            return search(space, time_limit=problem.time_limit, only=problem.only)
        except InfeasibleError as error:
            return error.smallest_bytes

    low = problem.space.cluster.budget_bytes
    found = within(low)
    if isinstance(found, float) and math.isfinite(found):
        low = found
        found = within(low)
    if isinstance(found, Found):
        yield low, found
        low = estimate_memory(problem.space, found.choices).total_bytes
    for k in range(1, _BETWEEN + 1):
        limit = needed * (low / needed) ** (k / (_BETWEEN + 1))
        between = within(limit)
        if isinstance(between, Found):
            yield limit, between


def _budget(space: SearchSpace, step: LocalStep) -> StepBudget:
    cluster = space.cluster
    state = space.workload.state_bytes_per_param_byte
    return StepBudget.of(
        step.arguments, cluster.budget_bytes, state, step.copied_bytes, cluster.host_link
    )


def _with_schedule(plan: ShardingPlan, pair: _Scheduled, budget: StepBudget) -> ShardingPlan:
    """The plan with the time and the memory of its schedule."""
    memory, program = pair.memory, pair.step.program
    time_us = replace(
        plan.time,
        compute_us=plan.time.compute_us + memory.added_us - memory.exposed_us,
        exposed_us=plan.time.exposed_us + memory.exposed_us,
    )
    budget = replace(budget, state_on_host=memory.state_on_host)
    sequence = memory.schedule.forward + memory.schedule.backward
    at = memory.timeline.peak_at
    away = sum(moment.away_bytes for moment in memory.timeline.events[at : at + 1])
    made = {s for i in sequence[: at + 1] for s in program.ops[i].makes}
    gradients = float(sum(n for s, n in program.stays.items() if s in made))
    estimate = MemoryEstimate(
        parameters_bytes=budget.parameters_bytes - away,
        gradients_bytes=gradients,
        optimizer_bytes=0.0 if budget.state_on_host else budget.optimizer_bytes,
        activations_bytes=memory.peak_bytes + away - gradients,
        buffers_bytes=budget.other_bytes,
        transient_bytes=0.0,
    )
    summary = memory.summary(budget.resident_bytes)
    return replace(plan, time=time_us, memory=estimate, step=summary)
