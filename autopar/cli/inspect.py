"""What `autopar explain` and `autopar diff` do between their options and their output."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from autopar.cli.model_file import load_example
from autopar.cluster.cluster import ClusterInfo
from autopar.plan import ShardingPlan
from autopar.planner.decisions import Workload
from autopar.planner.diff import Difference
from autopar.planner.explain import Explanation, explain
from autopar.planner.planner import Planned, build_space, choices_of, trainable_inputs
from autopar.report.comparison import difference_tables, explanation_table
from autopar.report.text import WIDTH, draw
from autopar.tracer import ColoTracer


def explained(
    plan: ShardingPlan,
    path: Path,
    node: str,
    model: Path | None,
    alternatives: int,
    time_limit: float,
    say: Callable[[str], None],
) -> Explanation:
    """The alternatives of a decision of a saved plan.

    Raises:
        ValueError: no model file, or one of another model.
    """
    source = model or _source(plan, path)
    say("load model ...")
    example = load_example(source)
    say("trace ...")
    graph = ColoTracer().trace(example.model, example.args, example.kwargs)
    plan.check(fingerprint=graph.fingerprint, mesh=plan.mesh, model=type(example.model).__name__)
    say("strategies and costs ...")
    cluster = ClusterInfo.from_dict(plan.cluster)
    workload = Workload(trainable_inputs(graph, example.model), plan.optimizer_state)
    space, mask = build_space(graph, cluster, workload, plan.constraints)
    planned = Planned(plan, graph, space, choices_of(space, plan), mask)
    return explain(planned, node, limit=alternatives, time_limit=time_limit, progress=say)


def _source(plan: ShardingPlan, path: Path) -> Path:
    """The model file that the plan names; beside the plan, if it is not where it was."""
    if not plan.source:
        raise ValueError(f"{path} was not planned from a model file; give it with --model MODEL.py")
    given = Path(plan.source)
    beside = path.parent / given.name
    if not given.is_file() and not beside.is_file():
        raise ValueError(
            f"{path} was planned from {given}, which is not there; give it with --model MODEL.py"
        )
    return given if given.is_file() else beside


def print_explanation(found: Explanation) -> None:
    print(found.what)
    print(f"planned: {found.chosen.choice}")
    _print(draw([explanation_table(found)], width=_width()))


def print_difference(found: Difference, every: bool) -> None:
    """Nothing but a sentence where the plans are the same."""
    if not found:
        print("the plans do not differ")
        return
    _print(draw(difference_tables(found, every=every), width=_width()))


def _print(text: str) -> None:
    sys.stdout.write(text)


def _width() -> int:
    terminal = sys.stdout.isatty()
    return max(80, shutil.get_terminal_size((WIDTH, 24)).columns) if terminal else WIDTH
