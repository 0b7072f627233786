"""What `autopar explain` and `autopar diff` do after their options are read."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from autopar.cli.model_library import FILE, Source, example_of
from autopar.cluster.cluster import ClusterInfo
from autopar.plan import ShardingPlan
from autopar.planner.diff import Difference
from autopar.planner.explain import Explanation, explain
from autopar.planner.planner import Planned, build_problem, captured, choices_of
from autopar.progress import Progress
from autopar.report.comparison import difference_tables, explanation_table
from autopar.report.text import render_tables, terminal_width
from autopar.tracer import ColoTracer
from autopar.units import mesh_text


def explain_decision(
    plan: ShardingPlan,
    path: Path,
    node: str,
    model: Path | None,
    alternatives: int,
    time_limit: float,
    progress: Progress,
) -> Explanation:
    """The alternatives of a decision of a saved plan.

    Raises:
        ValueError: there is no model file, or the plan has stages.
        PlanError: the file has another model.
    """
    if plan.pipeline is not None:
        raise ValueError(
            f"{path} has {len(plan.pipeline.stages)} pipeline stages, and explain compares plans "
            f"without stages: plan with --mesh {mesh_text(plan.mesh)} for the layouts of a stage"
        )
    source = str(model or _source(plan, path))
    with progress.stage("load model") as stage:
        example, _ = example_of(source, forward=plan.forward)
        stage.done = f"loaded {type(example.model).__name__}"
    with progress.stage("trace") as stage:
        tracer = ColoTracer(precision=plan.precision)
        graph = tracer.trace(example.model, example.args, example.kwargs)
        stage.done = captured(example.model, graph)
    plan.check(
        fingerprint=graph.fingerprint, mesh=plan.mesh, model=type(example.model).__name__,
        precision=plan.precision,
    )  # fmt: skip
    problem = build_problem(
        example.model, graph=graph, cluster=ClusterInfo.from_dict(plan.cluster),
        optimizer_state=plan.optimizer_state, constraints=plan.constraints, progress=progress,
        forward=plan.forward,
    )  # fmt: skip
    planned = Planned(plan, graph, problem.space, choices_of(problem.space, plan), problem.mask)
    return explain(planned, node, limit=alternatives, time_limit=time_limit, progress=progress)


def _source(plan: ShardingPlan, path: Path) -> str:
    """The model that the plan names: of a library, a file, or a file of that name beside the
    plan."""
    if not plan.source:
        raise ValueError(f"{path} was not planned from a model file; give it with --model MODEL.py")
    of = Source.of(plan.source)
    if of.library != FILE:
        return plan.source
    beside = path.parent / Path(of.name).name
    if not Path(of.name).is_file() and not beside.is_file():
        raise ValueError(
            f"{path} was planned from {of.name}, which is not there; give it with --model MODEL.py"
        )
    return str(of if Path(of.name).is_file() else replace(of, name=str(beside)))


def print_explanation(explanation: Explanation) -> None:
    """Print what was asked about, the plan's choice, and a table of the alternatives."""
    print(explanation.description)
    print(f"planned: {explanation.chosen.choice}")
    sys.stdout.write(render_tables([explanation_table(explanation)], width=terminal_width()))


def print_difference(difference: Difference, every: bool) -> None:
    """Print how two plans differ, with `every` single decisions too."""
    if difference:
        tables = difference_tables(difference, every=every)
        sys.stdout.write(render_tables(tables, width=terminal_width()))
    else:
        print("the plans do not differ")
