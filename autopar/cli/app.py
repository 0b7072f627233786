"""The `autopar` command.

The commands import torch inside of their functions, so that `--help` is fast.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import typer

import autopar
from autopar.cli import inspect_commands, machine_commands, plan_commands, serve_command
from autopar.cli.common import progress, short_errors
from autopar.versions import torch_version

app = typer.Typer(
    name="autopar",
    help="Distribute a single-device PyTorch model: find the fastest plan for a device mesh.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

rules = typer.Typer(
    name="rules",
    help="The table of how operators may be split, and its proof.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

for command in (
    plan_commands.plan, inspect_commands.report, inspect_commands.explain, inspect_commands.diff,
    machine_commands.profile, machine_commands.cluster, machine_commands.devices,
    serve_command.serve,
):  # fmt: skip
    app.command()(command)
app.add_typer(rules)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"autopar {autopar.__version__}, torch {torch_version()}")
        raise typer.Exit


def _log_more(requested: bool) -> None:
    if requested:
        logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("autopar").setLevel(logging.DEBUG)


@app.callback()
def main(
    version: bool = typer.Option(
        False,
        "--version",
        callback=_print_version,
        is_eager=True,
        help="Print the versions of autopar and torch.",
    ),
    verbose: bool = typer.Option(
        False,
        "--verbose",
        "-v",
        callback=_log_more,
        help="Also log what the stages do, on stderr.",
    ),
) -> None:
    pass


@rules.command("check")
def rules_check(
    op: str | None = typer.Option(
        None, metavar="NAME", help="An op, or a part of its name.  [all]"
    ),
    cases: int = typer.Option(10_000, metavar="N", min=1, help="Number of cases."),
    seed: int = typer.Option(0, metavar="S", help="Seed of the random cases."),
    jobs: int = typer.Option(1, metavar="J", min=1, help="Number of processes."),
    discover: bool = typer.Option(
        False, "--discover", help="Look for correct strategies that rules lack."
    ),
    record: Path | None = typer.Option(
        None, metavar="FILE", help="Enter the outcome into this file."
    ),
) -> None:
    """Prove rules: run ops on random shards, rank by rank, and compare with the op itself.

    Results and gradients are compared. The exit code is 1 if a rule is wrong.
    """
    with progress() as say, short_errors(ValueError):
        from autopar.cli.rules import checked, discovered, print_checked
        from autopar.testing.rules.record import save

        text = discovered(op, seed, jobs, say) if discover else ""
        reports = [] if discover else checked(op, cases, seed, jobs, say)
    if discover:
        sys.stdout.write(text)
        return
    print_checked(reports)
    if record is not None:
        with short_errors(OSError, ValueError):
            save(reports, record)
    if any(report.failed for report in reports):
        raise typer.Exit(1)


@rules.command("list")
def rules_list(
    op: str | None = typer.Option(
        None, metavar="PATTERN", help="An op, or a part of its name.  [all]"
    ),
    record: Path | None = typer.Option(
        None, metavar="FILE", help="Show what this file, by check --record, says is proved."
    ),
) -> None:
    """Print the table: how each operator may be split."""
    with short_errors(OSError, ValueError):
        from autopar.cli.rules import print_rules

        print_rules(op, record)
