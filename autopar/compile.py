"""The compiler on one screen: trace, profile, space, solve, plan; apply, schedule, lower."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from autopar.cluster.cluster import ClusterInfo
from autopar.cluster.local import as_cluster
from autopar.comm.groups import planning_groups
from autopar.compiled_step import Arguments, CompiledStep, Place, StepOptions, StepPlan
from autopar.errors import ConflictError, ConstraintError, InfeasibleError, PlanError
from autopar.ir.graph import ModelGraph
from autopar.ir.precision import Precision, without_autocast
from autopar.ir.spec import ShardingSpec
from autopar.passes.apply_sharding import LocalProgram, apply_sharding
from autopar.passes.local_step import fake_arguments
from autopar.passes.lower import lower, trace_step
from autopar.passes.pipeline import LowerOptions, run_stage
from autopar.passes.split_regions import split_regions
from autopar.plan import ShardingPlan
from autopar.planner.batch import TracedBatch
from autopar.planner.fitted_step import fit_step
from autopar.planner.joint import JointPlan, plan_jointly
from autopar.planner.microbatched import BatchPlanner, worth_splitting
from autopar.planner.planner import Planned, PlanningProblem, build_problem
from autopar.planner.scheduled_plan import with_schedule
from autopar.planner.smallest_budget import naming, with_smallest_budget
from autopar.planner.stages import PipelineOptions
from autopar.progress import TIME_LIMIT, Deadline, Progress, Tell
from autopar.schedule.agreed import agreed_schedule
from autopar.units import budget_text, bytes_text
from autopar.versions import warn_if_torch_is_untested

# Of the time limit, for microbatches where a plan without them is known.
_SPLIT_SHARE = 0.2


def autoplan(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Planned:
    """Find the fastest plan for one training step of `model(*args, **kwargs)` that fits the memory.

    Needs no GPU, no process group and no weights: the model may live on the meta device.

    Args:
        options: of `autopar.planner.planner.build_problem`: `cluster`, `memory`, `constraints`, ...

    Raises:
        CaptureError: the model cannot be captured.
        ConstraintError: a constraint has an unknown name or an impossible layout.
        InfeasibleError: nothing fits the budget; a `ConflictError` if constraints are the reason.
    """
    warn_if_torch_is_untested(torch.__version__)
    problem = build_problem(model, args, kwargs, **options)  # trace, profile, space
    return problem.planned(problem.decide())  # solve, plan


def plan_batch(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    cluster: ClusterInfo | str,
    memory: str | float | None = None,
    microbatches: int | None = None,
    microbatch: str = "exact",
    schedule: str | None = None,
    stages: str | None = None,
    batch_dim: int | Mapping[str, int | None] = 0,
    precision: Precision | str | torch.dtype | None = None,
    progress: Progress | Tell | None = None,
    **options: Any,
) -> Planned:
    """Find the fastest plan of a step in microbatches, over the stages of a pipeline if the mesh
    has an axis named pipe. Its graph is that of one microbatch.

    Args:
        microbatches, microbatch, schedule, stages, batch_dim: as of `auto_engine`.
        options: of `autopar.planner.planner.build_problem`.

    Raises:
        NotSeparableError: the batch cannot be split exactly.
        MeshError: a schedule or stages are given, and the mesh has no axis of stages.
        InfeasibleError, CaptureError, ConstraintError: as of `autoplan`.
    """
    warn_if_torch_is_untested(torch.__version__)
    options.setdefault("deadline", Deadline(options.get("time_limit", TIME_LIMIT)))
    cluster = as_cluster(cluster).with_memory(memory)
    pipeline = PipelineOptions.of(cluster, schedule, stages)
    telling = Progress.of(progress)
    batch = TracedBatch.of(model, args, kwargs or {}, batch_dim, Precision.of(precision), telling)
    split = batch.exact() if microbatch == "exact" else batch.independent(microbatches)
    planner = BatchPlanner(
        model, split, batch.samples, cluster, pipeline, {**options, "progress": telling}
    )
    return planner.plan(microbatches)


def plan_step(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    schedule: bool = False,
    output_specs: Sequence[ShardingSpec] | None = None,
    **options: Any,
) -> JointPlan:
    """The same, together with what the step keeps, recomputes and offloads within its memory.

    Args:
        schedule: also if everything fits the memory.
        output_specs: layouts in which the caller wants the results; replicated if None.
    """
    return _plan_step(build_problem(model, args, kwargs, **options), schedule, output_specs)


def _plan_step(
    problem: PlanningProblem, schedule: bool, output_specs: Sequence[ShardingSpec] | None = None
) -> JointPlan:
    warn_if_torch_is_untested(torch.__version__)
    with without_autocast():
        return plan_jointly(problem, output_specs=output_specs, always=schedule)


def plan_to_fit(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    schedule: bool = False,
    smallest_budget: bool = True,
    **options: Any,
) -> JointPlan:
    """Find the fastest plan of a step, whatever makes it fit the memory: layouts, recomputation and
    offloading, or microbatches.

    Args:
        schedule: also say what the step keeps if everything fits.
        smallest_budget: where nothing fits, look for a budget that does until the time limit.
        options: of `autopar.planner.planner.build_problem`.

    Raises:
        CaptureError: the model cannot be captured.
        ConstraintError: a constraint has an unknown name or an impossible layout.
        InfeasibleError: nothing makes it fit; it names the smallest budget that was found.
    """
    limit = options.pop("time_limit", TIME_LIMIT)
    deadline = options.pop("deadline", None) or Deadline(limit)
    problem = build_problem(model, args, kwargs, deadline=deadline, **options)
    rest = {k: v for k, v in options.items() if k not in ("cluster", "memory", "graph")}
    rest["deadline"] = deadline

    def within(budget_bytes: float) -> JointPlan:
        return _whole_or_split(replace(problem, budget_bytes=budget_bytes), schedule, split, rest)

    def split() -> TracedBatch:
        return TracedBatch.of_graph(model, args, kwargs or {}, problem.space.graph)

    try:
        return within(problem.budget_bytes)
    except ConflictError:
        raise
    except InfeasibleError as error:
        if not smallest_budget:
            raise
        with problem.progress.as_one("smallest budget") as stage:
            refused = with_smallest_budget(error, within, deadline)
            stage.done = f"looked for a budget that fits: {bytes_text(refused.smallest_bytes)}"
        raise refused from error


def _whole_or_split(
    problem: PlanningProblem,
    schedule: bool,
    split: Callable[[], TracedBatch],
    options: Mapping[str, Any],
) -> JointPlan:
    """The faster of a step that is planned as a whole, and one in microbatches.

    Args:
        split: the batch.
        options: of `build_problem`, for microbatches.
    """
    whole: JointPlan | None = None
    deadline = problem.deadline
    earlier = deadline.without(min(_SPLIT_SHARE * deadline.seconds, deadline.left / 2))
    try:
        whole = _plan_step(replace(problem, deadline=earlier), schedule)
        if not worth_splitting(whole.planned.plan):
            return whole
    except ConflictError:  # microbatches have the same constraints
        raise
    except InfeasibleError as error:
        refused = error
    cluster, samples = problem.space.cluster, 0
    if cluster.budget_bytes != problem.budget_bytes:
        cluster = replace(cluster, memory_bytes=problem.budget_bytes)
    try:
        batch = split()
        samples = batch.samples
        planner = BatchPlanner(batch.model, batch.exact(), samples, cluster, None, options)
        least = refused.smallest_bytes if whole is None else whole.unscheduled_bytes
        known_us = math.inf if whole is None else whole.planned.plan.time.step_us
        fewest = _fewest_microbatches(least, problem.budget_bytes)
        planned = planner.plan_within(fewest, known_us)
    except (InfeasibleError, PlanError, ConstraintError) as error:  # a microbatch has fewer rows
        if whole is not None:
            return whole
        least = getattr(error, "smallest_bytes", math.inf)
        why, message = f"do not help: {error}", str(refused).rstrip(".")
        if least < refused.smallest_bytes:
            message = naming(refused, least).rstrip(".")
            why = (
                f"need {budget_text(least)}; with their number given, as microbatches={samples}, "
                "they recompute too"
            )
        raise InfeasibleError(
            f"{message}. Microbatches that keep everything {why}",
            budget_bytes=refused.budget_bytes,
            smallest_bytes=min(refused.smallest_bytes, least),
        ) from error
    if whole is None or planned.plan.time.step_us < whole.planned.plan.time.step_us:
        return JointPlan(planned)
    return whole


def _fewest_microbatches(needed_bytes: float, budget_bytes: float) -> int:
    """That may fit, in doublings: each takes at least its share of what the batch needs."""
    share = needed_bytes / budget_bytes if math.isfinite(needed_bytes) else 2.0
    return 2 ** max(1, math.ceil(math.log2(max(1.0, share))))


@without_autocast()
def compile_step(
    graph: ModelGraph,
    decide: Callable[[], StepPlan],
    place: Place,
    arguments: Callable[[ShardingPlan, LocalProgram], Arguments],
    options: StepOptions,
    *,
    trainable: frozenset[str],
    output_specs: Sequence[ShardingSpec] | None = None,
    whole_sizes: frozenset[int] = frozenset(),
) -> CompiledStep:
    """Compile one rank's step.

    Args:
        decide: the plan, by `autoplan` or `plan_step`; called on rank 0.
        arguments: what the rank's program is called with.
        trainable: placeholder names of the parameters that require grad.
        output_specs: layouts in which the caller wants the results; replicated if None.
        whole_sizes: dims of these sizes stay whole.

    Raises:
        EngineError: ranks built different programs.
        InfeasibleError: the step does not fit the budget.
    """
    stage = options.progress.stage
    planned, local = _planned(
        graph, decide, place, options,
        trainable=trainable, output_specs=output_specs, whole_sizes=whole_sizes,
    )  # fmt: skip
    plan = planned.plan
    if plan.step is None and options.states_on:  # as in the steps before
        plan = replace(plan, states_on=options.states_on)
    if options.states_on is not None and options.states_on != plan.states_on:
        raise PlanError(
            f"the states are on the {options.states_on or 'device'} since the first step, and the "
            f"plan has them on the {plan.states_on or 'device'}; plan again"
        )
    called_with = arguments(plan, local)
    if not options.lowered:
        return CompiledStep(graph, plan, local, None, None)
    budget = options.budget(graph, plan, called_with)
    lowering = LowerOptions.of(
        graph, plan, called_with.offloadable, device_type=place.device_type,
        cluster=options.cluster, scheduled=budget is not None, compile=options.compile,
        dump=options.dump_passes,
    )  # fmt: skip
    whole = local.gm
    local = replace(
        local,
        gm=place.ranks.together(
            lambda: split_regions(whole, called_with.tensors, plan.time_splits)
        ),
    )
    memory = None
    open_ = plan.step is None and not plan.time_splits and math.prod(plan.mesh) == 1
    if budget is not None and open_:
        with stage("schedule") as running:
            fitted = fit_step(local.gm, called_with.tensors, lowering, budget, options.time_limit)
            assert fitted.traced is not None
            traced, memory = fitted.traced, fitted.memory
            local = replace(local, gm=fitted.gm)
            plan = replace(
                with_schedule(plan, fitted.program, memory, budget),
                time_splits=fitted.splits, whole_results=fitted.whole_results,
            )  # fmt: skip
            running.done = f"scheduled memory: values peak at {bytes_text(memory.peak_bytes)}"
    else:
        with stage("differentiate") as running:
            traced = trace_step(local.gm, called_with.tensors, lowering)
            running.done = "differentiated the program"
    if budget is not None and memory is None:
        with stage("schedule") as running:
            known = planned.schedule_of(traced.program)
            memory = agreed_schedule(traced.program, budget, place.ranks, known, options.time_limit)
            running.done = f"scheduled memory: values peak at {bytes_text(memory.peak_bytes)}"
    with stage("lower") as running:
        lowered = lower(traced, None if memory is None else memory.schedule)
        place.check_agreement(lowered.forward, lowered.backward)
        running.done = f"lowered: {_size(lowered.forward)} operators forward" + (
            "" if lowered.backward is None else f", {_size(lowered.backward)} backward"
        )
    if plan.states_on:  # evaluation fetches, too
        on_host = replace(lowering, states_on=plan.states_on)
        local = replace(local, gm=run_stage("program", local.gm, on_host))
    return CompiledStep(graph, plan, local, lowered, memory)


def apply_plan(
    graph: ModelGraph,
    decide: Callable[[], StepPlan],
    place: Place,
    options: StepOptions,
    **rest: Any,
) -> tuple[StepPlan, LocalProgram]:
    """The plan, and this rank's program, of a step that is compiled in stages."""
    with without_autocast():
        return _planned(graph, decide, place, options, **rest)


def _planned(
    graph: ModelGraph,
    decide: Callable[[], StepPlan],
    place: Place,
    options: StepOptions,
    *,
    trainable: frozenset[str],
    output_specs: Sequence[ShardingSpec] | None = None,
    whole_sizes: frozenset[int] = frozenset(),
) -> tuple[StepPlan, LocalProgram]:
    planned = StepPlan.of_rank_zero(decide, place.ranks)
    with options.progress.stage("apply") as running:
        local = apply_sharding(
            graph, planned.plan, coords=place.coords, groups=place.groups,
            output_specs=output_specs, trainable=trainable, whole_sizes=whole_sizes,
        )  # fmt: skip
        place.check_agreement(local.gm)
        running.done = f"applied the plan: {_size(local.gm)} operators on each rank"
    return planned, local


def _size(gm: torch.fx.GraphModule) -> str:
    return f"{sum(node.op == 'call_function' for node in gm.graph.nodes):,}"


def compile_first_rank(joint: JointPlan, *, dump_passes: Path | None = None) -> CompiledStep:
    """Compile the step of the first rank without processes, to look at its graphs.

    They are traced on CPU tensors: if the plan is for GPUs, kernels of these are left out.

    Args:
        dump_passes: folder for the graph before and after each pass.
    """
    planned, program = joint.planned, None if joint.step is None else joint.step.program
    plan, graph, trainable = planned.plan, planned.graph, planned.space.workload.trainable
    coords = (0,) * len(plan.mesh)
    cluster, state = planned.space.cluster, plan.optimizer_state
    return compile_step(
        graph,
        lambda: StepPlan(plan, program, joint.memory),
        Place(coords, planning_groups(plan.mesh, coords), cluster.device.kind),
        lambda _, local: Arguments(fake_arguments(graph, local, trainable)),
        StepOptions(cluster, optimizer_state=state, dump_passes=dump_passes),
        trainable=trainable,
    )
