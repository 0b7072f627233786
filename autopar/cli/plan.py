"""What `autopar plan` and `autopar report` do between their options and their output."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from autopar.cli.model_file import Example
from autopar.cluster.cluster import NODE_SIZE, ClusterInfo, parse_bytes
from autopar.cluster.cluster import device as device_of
from autopar.files import write_atomically
from autopar.plan import Baseline, ParetoPoint, ShardingPlan
from autopar.planner.baselines import baseline_plans
from autopar.planner.joint import JointPlan, plan_jointly
from autopar.planner.mesh_search import search_meshes
from autopar.planner.pareto import pareto_front
from autopar.planner.planner import build_problem
from autopar.report.html import render_html
from autopar.report.text import WIDTH, render


def cluster_of(mesh: str | None, device: str, file: Path | None, named: bool) -> ClusterInfo:
    """The cluster that the options describe.

    Args:
        named: the device was asked for, and is not the default.

    Raises:
        ValueError: neither mesh nor file, or both, or the file is no cluster.
    """
    if file is None:
        if mesh is None:
            raise ValueError(
                "say what to plan for: --mesh 2x4, or --cluster cluster.yaml, or --devices 8"
            )
        return ClusterInfo.of(mesh, device)
    if mesh is not None or named:
        raise ValueError(f"{file} says mesh and device; leave out --mesh and --device")
    try:
        return ClusterInfo.load(file)
    except (TypeError, KeyError, yaml.YAMLError) as error:
        raise ValueError(f"{file} does not describe a cluster: {error}") from error


@dataclass(frozen=True)
class AnyMesh:
    """All meshes of so many devices, instead of one."""

    devices: int
    device: str
    per_node: int
    memory: str | None


@dataclass(frozen=True)
class Asked:
    """What is wanted of a plan besides where it runs.

    Args:
        optimizer_state: bytes per byte of parameter.
        constraints: layouts by name.
        baselines: also what people write by hand.
        front: also the fastest plans by budget.
        time_limit: seconds for each run of the solver.
        source: the model file.
        schedule: also what the step keeps, even where memory does not bind.
    """

    optimizer_state: float
    constraints: Mapping[str, str]
    baselines: bool
    front: bool
    time_limit: float
    source: str
    schedule: bool = False


def target_of(
    mesh: str | None,
    devices: int | None,
    per_node: int | None,
    device: str | None,
    file: Path | None,
    memory: str | None,
    default: str,
) -> ClusterInfo | AnyMesh:
    """What to plan for, from the options.

    Raises:
        ValueError: they contradict each other, or say too little.
    """
    auto = mesh == "auto" or (mesh is None and devices is not None)
    if auto and file is not None:
        raise ValueError(
            f"{file} has the links of one mesh; a search over meshes takes --devices and --device"
        )
    if auto and devices is None:
        raise ValueError("--mesh auto needs the number of devices: --devices 64")
    if not auto and (devices is not None or per_node is not None):
        raise ValueError(f"--devices and --per-node go with --mesh auto, not with {mesh or file}")
    if not auto:
        return cluster_of(mesh, device or default, file, device is not None).with_memory(memory)
    assert devices is not None
    name = device_of(device or default).name
    if memory is not None:
        parse_bytes(memory)
    return AnyMesh(devices, name, per_node or NODE_SIZE, memory)


def planned(
    example: Example,
    where: ClusterInfo | AnyMesh,
    asked: Asked,
    say: Callable[[str], None],
    trace: Path | None = None,
) -> ShardingPlan:
    """The plan, with what was asked for beside it.

    Args:
        trace: file for the predicted step.
    """
    pair = _found(example, where, asked, say)
    found = pair.planned
    if trace is not None and pair.memory is not None:
        pair.memory.timeline.save_trace(trace)
    baselines: tuple[Baseline, ...] = ()
    points: tuple[ParetoPoint, ...] = ()
    if asked.baselines:
        say("hand-written plans ...")
        experts = baseline_plans(found.space, time_limit=asked.time_limit)
        baselines = tuple(Baseline(e.name, e.time, e.memory, e.fits) for e in experts)
    if asked.front:
        points = pareto_front(
            found.space, time_limit=asked.time_limit, progress=say, mask=found.mask
        ).points
    return replace(found.plan, baselines=baselines, pareto_front=points, source=asked.source)


def _found(
    example: Example, where: ClusterInfo | AnyMesh, asked: Asked, say: Callable[[str], None]
) -> JointPlan:
    model, args, kwargs = example.model, example.args, example.kwargs
    if isinstance(where, AnyMesh):
        return JointPlan(search_meshes(
            model, args, kwargs, devices=where.devices, device=where.device,
            per_node=where.per_node, memory=where.memory, optimizer_state=asked.optimizer_state,
            constraints=asked.constraints, time_limit=asked.time_limit, progress=say,
        ).planned)  # fmt: skip
    problem = build_problem(
        model, args, kwargs, cluster=where, optimizer_state=asked.optimizer_state,
        constraints=asked.constraints, time_limit=asked.time_limit, progress=say,
    )  # fmt: skip
    if where.memory_bytes is None and not asked.schedule:
        return JointPlan(problem.planned(problem.decide()))
    return plan_jointly(problem, always=asked.schedule)


def write_html(found: ShardingPlan, path: Path) -> None:
    """The report as one page; whole or not at all."""
    write_atomically(path, render_html(found))


def print_report(found: ShardingPlan) -> None:
    """The report, as wide as the terminal."""
    terminal = sys.stdout.isatty()
    width = max(80, shutil.get_terminal_size((WIDTH, 24)).columns) if terminal else WIDTH
    sys.stdout.write(render(found, color=terminal, width=width))
