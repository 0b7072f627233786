"""Decides the plans of a model's calls."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from autopar.compile import autoplan, plan_step
from autopar.compiled_step import CompiledStep, Place, StepPlan
from autopar.errors import ConstraintError, InfeasibleError, PlanError
from autopar.ir.graph import ModelGraph
from autopar.ir.precision import without_autocast
from autopar.ir.spec import ShardingSpec
from autopar.passes.apply_sharding import apply_sharding
from autopar.passes.microbatches import Microbatches
from autopar.plan import ShardingPlan
from autopar.plan_records import PipelinePlan
from autopar.planner.batch import TracedBatch
from autopar.planner.decisions import FixedLayouts
from autopar.planner.joint import JointPlan, plan_jointly
from autopar.planner.microbatch_step import plan_microbatch
from autopar.planner.microbatched import BatchPlanner, worth_splitting
from autopar.planner.planner import build_problem
from autopar.planner.stages import PipelineOptions
from autopar.runtime.call import Call
from autopar.runtime.engine_options import EngineOptions
from autopar.sharding.node_rules import strategy_by_name

log = logging.getLogger(__name__)


class StepPlanner:
    """Plans on rank 0; other ranks take its plans.

    Args:
        place: of this rank on the mesh of its pipeline stage.

    Attributes:
        pipeline: its ranks, and what is fixed of it; None without one.
    """

    def __init__(self, model: torch.nn.Module, options: EngineOptions, place: Place) -> None:
        self.model, self.options, self.place = model, options, place
        cluster = options.step.cluster
        self.pipeline = PipelineOptions.of(cluster, options.schedule, options.stages)

    def keep_stages(self, plan: PipelinePlan | None) -> None:
        """Cut other calls of the model where this plan cuts it."""
        if self.pipeline is not None and plan is not None:
            self.pipeline = self.pipeline.as_in(plan)

    def decide(
        self,
        graph: ModelGraph,
        fixed: FixedLayouts,
        alike: CompiledStep | None,
        *,
        forward: bool = False,
        microbatches: int = 1,
        samples: int = 0,
        staged: bool = False,
    ) -> StepPlan:
        """The plan that was given, that of a step for other sizes, or a new one; on rank 0.

        Args:
            forward: of a step that trains nothing.
            microbatches: of the batch, if the graph is that of one of them.
            samples: of that batch.
            staged: the plan is that of layouts for the stages of a pipeline, which find room for
                their microbatches themselves.
        """
        options, cluster = self.options, self.options.step.cluster.of_a_stage()
        if alike is not None and (staged or alike.memory is None):
            plan = replace(alike.plan, fingerprint=graph.fingerprint)
            if self._serves(graph, plan, fixed):
                return StepPlan(plan)
        if options.plan is not None and not fixed.parameters:
            name = type(self.model).__name__
            options.plan.check(
                fingerprint=graph.fingerprint, mesh=cluster.mesh, model=name,
                precision=options.precision,
                pipeline_ranks=options.step.cluster.pipeline_ranks,
            )  # fmt: skip
            if options.plan.forward and not forward:
                raise PlanError(
                    "the plan is that of a forward (autopar plan --forward), and this call trains: "
                    "its memory has no room for gradients; plan again without --forward, or call "
                    "the engine under torch.no_grad()"
                )
            return StepPlan(options.plan)
        planning: dict[str, Any] = {
            "graph": graph,
            "cluster": cluster,
            "fixed": fixed,
            "forward": forward,
            **self._options,
        }
        if not options.step.lowered:
            return StepPlan((planned := autoplan(self.model, **planning)).plan, planned=planned)
        if staged:
            planned = autoplan(self.model, budget_bytes=math.inf, **planning)
            plan = replace(planned.plan, budget_bytes=cluster.budget_bytes)
            return StepPlan(plan, planned=planned)
        if microbatches > 1:
            problem = build_problem(self.model, microbatches=microbatches, **planning)
            jointly = partial(plan_jointly, output_specs=fixed.outputs)
            with without_autocast():
                return _of_joint(plan_microbatch(problem, samples, jointly))
        if cluster.memory_bytes is not None and cluster.world_size == 1:
            # its one plan is scheduled when it is compiled
            planned = autoplan(self.model, budget_bytes=math.inf, **planning)
            plan = replace(planned.plan, budget_bytes=cluster.budget_bytes)
            return StepPlan(plan, planned=planned)
        return _of_joint(plan_step(self.model, output_specs=fixed.outputs, **planning))

    def _serves(self, graph: ModelGraph, plan: ShardingPlan, fixed: FixedLayouts) -> bool:
        """Whether a plan for other sizes is one for a graph."""
        try:
            apply_sharding(
                graph, plan, coords=self.place.coords, groups=self.place.groups,
                output_specs=fixed.outputs, whole_sizes=fixed.whole_sizes,
            )  # fmt: skip
            nodes = graph.compute_nodes()
            chosen = ((n, strategy_by_name(n, plan.mesh, plan.choices[n.name])) for n in nodes)
            serves = all(fixed.allows_strategy(n, strategy) for n, strategy in chosen)
            names = [name for name in graph.inputs if name is not None]
            held = zip(names, fixed.inputs or (), strict=False)
            serves &= all(spec is None or plan.choices[n] == str(spec) for n, spec in held)
        except PlanError as error:
            log.info("%s", error)
            serves = False
        if not serves:
            log.info("planning anew: the plan for inputs of other sizes does not serve these")
        return serves

    def fastest_count(
        self, call: Call, graph: ModelGraph, parameters: Mapping[str, ShardingSpec],
        decide: Callable[[], StepPlan],
    ) -> int:  # fmt: skip
        """In how many microbatches a step is fastest within the memory; on rank 0.

        Args:
            decide: the plan of the step as a whole.
        """
        refused: InfeasibleError | None = None
        whole_us = math.inf
        try:
            decided = decide()
            if not worth_splitting(decided.plan):
                return 1
            whole_us = decided.plan.time.step_us
        except InfeasibleError as error:
            refused = error
        try:
            batch = TracedBatch.of_graph(
                self.model, call.args, call.kwargs, graph, self.options.batch_dim
            )
            fixed = FixedLayouts(parameters=parameters)
            planner = self.of_batch(batch.exact(), batch.samples, fixed)
            plan = planner.plan_within(2, whole_us).plan
        except (
            InfeasibleError,
            PlanError,
            ConstraintError,
        ) as error:  # a microbatch has fewer rows
            if refused is not None:
                raise refused from error
            return 1
        return plan.microbatches if plan.time.step_us < whole_us else 1

    def of_batch(self, split: Microbatches, samples: int, fixed: FixedLayouts) -> BatchPlanner:
        cluster = self.options.step.cluster
        planning = self._options | {"fixed": fixed}
        return BatchPlanner(self.model, split, samples, cluster, self.pipeline, planning)

    @property
    def _options(self) -> dict[str, Any]:
        """Options of every planning."""
        return {
            "optimizer_state": self.options.step.optimizer_state,
            "steps_on": self.options.step.steps_on,
            "states_on": self.options.step.states_on,
            "constraints": self.options.constraints,
            "time_limit": self.options.step.time_limit,
            "progress": self.options.step.progress,
        }


def _of_joint(joint: JointPlan) -> StepPlan:
    program = None if joint.step is None else joint.step.program
    return StepPlan(joint.planned.plan, program, joint.memory, joint.planned)
