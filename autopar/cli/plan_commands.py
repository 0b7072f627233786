"""The command that makes plans: `plan`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from autopar.cli.common import (
    DEFAULT_DEVICE,
    OPTIMIZERS,
    check_optimizer,
    ended_by_ctrl_c,
    progress,
    short_errors,
)
from autopar.progress import TIME_LIMIT


def plan(
    model: str = typer.Argument(
        ...,
        metavar="MODEL",
        help="A Python file that defines build_model() and example_inputs(), which returns keyword "
        "arguments (dict), positional ones (tuple), or (args, kwargs). Or a configuration of "
        "transformers (hf:config.json, a folder, or an id), or a model of timm "
        "(timm:vit_large_patch16_224).",
    ),
    batch: int | None = typer.Option(
        None,
        metavar="N",
        min=1,
        help="Samples in a batch of hf: and timm: models, or of a file whose example_inputs takes "
        "batch.  [default: 8, or the file's]",
    ),
    sequence: int | None = typer.Option(
        None,
        metavar="N",
        min=1,
        help="Tokens in a sequence of hf: models, or of a file whose example_inputs takes "
        "sequence.  [default: as the model allows, at most 8192]",
    ),
    mesh: str | None = typer.Option(
        None,
        metavar="SIZES",
        help="Device mesh: 8, 2x4, or node=2,gpu=4 with names. The last axis has the fastest "
        "links. An axis named pipe holds pipeline stages. With auto, all meshes of --devices in up "
        "to three axes are compared.",
    ),
    devices: int | None = typer.Option(
        None, metavar="N", min=1, help="Number of devices for --mesh auto."
    ),
    per_node: int | None = typer.Option(
        None, metavar="N", min=1, help="Devices per node for --mesh auto.  [default: 8]"
    ),
    device: str | None = typer.Option(
        None,
        metavar="NAME",
        help=f"A device that `autopar devices` lists.  [default: {DEFAULT_DEVICE}]",
    ),
    cluster: Path | None = typer.Option(
        None,
        metavar="FILE.yaml",
        help="A file with mesh, device and links, instead of --mesh and --device.",
    ),
    memory: str | None = typer.Option(
        None,
        metavar="SIZE",
        help="Budget per device: 20GiB, 512MB, or a share of the device's memory such as 0.8.  "
        "[default: all of it]",
    ),
    precision: str | None = typer.Option(
        None,
        metavar="DTYPE",
        help="Compute and gather in bf16 or fp16, with parameters, their optimizer state and the "
        "sums of gradients in float32.  [default: the model's dtypes]",
    ),
    forward: bool = typer.Option(
        False,
        "--forward",
        help="Plan for inference: the model in evaluation mode, without labels, gradients and "
        "optimizer, as auto_engine(model, None, mesh) does.",
    ),
    optimizer: str | None = typer.Option(
        None,
        metavar="NAME",
        help=f"Optimizer whose state is held: {', '.join(OPTIMIZERS)}.  [default: adamw]",
    ),
    microbatches: int | None = typer.Option(
        None,
        metavar="N",
        min=1,
        help="Process the batch in N slices, one after another, with the gradients of the whole "
        "batch.  [default: 1; with pipeline stages the fastest number]",
    ),
    microbatch: str = typer.Option(
        "exact",
        metavar="HOW",
        help="exact refuses a model that mixes samples (BatchNorm); independent takes each "
        "microbatch as a batch of its own.",
    ),
    schedule: str | None = typer.Option(
        None,
        metavar="NAME",
        help="Order in which pipeline stages run (the mesh axis named pipe): gpipe, 1f1b, "
        "interleaved, zb-h1, zbv, dualpipev, or a CSV file of actions with a row per rank.  "
        "[default: the fastest]",
    ),
    stages: str | None = typer.Option(
        None,
        metavar="NAMES",
        help="Modules or operators at which the second and later pipeline stages begin, such as "
        "h.4,h.8.  [default: the fastest]",
    ),
    constraints: Path | None = typer.Option(
        None,
        metavar="FILE.yaml",
        help="Layouts that the plan must have, one per line, such as "
        "'blocks.*.up.weight: S0R', 'inputs.x: S0R' or 'outputs.0: RR'.",
    ),
    preset: str | None = typer.Option(
        None,
        metavar="NAME",
        help="A published scheme of tensor parallelism, as constraints that the report lists: "
        "tp1d, tp2d, tp2.5d or tp3d.",
    ),
    save_constraints: Path | None = typer.Option(
        None,
        metavar="FILE.yaml",
        help="Write the constraints of the plan here, to edit them and give them with "
        "--constraints.",
    ),
    output: Path | None = typer.Option(
        None, "--output", "-o", metavar="PLAN.json", help="Write the plan here, for auto_engine."
    ),
    report: Path | None = typer.Option(
        None, metavar="FILE.html", help="Write the report here, as one HTML page."
    ),
    trace: Path | None = typer.Option(
        None,
        metavar="FILE.json",
        help="Write the predicted step here, operator by operator, for ui.perfetto.dev.",
    ),
    dump_passes: Path | None = typer.Option(
        None,
        metavar="DIR",
        help="Write the first rank's graphs here, before and after each pass; for GPUs without "
        "their kernels.",
    ),
    as_json: bool = typer.Option(
        False, "--json", help="Print the plan as JSON instead of the report."
    ),
    baselines: bool = typer.Option(True, help="Compare with standard plans: DDP, FSDP, Megatron."),
    pareto_front: bool = typer.Option(
        False,
        "--pareto-front",
        "--front",
        help="Also find the fastest plans within 12 budgets, from no limit to the smallest "
        "feasible one.",
    ),
    find: str | None = typer.Option(
        None,
        metavar="QUESTION",
        help="Plan for the largest-batch that a step processes at once, the longest-sequence, or "
        "the fewest-devices (1, 2, 4, ... up to --devices) that fit, each to within a sixteenth.",
    ),
    time_limit: float = typer.Option(
        TIME_LIMIT,
        metavar="SECONDS",
        help="Of processor time, for all of planning: the best plan known then is given with its "
        "gap. As much again for the Pareto front.",
        min=0.1,
    ),
) -> None:
    """Find the fastest plan of a training step that fits the memory, or with --forward of a
    forward. It needs no GPU and no weights.

    The report goes to stdout, progress to stderr. The exit code is 1 if nothing fits the memory or
    the model cannot be captured, and 2 if the input is wrong.
    """
    with ended_by_ctrl_c(), progress() as say:
        with short_errors(ValueError, OSError):
            name = (optimizer or "adamw").lower()
            check_optimizer(name)
            from autopar.cli import find as questions
            from autopar.cli.model_library import example_of
            from autopar.cli.plan import (
                constraints_of,
                make_folder,
                make_plan,
                print_report,
                refuse_for_forward,
                target_of,
                write_constraints,
                write_html,
            )
            from autopar.cluster.cluster import ClusterInfo
            from autopar.files import check_writable
            from autopar.ir.precision import Precision
            from autopar.plan_records import TriedSize
            from autopar.planner.optimizer_state import named_state_ratio, named_step_tiers
            from autopar.planner.stages import PipelineOptions

            if microbatch not in ("exact", "independent"):
                raise ValueError(f"--microbatch is exact or independent, not {microbatch!r}")
            policy = Precision.of(precision)
            where = (mesh, devices, per_node, device, cluster, memory)
            target = questions.target_for(find, *where) if find else target_of(*where)
            if forward:
                training = {
                    "optimizer": optimizer, "microbatches": microbatches,
                    "microbatch": microbatch, "schedule": schedule, "stages": stages,
                }  # fmt: skip
                refuse_for_forward(target, training)
            if find and (microbatches or schedule or stages):
                raise ValueError("--find chooses microbatches itself, and has no stages")
            if trace is not None and not isinstance(target, ClusterInfo):
                raise ValueError("--trace shows the step on one mesh: give it with --mesh")
            if not isinstance(target, ClusterInfo) and (microbatches or schedule or stages):
                raise ValueError(
                    "--microbatches, --schedule and --stages are of one mesh: give it with --mesh"
                )
            if isinstance(target, ClusterInfo):
                PipelineOptions.of(target, schedule, stages)
            for path in (output, save_constraints, report, trace):
                if path is not None:
                    check_writable(path)
            if dump_passes is not None:
                make_folder("--dump-passes", dump_passes)
            options: dict[str, Any] = {
                "constraints": constraints_of(preset, constraints),
                "time_limit": time_limit,
                "precision": policy,
                "forward": forward,
            }
            sizes = {"batch": batch, "sequence": sequence}
            with say.stage("load model") as stage:
                example, source = example_of(model, forward=forward, **sizes)
                stage.done = f"loaded {type(example.model).__name__}"
            options["optimizer_state"] = named_state_ratio(name, example.model)
            options["steps_on"] = named_step_tiers(name)
        known, tried = None, tuple[TriedSize, ...]()
        if find:
            with short_errors(ValueError):
                answer = questions.find(find, model, target, sizes, say, **options)
                sizes, target, tried = answer.sizes, answer.target, answer.tried
                example, source = example_of(model, forward=forward, **sizes)
                known, microbatches = answer.joint, 1 if find == "largest-batch" else None
        with short_errors():
            result = make_plan(
                example, target, say, baselines=baselines, pareto_front=pareto_front,
                schedule=report is not None or trace is not None, trace=trace,
                dump_passes=dump_passes, batch={
                    "microbatches": microbatches, "microbatch": microbatch, "schedule": schedule,
                    "stages": stages,
                }, known=known, **options,
            )  # fmt: skip
            result = replace(result, source=source, sizes=tried)
    with short_errors(OSError):
        if output is not None:
            result.save(output)
        if save_constraints is not None:
            write_constraints(result, save_constraints)
        if report is not None:
            write_html(result, report, output)
        if as_json:
            sys.stdout.write(result.to_json() + "\n")
        else:
            print_report(result, output)
