"""Commands about models and machines: `profile`, `cluster`, `devices`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

from autopar.cli.common import (
    DEFAULT_DEVICE,
    OPTIMIZERS,
    check_optimizer,
    ended_by_ctrl_c,
    progress,
    short_errors,
)
from autopar.files import check_writable


def profile(
    model: Path = typer.Argument(
        ..., metavar="MODEL.py", help="Defines build_model() and example_inputs()."
    ),
    depth: int | None = typer.Option(
        None, metavar="N", min=0, help="Show modules down to this depth.  [default: all]"
    ),
    formulas: bool = typer.Option(
        False, "--formulas", help="Also show formulas in batch and sequence."
    ),
    batch: int | None = typer.Option(None, metavar="N", min=1, help="Batch to profile at."),
    sequence: int | None = typer.Option(
        None, metavar="N", min=1, help="Sequence length to profile at."
    ),
    fit: str | None = typer.Option(
        None, metavar="SIZE", help="Find the largest batch for this memory, as 40GiB."
    ),
    optimizer: str = typer.Option(
        "adamw", help=f"Optimizer whose state is held: {', '.join(OPTIMIZERS)}."
    ),
    as_json: bool = typer.Option(
        False, "--json", help="Print the profile as JSON instead of the table."
    ),
) -> None:
    """Say what a training step computes, moves and holds, per module. Nothing is run.

    The step is that of one device, without sharding and recomputation. Formulas, --fit and other
    sizes than the example's need a model whose batch and sequence can be symbolic.
    """
    with ended_by_ctrl_c(), progress() as say, short_errors(ValueError, OSError):
        check_optimizer(optimizer)
        from autopar.cli.model_file import load_example
        from autopar.cluster.cluster import parse_bytes
        from autopar.planner.optimizer_state import named_state_ratio

        budget = None if fit is None else parse_bytes(fit)
        sizes = {"batch": batch, "sequence": sequence}
        changed = {name: size for name, size in sizes.items() if size is not None}
        with say.stage("load model") as stage:
            example = load_example(model)
            stage.done = f"loaded {type(example.model).__name__}"
        from autopar.cli.profile import profile_example, show

        say("trace and profile ...")
        dynamic = bool(formulas or changed or budget is not None)
        state = named_state_ratio(optimizer.lower(), example.model)
        profile = profile_example(example, dynamic=dynamic, optimizer_state=state)
        text = show(profile, depth, formulas, changed, budget, as_json)
    sys.stdout.write(text)


def cluster(
    mesh: str | None = typer.Option(
        None,
        metavar="SIZES",
        help="Device mesh whose links are measured: 8, 2x4, or node=2,gpu=4 with names.  "
        "[default: one device, or all processes of torchrun]",
    ),
    output: Path | None = typer.Option(
        None, "--output", "-o", metavar="FILE.yaml", help="Write it here, for plan --cluster."
    ),
    device: str | None = typer.Option(
        None, metavar="KIND", help="cpu or cuda.  [default: cuda if there is one]"
    ),
    quick: bool = typer.Option(False, "--quick", help="Fewer sizes and repetitions: some seconds."),
    thorough: bool = typer.Option(
        False, "--thorough", help="All sizes, three times: minutes, for a machine with other work."
    ),
) -> None:
    """Measure this machine in at most a minute: arithmetic, memory, launches, and the links of a
    mesh.

    On one host it starts the processes itself. On several hosts, run it under torchrun on each:
    torchrun ... --no-python autopar cluster --mesh 2x8 -o cluster.yaml.
    """
    with progress() as say, short_errors(ValueError, OSError):
        if output is not None and os.environ.get("RANK", "0") == "0":  # which writes it
            check_writable(output)
        from autopar.cli.cluster import measure

        if quick and thorough:
            raise ValueError("a measurement is --quick or --thorough, not both")
        level = "quick" if quick else "thorough" if thorough else "standard"
        measurement = measure(mesh, device, level, say)
    if measurement is None:  # rank 0 prints
        return
    with short_errors(OSError):
        from autopar.cli.cluster import print_measured, write_measured

        if output is not None:
            write_measured(measurement, output)
        print_measured(measurement, output)


def devices() -> None:
    """List the devices that plans can be made for."""
    from rich.console import Console
    from rich.table import Table

    from autopar.cluster.device import DEVICES

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
        f"Rates of large kernels, which are below the data sheet's. Default: {DEFAULT_DEVICE}."
    )
