"""What `autopar plan` and `autopar report` do after their options are read."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from autopar.cli.common import DEFAULT_DEVICE, check_devices
from autopar.cli.model_file import Example
from autopar.cluster.cluster import NODE_SIZE, ClusterInfo, parse_bytes
from autopar.cluster.device import device as device_of
from autopar.compile import compile_first_rank, plan_batch, plan_step, plan_to_fit
from autopar.files import write_atomically
from autopar.plan import ShardingPlan
from autopar.plan_records import Baseline, ParetoPoint
from autopar.planner import pareto
from autopar.planner.baselines import MOST_BASELINES, baseline_plans
from autopar.planner.constraints import Constraints, load_constraints
from autopar.planner.joint import JointPlan
from autopar.planner.mesh_search import search_meshes
from autopar.planner.tensor_schemes import check_scheme
from autopar.progress import Deadline, Progress
from autopar.report.html import render_html
from autopar.report.pipeline import pipeline_trace
from autopar.report.text import render, terminal_width
from autopar.report.trace import trace_of

_BASELINES_SHARE = 1 / 8  # of the time limit: for all baselines, if planning has left less


@dataclass(frozen=True)
class AnyMesh:
    """All meshes of a number of devices, instead of one mesh."""

    devices: int
    device: str
    per_node: int
    memory: str | None


def target_of(
    mesh: str | None,
    devices: int | None,
    per_node: int | None,
    device: str | None,
    file: Path | None,
    memory: str | None,
) -> ClusterInfo | AnyMesh:
    """What to plan for, according to the options.

    Raises:
        ValueError: they contradict each other, or something is missing.
    """
    if mesh == "auto" or (mesh is None and devices is not None):
        if file is not None:
            raise ValueError(
                f"{file} has the links of one mesh; a search over meshes takes --devices and "
                "--device"
            )
        if devices is None:
            raise ValueError("--mesh auto needs the number of devices: --devices 64")
        if memory is not None:
            parse_bytes(memory)
        name = device_of(device or DEFAULT_DEVICE).name
        check_devices("--mesh auto", devices)
        return AnyMesh(devices, name, per_node or NODE_SIZE, memory)
    if devices is not None or per_node is not None:
        raise ValueError(f"--devices and --per-node go with --mesh auto, not with {mesh or file}")
    if file is not None:
        if mesh is not None or device is not None:
            raise ValueError(f"{file} says mesh and device; leave out --mesh and --device")
        with _reading(f"--cluster {file}", f"autopar cluster -o {file} writes one"):
            cluster = ClusterInfo.load(file).with_memory(memory)
        check_devices(f"mesh {cluster.mesh_text} of {file}", cluster.world_size)
        return cluster
    if mesh is None:
        raise ValueError(
            "say what to plan for: --mesh 2x4, or --cluster cluster.yaml, or --devices 8"
        )
    target = ClusterInfo.of(mesh, device or DEFAULT_DEVICE).with_memory(memory)
    check_devices(f"mesh {target.mesh_text}", target.world_size)
    return target


@contextmanager
def _reading(what: str, remedy: str) -> Iterator[None]:
    """Say which option's file cannot be read, and what to do.

    Raises:
        ValueError: it cannot.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{what}: not a text in UTF-8; {remedy}") from error
    except OSError as error:
        raise ValueError(f"{what}: {error.strerror}; {remedy}") from error


def refuse_for_forward(target: ClusterInfo | AnyMesh, given: Mapping[str, object]) -> None:
    """Refuse what a forward does not have.

    Args:
        given: options of training by name; None or the default of what was not given.

    Raises:
        ValueError: naming them.
    """
    if options := [f"--{name}" for name, value in given.items() if value not in (None, "exact")]:
        raise ValueError(f"--forward plans no training: leave out {' and '.join(options)}")
    if isinstance(target, ClusterInfo) and target.pipeline_ranks > 1:
        raise ValueError(
            f"--forward plans for meshes without an axis named pipe, and {target.mesh_text} has "
            f"{target.pipeline_ranks} pipeline stages: give the axis another name"
        )


def constraints_of(preset: str | None, file: Path | None) -> Constraints | str:
    """The constraints of a file, or the name of a preset.

    Raises:
        ValueError: both are given, or the file cannot be read.
        ConstraintError: there is no such preset, or the file has no constraints.
    """
    if preset is None:
        if file is None:
            return {}
        with _reading(f"--constraints {file}", f"--save-constraints {file} writes those of a plan"):
            return load_constraints(file)
    check_scheme(preset)
    if file is not None:
        raise ValueError(
            f"--preset {preset} and --constraints {file} both say what a plan must have; write the "
            "preset's constraints with --save-constraints, edit that file, and give it alone"
        )
    return preset


def make_folder(option: str, folder: Path) -> None:
    """Make the folder that an option names.

    Raises:
        ValueError: it cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"{option} {folder}: {error.strerror}; give a folder that can be made and written to"
        ) from error


def make_plan(
    example: Example,
    target: ClusterInfo | AnyMesh,
    progress: Progress,
    *,
    baselines: bool,
    pareto_front: bool,
    schedule: bool,
    trace: Path | None,
    dump_passes: Path | None,
    batch: Mapping[str, Any],
    known: JointPlan | None = None,
    **options: Any,
) -> ShardingPlan:
    """The plan, with what was requested beside it.

    Args:
        schedule: also schedule the step if everything fits the memory.
        batch: how the batch is split: `microbatches`, `microbatch`, `schedule`, `stages`.
        trace: file for the predicted step.
        dump_passes: folder for the first rank's graphs before and after each pass.
        known: the plan, if it was made before.
        options: of `build_problem` and `search_meshes`.
    """
    options["progress"] = progress
    deadline = Deadline(options["time_limit"])
    model, args, kwargs = example.model, example.args, example.kwargs
    if known is not None and (known.memory is not None or not schedule):
        joint = known
    elif isinstance(target, AnyMesh):
        options |= vars(target) | {"pipelines": not options["forward"]}
        joint = JointPlan(search_meshes(model, args, kwargs, **options))
    elif target.pipeline_ranks > 1 or (batch["microbatches"] or 1) > 1:
        return _plan_of_batch(example, target, batch, trace, options)
    elif batch["microbatches"] is not None or options["forward"]:
        joint = plan_step(model, args, kwargs, cluster=target, schedule=schedule, **options)
    else:
        joint = plan_to_fit(model, args, kwargs, cluster=target, schedule=schedule, **options)
    plan = joint.planned.plan
    if plan.microbatches > 1 and plan.pipeline is None:  # baselines have none
        return plan
    planned, time_limit = joint.planned, options["time_limit"]
    left = max(deadline.left, _BASELINES_SHARE * time_limit)
    if trace is not None and joint.memory is not None:
        write_atomically(trace, json.dumps(trace_of(joint.memory.timeline)) + "\n")
    if dump_passes is not None:
        on_gpu = planned.space.cluster.device.kind != "cpu"
        with progress.stage("passes") as stage:
            compile_first_rank(joint, dump_passes=dump_passes)
            stage.done = "wrote the passes" + (", without kernels of GPUs" if on_gpu else "")
    if planned.plan.pipeline is not None:  # its space is that of one microbatch
        return planned.plan
    rows: tuple[Baseline, ...] = ()
    points: tuple[ParetoPoint, ...] = ()
    if baselines:
        with progress.stage("baselines") as stage:
            plans = baseline_plans(planned.space, time_limit=left / MOST_BASELINES)
            rows = tuple(Baseline(b.name, b.time, b.memory) for b in plans)
            stage.done = f"planned {len(rows)} baselines"
    if pareto_front:
        points = pareto.pareto_front(
            planned.space, time_limit=time_limit, progress=progress, mask=planned.mask
        ).points
    return replace(planned.plan, baselines=rows, pareto_front=points)


def _plan_of_batch(
    example: Example, target: ClusterInfo, batch: Mapping[str, Any], trace: Path | None,
    options: Mapping[str, Any],
) -> ShardingPlan:  # fmt: skip
    """The plan of a step in microbatches. Baselines have none, and are left out."""
    plan = plan_batch(
        example.model, example.args, example.kwargs, cluster=target, **batch, **options
    ).plan
    if trace is not None and plan.pipeline is not None:
        write_atomically(trace, json.dumps(pipeline_trace(plan.pipeline)) + "\n")
    return plan


def write_constraints(plan: ShardingPlan, path: Path) -> None:
    """Write the constraints of a plan as `--constraints` reads them."""
    write_atomically(path, yaml.safe_dump(dict(plan.constraints), sort_keys=False))


def write_html(plan: ShardingPlan, path: Path, saved: Path | None = None) -> None:
    """Write the report as one page. On failure, a file that is already there does not change."""
    write_atomically(path, render_html(plan, _text(saved)))


def print_report(plan: ShardingPlan, saved: Path | None = None) -> None:
    """Print the report, as wide as the terminal."""
    text = render(plan, file=_text(saved), color=sys.stdout.isatty(), width=terminal_width())
    sys.stdout.write(text)


def _text(path: Path | None) -> str:
    return "" if path is None else path.as_posix()
