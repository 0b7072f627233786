"""The mesh as a decision: the plan of the best logical mesh over a number of devices.

Ranks of a node are neighbours, so that inner axes have the faster links, and the order of the axes
matters. All factorizations are planned, except those whose lower bound is above the best plan so
far.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from autopar.cluster.cluster import NODE_SIZE, ClusterInfo
from autopar.cluster.device import Device
from autopar.errors import (
    AutoparError,
    ConflictError,
    ConstraintError,
    InfeasibleError,
    MeshError,
    PlanError,
)
from autopar.ir.graph import ModelGraph
from autopar.ir.precision import Precision
from autopar.plan_records import MeshResult
from autopar.planner.batch import TracedBatch
from autopar.planner.constraints import masked
from autopar.planner.joint import plan_jointly
from autopar.planner.microbatched import BatchPlanner
from autopar.planner.planner import Planned, build_problem, captured
from autopar.planner.stages import PipelineOptions
from autopar.progress import TIME_LIMIT, Deadline, Progress, Tell
from autopar.solver.contraction import Contraction
from autopar.tracer import ColoTracer
from autopar.units import time_text

MAX_AXES = 3

# The part of the time that meshes without pipelines may take, where there are both.
_WITHOUT_STAGES = 0.6


def meshes(devices: int, max_axes: int = MAX_AXES) -> Iterator[tuple[int, ...]]:
    """Every way to write a number of devices as a product of up to `max_axes` factors, in order,
    with the fewest axes first."""
    if devices == 1:
        yield (1,)
    divisors = [size for size in range(2, devices + 1) if devices % size == 0]
    for axes in range(1, max_axes + 1):
        for shape in itertools.product(divisors, repeat=axes):
            if math.prod(shape) == devices:
                yield shape


def search_meshes(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    devices: int,
    device: str | Device = "cpu",
    per_node: int = NODE_SIZE,
    memory: str | float | None = None,
    time_limit: float = TIME_LIMIT,
    progress: Progress | Tell | None = None,
    pipelines: bool = False,
    **options: Any,
) -> Planned:
    """The fastest plan on a mesh of that many devices. Its `meshes` are the results of all meshes.

    Args:
        pipelines: also try pipelines, of every number of ranks that divides the devices, outside of
            meshes of one and two axes.
        device: a name of the table of devices, or a description.
        per_node: devices that fast links join.
        time_limit: seconds for all meshes together. Each gets an equal share of what is left; when
            it is over, and there is a plan, the other meshes are skipped.
        options: of `build_problem`, for each mesh: `constraints`, ... Meshes that lack an axis that
            constraints name are skipped.

    Raises:
        InfeasibleError: no mesh has a plan that fits the memory.
        MeshError: there is no such mesh.
    """
    if devices < 1 or per_node < 1:
        raise MeshError(f"{devices} devices, {per_node} per node: give at least one of each")
    telling = Progress.of(progress)
    with telling.stage("trace") as stage:
        tracer = ColoTracer(precision=Precision.of(options.pop("precision", None)))
        graph = tracer.trace(model, args, kwargs)
        stage.done = captured(model, graph)
    whole = Deadline(time_limit)
    deadline = Deadline(_WITHOUT_STAGES * time_limit) if pipelines else whole
    tried: list[MeshResult] = []
    best: Planned | None = None
    errors: list[AutoparError] = []
    shapes = list(meshes(devices))
    for k, shape in enumerate(shapes):
        name = "x".join(map(str, shape))
        if best is not None and deadline.over:
            note = "no time left"
            tried.append(MeshResult(shape, math.inf, 0.0, math.nan, note))
            continue
        telling(f"mesh {name} ({k + 1} of {len(shapes)}) ...")
        cluster = ClusterInfo.of(shape, device, node_size=per_node).with_memory(memory)
        try:
            problem = build_problem(
                model, graph=graph, cluster=cluster, progress=telling,
                time_limit=deadline.share(len(shapes) - k), **options,
            )  # fmt: skip
            if best is not None:
                # one elimination, without memory and exposed communication
                relaxed = masked(problem.space.problem(), problem.mask).problem
                bound = Contraction(relaxed.time_us, relaxed.pairs()).bound
                if bound >= best.plan.time.step_us:
                    note = "its bound is above the best"
                    tried.append(MeshResult(shape, math.inf, bound, math.nan, note))
                    continue
            try:
                planned = problem.planned(problem.decide())
            except InfeasibleError as error:  # what it keeps may be recomputed
                if isinstance(error, ConflictError):
                    raise
                planned = plan_jointly(problem).planned
        except (InfeasibleError, ConstraintError) as error:
            errors.append(error)
            note = "no plan fits" if isinstance(error, InfeasibleError) else "lacks an axis"
            needed = getattr(error, "smallest_bytes", math.nan)
            tried.append(MeshResult(shape, math.inf, math.inf, needed, note))
            continue
        plan = planned.plan
        step_us = plan.time.step_us
        tried.append(MeshResult(shape, step_us, plan.solver.bound_us, plan.memory.total_bytes))
        telling.tell(f"mesh {name}: {time_text(step_us)}")
        if best is None or step_us < best.plan.time.step_us:
            best = planned
    if pipelines:
        best = _best_pipeline(
            model, args, kwargs or {}, graph, best, tried, devices, per_node, device, memory,
            whole, telling, options,
        )  # fmt: skip
    if best is None:  # the mesh that needs the least memory says why
        infeasible = [e for e in errors if isinstance(e, InfeasibleError)]
        raise min(infeasible, key=lambda e: e.smallest_bytes, default=errors[0])
    return replace(best, plan=replace(best.plan, meshes=tuple(tried)))


def pipeline_meshes(devices: int, per_node: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Ranks of a pipeline and the mesh of a stage, of one and two axes. One mesh for every number
    of ranks comes first, with the last axis within a node, then another one for each."""
    numbers = [pipe for pipe in range(2, devices + 1) if devices % pipe == 0]
    each = [
        sorted(meshes(devices // pipe, 2), key=lambda m: (m[-1] != per_node, m[-1] > per_node))
        for pipe in numbers
    ]
    for rank in range(max(map(len, each), default=0)):
        for pipe, shapes in zip(numbers, each, strict=True):
            if rank < len(shapes):
                yield pipe, shapes[rank]


def _best_pipeline(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], graph: ModelGraph,
    best: Planned | None, tried: list[MeshResult], devices: int, per_node: int,
    device: str | Device, memory: str | float | None, deadline: Deadline, telling: Progress,
    options: Mapping[str, Any],
) -> Planned | None:  # fmt: skip
    """The best plan so far, or a faster one of a pipeline; adds to the meshes that were tried."""
    try:
        batch = TracedBatch.of_graph(model, args, kwargs, graph)
        split = batch.exact()
    except PlanError as error:
        telling.tell(f"no pipelines: {error}")
        return best
    shapes = list(pipeline_meshes(devices, per_node))
    for k, (pipe, shape) in enumerate(shapes):
        if best is not None and deadline.over:
            note = "no time left"
            tried.append(MeshResult(shape, math.inf, 0.0, math.nan, note, pipe))
            continue
        names = "".join(f",axis{axis}={n}" for axis, n in enumerate(shape, 1))
        mesh = f"pipe={pipe}{names}"
        telling(f"mesh {mesh} ({k + 1} of {len(shapes)} with a pipeline) ...")
        cluster = ClusterInfo.of(mesh, device, node_size=per_node).with_memory(memory)
        pipeline = PipelineOptions.of(cluster, None, None)
        limit = deadline.share(len(shapes) - k)
        planner = BatchPlanner(
            model, split, batch.samples, cluster, pipeline,
            {**options, "progress": telling, "time_limit": limit},
        )  # fmt: skip
        try:
            planned = planner.plan(None)
        except (InfeasibleError, ConstraintError, PlanError) as error:
            fits = not isinstance(error, InfeasibleError)
            note = "it has fewer places to cut" if fits else "no plan fits"
            needed = getattr(error, "smallest_bytes", math.nan)
            tried.append(MeshResult(shape, math.inf, math.inf, needed, note, pipe))
            continue
        step_us, nbytes = planned.plan.time.step_us, planned.plan.memory.total_bytes
        tried.append(MeshResult(shape, step_us, 0.0, nbytes, pipe=pipe))
        telling.tell(f"mesh {mesh}: {time_text(step_us)}")
        if best is None or step_us < best.plan.time.step_us:
            best = planned
    return best
