"""Plans for a batch that is processed in microbatches, over the stages of a pipeline or without.

Layouts are solved for one microbatch on the mesh of one stage. How many microbatches, where the
model is cut, and in which order stages run is chosen from what the operators of that plan cost
(`planner/stages.py`). Their costs at other sizes come from the same layouts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from autopar.cluster.cluster import ClusterInfo
from autopar.errors import InfeasibleError, PlanError
from autopar.ir.precision import without_autocast
from autopar.passes.microbatches import Microbatches
from autopar.plan import ShardingPlan
from autopar.planner.baselines import baseline_plans
from autopar.planner.joint import JointPlan, plan_jointly
from autopar.planner.microbatch_step import once_per_step_us, plan_microbatch
from autopar.planner.pipeline_blocks import OperatorChain, operator_chain
from autopar.planner.planner import (
    Planned,
    PlanningProblem,
    build_problem,
    choices_of,
    make_plan,
)
from autopar.planner.search import SearchResult
from autopar.planner.space import SearchSpace
from autopar.planner.stages import PipelineOptions, plan_stages
from autopar.progress import TIME_LIMIT, Deadline

log = logging.getLogger(__name__)

# Microbatches per rank of a pipeline that layouts are solved for first.
_PER_RANK = 4

# Layouts that the solver found.
_SOLVED = "solver"

# Of a step: what microbatches must be able to gain, for them to be planned.
_LEAST_GAIN = 0.03

# By how much they are slower at the bound with all blocks tied, to be so with any plan.
_SURELY_SLOWER = 0.01


@dataclass(frozen=True)
class BatchPlanner:
    """
    Args:
        model: of the graph.
        split: the batch in microbatches.
        samples: of the batch.
        cluster: of all ranks.
        pipeline: its ranks, and what is fixed of it; None without one.
        options: of `build_problem`. All problems share one deadline.
    """

    model: torch.nn.Module
    split: Microbatches
    samples: int
    cluster: ClusterInfo
    pipeline: PipelineOptions | None
    options: Mapping[str, Any]

    @cached_property
    def deadline(self) -> Deadline:
        """Of all."""
        given = self.options.get("deadline")
        return given or Deadline(self.options.get("time_limit", TIME_LIMIT))

    def plan(self, microbatches: int | None) -> Planned:
        """The fastest plan that fits the memory.

        Args:
            microbatches: chosen if None.

        Raises:
            InfeasibleError: nothing fits the memory.
            PlanError: there are more microbatches than samples, or stages than places to cut.
        """
        given = None if self.pipeline is None else self.pipeline.actions
        if given is not None:
            if microbatches not in (None, given.microbatches):
                raise PlanError(
                    f"the schedule {given.name} is for {given.microbatches} microbatches, and "
                    f"microbatches={microbatches} was asked for; leave that out"
                )
            microbatches = given.microbatches
        if microbatches is not None:
            if not 1 <= microbatches <= self.samples:
                raise PlanError(
                    f"{microbatches} microbatches of a batch of {self.samples} samples: each needs "
                    f"at least one; choose 1 to {self.samples}"
                )
            if self.pipeline is not None:
                return self._staged(microbatches, microbatches)[1]
            with without_autocast():
                return self._at(microbatches, plan_jointly)
        if self.pipeline is None:
            return self.plan_within(1)
        first = min(self.samples, _PER_RANK * self.pipeline.ranks)
        layouts, planned = self._staged(first, None)
        count = planned.plan.microbatches
        return planned if count == first else self._staged(count, count, layouts)[1]

    def _staged(
        self, microbatches: int, count: int | None, only: str | None = None
    ) -> tuple[str, Planned]:
        """The fastest plan of a pipeline, and where its layouts are from.

        Args:
            microbatches: that layouts are made for.
            count: how many there are; chosen if None.
            only: from where layouts may be.

        Raises:
            InfeasibleError: no layouts fit; of the first ones.
        """
        assert self.pipeline is not None
        refused: InfeasibleError | None = None
        best: tuple[str, Planned] | None = None
        for layouts, planned in self._layouts(microbatches, only):
            try:
                chains = self._chains(planned, microbatches) if count is None else None
                plan = plan_stages(planned, self.pipeline, self.samples, count, chains=chains)
            except InfeasibleError as error:
                refused = refused or error
                continue
            if best is None or plan.time.step_us < best[1].plan.time.step_us:
                best = layouts, replace(planned, plan=plan)
            if layouts == _SOLVED and not _recomputes(plan):
                break
        if best is None:
            assert refused is not None
            raise refused
        return best

    def _layouts(self, microbatches: int, only: str | None) -> Iterator[tuple[str, Planned]]:
        """Layouts of one microbatch, and where they are from: the solver, or a baseline.

        Those that are fastest for one microbatch may keep gathered weights for all of them, which
        is not in the memory of one. So where stages do not fit without recomputation, tensor
        parallelism as Megatron's is looked at too.
        """
        problem = self._problem(microbatches)
        if only in (None, _SOLVED):
            yield _SOLVED, self._decided(problem)
        if only == _SOLVED:
            return
        for baseline in baseline_plans(
            problem.space, time_limit=self.deadline.seconds, mask=problem.mask,
            named=only or "Megatron TP",
        ):  # fmt: skip
            plan = make_plan(problem.space, baseline.choices, problem.model)
            plan = replace(
                plan, constraints=problem.constraints, budget_bytes=self.cluster.budget_bytes
            )
            yield (
                baseline.name,
                Planned(plan, problem.space.graph, problem.space, baseline.choices, problem.mask),
            )

    def _at(self, microbatches: int, decide: Callable[[PlanningProblem], JointPlan]) -> Planned:
        problem = self._problem(microbatches)
        return plan_microbatch(problem, self.samples, decide).planned

    def plan_within(self, count: int, faster_than_us: float = math.inf) -> Planned:
        """The plan of the fewest microbatches that fit without recomputation: fewer are faster.

        Args:
            count: of microbatches, the fewest that are tried.
            faster_than_us: the time of a step that is known; of those that will not be faster, the
                best plan is not looked for.

        Raises:
            InfeasibleError: not even single samples fit, or none was seen to fit in time.
        """
        count = min(count, self.samples)

        def keeping_everything(problem: PlanningProblem) -> JointPlan:
            def is_slower(tied: SearchResult) -> bool:
                once_us = once_per_step_us(problem.space, tied.choices)
                total_us = count * tied.bound_us - (count - 1) * once_us
                return total_us > (1 + _SURELY_SLOWER) * faster_than_us

            return JointPlan(problem.planned(replace(problem, is_enough=is_slower).decide()))

        while True:
            try:
                return self._at(count, keeping_everything)
            except InfeasibleError:
                if count >= self.samples or self.deadline.over:
                    raise
                count = min(self.samples, 2 * count)

    def _problem(self, microbatches: int) -> PlanningProblem:
        """That of one microbatch, of the largest."""
        size = -(-self.samples // microbatches)
        budget = None
        if self.pipeline is not None:  # states are spread over its ranks
            budget = self.cluster.budget_bytes * self.pipeline.ranks
        return build_problem(
            self.model, graph=self.split.graph(size), cluster=self.cluster.of_a_stage(),
            budget_bytes=budget, microbatches=microbatches if self.pipeline is None else 1,
            **{**self.options, "deadline": self.deadline},
        )  # fmt: skip

    def _decided(self, problem: PlanningProblem) -> Planned:
        """Layouts of one microbatch of a pipeline."""
        try:
            result = problem.decide()
        except InfeasibleError:
            result = problem.decide(math.inf)  # stages may recompute
        planned = problem.planned(result)
        return replace(planned, plan=replace(planned.plan, budget_bytes=self.cluster.budget_bytes))

    def _chains(self, planned: Planned, microbatches: int) -> dict[int, OperatorChain]:
        """Costs of the same layouts by the samples of a microbatch: of the one that was solved for,
        of the smallest and of one microbatch per rank."""
        assert self.pipeline is not None
        own = -(-self.samples // microbatches)
        chains = {own: operator_chain(planned.space, planned.choices)}
        for size in {1, -(-self.samples // self.pipeline.ranks)} - {own}:
            space = SearchSpace(
                self.split.graph(size), planned.space.cluster, planned.space.workload,
                planned.space.fixed, orders=planned.space.orders, groups=planned.space.groups,
            )  # fmt: skip
            try:
                chains[size] = operator_chain(space, choices_of(space, planned.plan))
            except PlanError as error:  # its dims do not split so
                log.info("no costs for microbatches of %d samples: %s", size, error)
        return chains


def worth_splitting(plan: ShardingPlan) -> bool:
    """Whether microbatches without recomputation may be faster than a plan without microbatches."""
    return plan.added_us > _LEAST_GAIN * plan.time.step_us


def _recomputes(plan: ShardingPlan) -> bool:
    return plan.pipeline is not None and any(s.recomputed_bytes for s in plan.pipeline.stages)
