"""Commands that show plans: `report`, `explain`, `diff`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autopar.cli.common import ended_by_ctrl_c, progress, short_errors

PlanFile = Annotated[
    Path, typer.Argument(metavar="PLAN.json", help="A file that `autopar plan -o` wrote.")
]


def report(
    plan: PlanFile,
    html: Path | None = typer.Option(
        None, metavar="FILE.html", help="Write the report here, as one HTML page."
    ),
) -> None:
    """Show the report of a plan."""
    with short_errors(OSError):
        from autopar.cli.plan import print_report, write_html
        from autopar.plan import ShardingPlan

        loaded = ShardingPlan.load(plan)
        if html is not None:
            write_html(loaded, html, plan)
        print_report(loaded, plan)


def explain(
    plan: PlanFile,
    node: str = typer.Argument(
        ...,
        metavar="NODE",
        help="A parameter, a module, an operator by its name in the plan, or inputs.NAME. "
        "blocks.*.up stands for copies with the same choice.",
    ),
    model: Path | None = typer.Option(
        None, metavar="MODEL.py", help="The model.  [default: the file it was planned from]"
    ),
    alternatives: int = typer.Option(
        8,
        metavar="N",
        min=0,
        help="Number of alternatives to solve for, the most promising first; the others get "
        "a bound.",
    ),
    time_limit: float = typer.Option(
        60.0, metavar="SECONDS", help="For each alternative.", min=0.1
    ),
) -> None:
    """Say why a plan made a choice: what each alternative would cost.

    For each alternative it finds the best plan with that choice, and says what else changes.
    """
    with ended_by_ctrl_c(), progress() as say, short_errors(ValueError, OSError):
        from autopar.cli.inspect import explain_decision
        from autopar.plan import ShardingPlan

        loaded = ShardingPlan.load(plan)
        explanation = explain_decision(loaded, plan, node, model, alternatives, time_limit, say)
    from autopar.cli.inspect import print_explanation

    print_explanation(explanation)


def diff(
    first: Path = typer.Argument(..., metavar="A.json", help="A plan."),
    second: Path = typer.Argument(..., metavar="B.json", help="Another plan."),
    every: bool = typer.Option(
        False, "--all", help="Also list every operator, input and shared value."
    ),
) -> None:
    """Say how two plans differ: purpose, time, memory, modules, parameters."""
    with short_errors(OSError):
        from autopar.cli.inspect import print_difference
        from autopar.plan import ShardingPlan
        from autopar.planner.diff import diff

        print_difference(diff(ShardingPlan.load(first), ShardingPlan.load(second)), every)
