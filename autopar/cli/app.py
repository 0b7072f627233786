"""The command line: `autopar plan`, `report`, `explain`, `diff`, `profile`, `cluster`, `devices`
and `rules`.

torch is imported inside of the commands, so that `--help` does not wait for it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

DEFAULT_DEVICE = "A100-80G"

# of `autopar.planner.optimizer_state`, which takes seconds to import
OPTIMIZERS = ("adamw", "adam", "adafactor", "momentum", "sgd")

app = typer.Typer(
    name="autopar",
    help="Plan how to lay a single-device PyTorch model out over a device mesh.",
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
app.add_typer(rules)


@app.command()
def plan(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL.py",
            help="Python file that defines build_model() and example_inputs(); the latter returns "
            "keyword arguments (dict), positional ones (tuple), or (args, kwargs).",
        ),
    ],
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES",
            help="Device mesh, such as 8 or 2x4; the last axis has the fastest links. "
            "With auto, the mesh is searched for: all of --devices in up to three axes.",
        ),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="How many, for --mesh auto.")
    ] = None,
    per_node: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Devices that fast links join, for --mesh auto.  [default: 8]"
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"One of those that `autopar devices` lists.  [default: {DEFAULT_DEVICE}]",
        ),
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml", help="Mesh, device and links, instead of --mesh and --device."
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Budget per device: 20GiB, 512MB, or a share of the device such as 0.8.  "
            "[default: all of it]",
        ),
    ] = None,
    optimizer: Annotated[
        str,
        typer.Option(
            metavar="NAME", help=f"Whose state to make room for: {', '.join(OPTIMIZERS)}."
        ),
    ] = "adamw",
    constraints: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Layouts to keep to, a line each, such as 'blocks.*.up.weight: S0R', "
            "'inputs.x: S0R' or 'outputs.0: RR'.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="PLAN.json", help="Write the plan here, for auto_engine."
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write the report here, as one HTML page."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Write the predicted step here, operator by operator, for ui.perfetto.dev.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan as JSON instead of the report.")
    ] = False,
    baselines: Annotated[
        bool, typer.Option(help="Cost the plans people write by hand, for comparison.")
    ] = True,
    front: Annotated[
        bool,
        typer.Option(
            "--front",
            help="Also the fastest plans within 12 budgets, from none to the smallest feasible.",
        ),
    ] = False,
    time_limit: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="For each run of the solver; the best plan so far is taken, with its gap.",
            min=0.1,
        ),
    ] = 60.0,
) -> None:
    """Find the fastest plan that fits the memory; needs no GPU and no weights.

    The report goes to stdout, progress to stderr. Exit code 1: nothing fits the memory, or the
    model cannot be captured; 2: the input is wrong.
    """
    # what the model file prints is not the plan
    with _progress() as say, contextlib.redirect_stdout(sys.stderr):
        with _short_errors(ValueError, OSError):
            _check_optimizer(optimizer)
            from autopar.cli.model_file import load_example
            from autopar.cli.plan import Asked, planned, print_report, target_of, write_html
            from autopar.cluster.cluster import ClusterInfo
            from autopar.planner.constraints import load_constraints
            from autopar.planner.optimizer_state import named_state_ratio

            where = target_of(mesh, devices, per_node, device, cluster, memory, DEFAULT_DEVICE)
            if trace is not None and not isinstance(where, ClusterInfo):
                raise ValueError("--trace shows the step on one mesh: give it with --mesh")
            wanted = {} if constraints is None else load_constraints(constraints)
            say("load model ...")
            example = load_example(model)
            state = named_state_ratio(optimizer.lower(), example.model)
        with _short_errors():
            shown = report is not None or trace is not None
            asked = Asked(state, wanted, baselines, front, time_limit, str(model), shown)
            found = planned(example, where, asked, say, trace)
    with _short_errors(OSError):
        if output is not None:
            found.save(output)
        if report is not None:
            write_html(found, report)
        if as_json:
            sys.stdout.write(found.to_json() + "\n")
        else:
            print_report(found)


@app.command("report")
def report_command(
    plan: Annotated[
        Path, typer.Argument(metavar="PLAN.json", help="File that `autopar plan -o` wrote.")
    ],
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write the report here, as one HTML page."),
    ] = None,
) -> None:
    """Show a plan again."""
    with _short_errors(OSError):
        from autopar.plan import ShardingPlan

        found = ShardingPlan.load(plan)
        from autopar.cli.plan import print_report, write_html

        if html is not None:
            write_html(found, html)
        print_report(found)


@app.command("explain")
def explain_command(
    plan: Annotated[
        Path, typer.Argument(metavar="PLAN.json", help="File that `autopar plan -o` wrote.")
    ],
    node: Annotated[
        str,
        typer.Argument(
            metavar="NODE",
            help="A parameter, a module, an operator as plans name it, or inputs.NAME; "
            "blocks.*.up stands for copies that do alike.",
        ),
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL.py", help="The model.  [default: the file it was planned from]"
        ),
    ] = None,
    alternatives: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Solve for so many, the most promising; the others get a bound.",
        ),
    ] = 8,
    time_limit: Annotated[
        float, typer.Option(metavar="SECONDS", help="For each alternative.", min=0.1)
    ] = 60.0,
) -> None:
    """Say why a plan chose this strategy and not that one: what each alternative would cost.

    Per alternative the best plan in which it is forced, and what else changes then.
    """
    with (
        _progress() as say,
        contextlib.redirect_stdout(sys.stderr),
        _short_errors(ValueError, OSError),
    ):
        from autopar.cli.inspect import explained
        from autopar.plan import ShardingPlan

        given = ShardingPlan.load(plan)
        found = explained(given, plan, node, model, alternatives, time_limit, say)
    from autopar.cli.inspect import print_explanation

    print_explanation(found)


@app.command("diff")
def diff_command(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="A plan.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Another one.")],
    every: Annotated[
        bool, typer.Option("--all", help="Also every operator, input and shared value.")
    ] = False,
) -> None:
    """Say what differs between two plans: purpose, time, memory, modules, parameters."""
    with _short_errors(OSError):
        from autopar.cli.inspect import print_difference
        from autopar.plan import ShardingPlan
        from autopar.planner.diff import diff

        print_difference(diff(ShardingPlan.load(first), ShardingPlan.load(second)), every)


@app.command("profile")
def profile_command(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL.py", help="Defines build_model() and example_inputs()."),
    ],
    depth: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Modules down to this depth.  [default: all]"),
    ] = None,
    formulas: Annotated[
        bool, typer.Option("--formulas", help="Also as formulas in batch and sequence.")
    ] = False,
    batch: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Batch to profile at.")
    ] = None,
    sequence: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Sequence length to profile at.")
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="How large a batch fits into this memory, as 40GiB."),
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help=f"Optimizer whose state is held: {', '.join(OPTIMIZERS)}.")
    ] = "adamw",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as JSON instead of the table.")
    ] = False,
) -> None:
    """Say what one training step computes, moves and holds, by module; nothing is run.

    On one device, without sharding and recomputation. Sizes other than the example's, formulas and
    --fit need a model whose batch and sequence can stay symbolic.
    """
    with (
        _progress() as say,
        contextlib.redirect_stdout(sys.stderr),
        _short_errors(ValueError, OSError),
    ):
        _check_optimizer(optimizer)
        from autopar.cli.model_file import load_example
        from autopar.cluster.cluster import parse_bytes
        from autopar.planner.optimizer_state import named_state_ratio

        budget = None if fit is None else parse_bytes(fit)
        sizes = {"batch": batch, "sequence": sequence}
        given = {name: size for name, size in sizes.items() if size is not None}
        say("load model ...")
        example = load_example(model)
        from autopar.cli.profile import profiled, show

        say("trace and profile ...")
        dynamic = bool(formulas or given or budget is not None)
        state = named_state_ratio(optimizer.lower(), example.model)
        found = profiled(example, dynamic=dynamic, optimizer_state=state)
        text = show(found, depth, formulas, given, budget, as_json)
    sys.stdout.write(text)


@app.command("cluster")
def cluster_command(
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES",
            help="Device mesh to measure the links of, such as 8 or 2x4.  "
            "[default: this device alone, or all of torchrun's processes]",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE.yaml", help="Write it here, for plan --cluster."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="cpu or cuda.  [default: cuda where there is one]"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer sizes and repetitions; seconds, not minutes.")
    ] = False,
) -> None:
    """Measure this machine: arithmetic, memory, launches, and the links of a mesh.

    On a mesh of CPUs it starts the processes itself, on GPUs of one host too; on several hosts run
    it under torchrun on each: torchrun ... --no-python autopar cluster --mesh 2x8 -o cluster.yaml.
    """
    with _progress() as say, contextlib.redirect_stdout(sys.stderr), _short_errors(ValueError):
        from autopar.cli.cluster import measured

        found = measured(mesh, device, quick, say)
    if found is None:  # rank 0 tells
        return
    with _short_errors(OSError):
        from autopar.cli.cluster import print_measured, write_measured

        if output is not None:
            write_measured(found, output)
        print_measured(found, output)


@app.command()
def devices() -> None:
    """List the devices that plans can be made for."""
    from rich.console import Console
    from rich.table import Table

    from autopar.cluster.cluster import DEVICES

    table = Table(box=None, pad_edge=False)
    table.add_column("device", no_wrap=True)
    for column in ("GiB", "GB/s", "TFLOP/s float32", "bfloat16", "float64"):
        table.add_column(column, justify="right", no_wrap=True)
    for d in DEVICES.values():
        rates = (d.flops_per_s(dtype) for dtype in ("float32", "bfloat16", "float64"))
        table.add_row(
            d.name,
            f"{d.memory_bytes / 2**30:.0f}",
            f"{d.bandwidth / 1e9:.0f}",
            *(f"{rate / 1e12:.4g}" for rate in rates),
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"Rates as large kernels reach them, below the data sheet's. Default: {DEFAULT_DEVICE}."
    )


@rules.command("check")
def rules_check(
    op: Annotated[
        str | None, typer.Option(metavar="NAME", help="An op, or a part of its name.  [all]")
    ] = None,
    cases: Annotated[int, typer.Option(metavar="N", min=1, help="Cases in all.")] = 10_000,
    seed: Annotated[int, typer.Option(metavar="S", help="The same cases for the same seed.")] = 0,
    jobs: Annotated[int, typer.Option(metavar="J", min=1, help="Processes.")] = 1,
    discover: Annotated[
        bool, typer.Option("--discover", help="Look for right strategies that rules leave out.")
    ] = False,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Enter the outcome into this file.")
    ] = None,
) -> None:
    """Prove rules: ops on random shards, rank by rank, forward and gradient, against the op itself.

    Exit code 1: some rule is wrong.
    """
    with _progress() as say, contextlib.redirect_stdout(sys.stderr), _short_errors(ValueError):
        if discover:
            from autopar.cli.rules import discovered

            text = discovered(op, seed, jobs, say)
        else:
            from autopar.cli.rules import checked

            reports = checked(op, cases, seed, jobs, say)
    if discover:
        sys.stdout.write(text)
        return
    from autopar.cli.rules import print_checked
    from autopar.testing.rules.record import save

    print_checked(reports)
    if record is not None:
        with _short_errors(OSError, ValueError):
            save(reports, record)
    if any(report.failed for report in reports):
        raise typer.Exit(1)


@rules.command("list")
def rules_list(
    op: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="An op, or a part of its name.  [all]")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Show what this file, by check --record, says is proved."
        ),
    ] = None,
) -> None:
    """Print the table: how each operator may be split."""
    with _short_errors(OSError, ValueError):
        from autopar.cli.rules import print_rules

        print_rules(op, record)


# -- steps --------------------------------------------------------------------------------------


def _check_optimizer(optimizer: str) -> None:
    if optimizer.lower() not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}; known: {', '.join(OPTIMIZERS)}")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A spinner with the current stage on a terminal, else a line per stage; on stderr."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda line: console.print(line, markup=False, soft_wrap=True)
        return
    with console.status("autopar ...") as status:
        yield lambda line: status.update(line)


@contextlib.contextmanager
def _short_errors(*also: type[Exception]) -> Iterator[None]:
    """Errors that a user can act upon, as a message and an exit code instead of a traceback."""
    from autopar.errors import AutoparError, CaptureError, InfeasibleError

    refused: tuple[type[Exception], ...] = (AutoparError, *also)
    try:
        yield
    except (CaptureError, InfeasibleError) as error:
        _fail(error, 1)
    except refused as error:
        _fail(error, 2)


def _fail(error: Exception, code: int) -> NoReturn:
    print(f"autopar: {error}", file=sys.stderr)
    raise typer.Exit(code) from error
