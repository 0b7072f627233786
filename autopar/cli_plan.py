"""What `autopar plan` and `autopar report` do between their options and their output."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import yaml

from autopar.experts import expert_plans
from autopar.model_file import Example
from autopar.plan import Baseline, ShardingPlan, write_atomically
from autopar.planner import autoplan
from autopar.profiler.cluster import ClusterInfo
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
            raise ValueError("say what to plan for: --mesh 2x4, or --cluster cluster.yaml")
        return ClusterInfo.of(mesh, device)
    if mesh is not None or named:
        raise ValueError(f"{file} says mesh and device; leave out --mesh and --device")
    try:
        return ClusterInfo.load(file)
    except (TypeError, KeyError, yaml.YAMLError) as error:
        raise ValueError(f"{file} does not describe a cluster: {error}") from error


def planned(
    example: Example,
    info: ClusterInfo,
    optimizer_state: float,
    baselines: bool,
    time_limit: float,
    say: Callable[[str], None],
) -> ShardingPlan:
    """The plan, with what people write by hand beside it."""
    found = autoplan(
        example.model,
        example.args,
        example.kwargs,
        cluster=info,
        optimizer_state=optimizer_state,
        time_limit=time_limit,
        progress=say,
    )
    if not baselines:
        return found.plan
    say("hand-written plans ...")
    experts = expert_plans(found.space, time_limit=time_limit)
    return replace(
        found.plan,
        baselines=tuple(Baseline(e.name, e.time, e.memory, e.fits) for e in experts),
    )


def write_html(found: ShardingPlan, path: Path) -> None:
    """The report as one page; whole or not at all."""
    write_atomically(path, render_html(found))


def print_report(found: ShardingPlan) -> None:
    """The report, as wide as the terminal."""
    terminal = sys.stdout.isatty()
    width = max(80, shutil.get_terminal_size((WIDTH, 24)).columns) if terminal else WIDTH
    sys.stdout.write(render(found, color=terminal, width=width))
