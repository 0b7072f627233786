"""What `autopar profile` does after its options are read."""

from __future__ import annotations

import io
import json
import operator
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import sympy
import torch
from rich.console import Console
from rich.table import Table
from torch.utils import _pytree as pytree

from autopar.cli.model_file import Example
from autopar.ir.repeats import pattern
from autopar.planner.planner import trainable_inputs
from autopar.profiler.model import (
    ModelProfile,
    example_sizes,
    largest,
    profile_model,
    substitute,
)
from autopar.profiler.modules import ModuleRow
from autopar.profiler.tape import Count
from autopar.report.text import terminal_width
from autopar.tracer import ColoTracer
from autopar.units import bytes_text, count_text, flops_text


@dataclass(frozen=True)
class Profiled:
    """A model's profile, and the memory that the step does not make itself.

    Args:
        profile: formulas if sizes are dynamic, else numbers.
        example: sizes of the example batch, by name.
        state_bytes: parameters, buffers and optimizer state.
        input_bytes: the example batch.
    """

    profile: ModelProfile
    example: Mapping[str, int]
    state_bytes: int
    input_bytes: int


def profile_example(example: Example, *, dynamic: bool, optimizer_state: float) -> Profiled:
    """Trace and profile a model file's model.

    Raises:
        CaptureError: the model cannot be captured.
        ValueError: two of the example's sizes are equal, so that formulas would confuse them.
    """
    model = example.model
    graph = ColoTracer(dynamic=dynamic).trace(model, example.args, example.kwargs)
    profile = profile_model(graph, trainable_inputs(graph, model), symbolic=dynamic)
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    inputs = [x for x in pytree.tree_leaves((example.args, example.kwargs)) if torch.is_tensor(x)]
    return Profiled(
        profile,
        example_sizes(graph) if dynamic else {},
        held + int(optimizer_state * trainable),
        sum(x.numel() * x.element_size() for x in inputs),
    )


def show(
    profiled: Profiled,
    depth: int | None,
    formulas: bool,
    sizes: Mapping[str, int],
    budget_bytes: float | None,
    as_json: bool,
) -> str:
    """The command's output.

    Args:
        sizes: dynamic sizes; those of the example stand for missing ones.
        budget_bytes: also find the largest batch whose step fits it, with parameters, optimizer
            state and inputs.

    Raises:
        ValueError: a size is not dynamic in this model.
    """
    for name in (*sizes, *(["batch"] if budget_bytes is not None else [])):
        if name not in profiled.example:
            raise ValueError(
                f"the model's {name} is not a dynamic size; there are {sorted(profiled.example)}"
            )
    at = {**profiled.example, **sizes}
    others = {name: size for name, size in at.items() if name != "batch"}
    numbers = substitute(profiled.profile, at) if at else profiled.profile
    batch = 0
    if budget_bytes is not None and budget_bytes > profiled.state_bytes:
        per_sample = profiled.input_bytes / profiled.example["batch"]
        budget = budget_bytes - profiled.state_bytes
        batch = largest(profiled.profile, "batch", budget, others, input_bytes=per_sample)
    if as_json:
        rows = _as_rows(profiled, numbers, at)
        if budget_bytes is not None:
            rows["largest_batch"] = batch
        return json.dumps(rows, indent=1) + "\n"
    text = io.StringIO()
    terminal = sys.stdout.isatty()
    console = Console(file=text, width=terminal_width(), force_terminal=terminal, highlight=False)
    _print_profile(profiled, numbers, at, console, depth)
    if formulas:
        _print_formulas(profiled, numbers, console, depth)
    if budget_bytes is not None:
        where = f" at {_sizes_text(others)}" if others else ""
        console.print(f"fits        batch {batch} in {bytes_text(budget_bytes)}{where}")
    return text.getvalue()


def _sizes_text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _print_profile(
    profiled: Profiled,
    numbers: ModelProfile,
    sizes: Mapping[str, int],
    console: Console,
    depth: int | None,
) -> None:
    """Print the table by module and the totals."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("module", no_wrap=True)
    for column in ("copies", "parameters", "forward", "backward", "read + written", "saved"):
        table.add_column(column, justify="right", no_wrap=True)
    for path, copies, row in _grouped(numbers.modules(), depth):
        moved = sum(w.read_bytes + w.written_bytes for w in (row.forward, row.backward))
        table.add_row(
            path or "(model)", str(copies) if copies > 1 else "",
            count_text(row.parameters) if row.parameters else "", _nonzero(row.forward.flops),
            _nonzero(row.backward.flops), bytes_text(moved),
            bytes_text(row.saved_bytes) if row.saved_bytes else "",
        )  # fmt: skip
    console.print(table)
    console.print()
    if sizes:
        console.print(f"at {_sizes_text(sizes)}")
    console.print(f"step        {flops_text(numbers.flops)}, forward and backward")
    console.print(f"saved       {bytes_text(numbers.saved_bytes)} for backward")
    console.print(f"peak        {bytes_text(numbers.peak_bytes)} made during the step")
    state = bytes_text(profiled.state_bytes)
    console.print(f"held        {state} of parameters, buffers, optimizer state")


def _print_formulas(
    profiled: Profiled, numbers: ModelProfile, console: Console, depth: int | None
) -> None:
    console.print()
    for path, copies, row in _grouped(profiled.profile.modules(), depth):
        times = f" x {copies}" if copies > 1 else ""
        console.print(f"[bold]{path or '(model)'}{times}[/bold]")
        for name, count in (
            ("forward FLOPs", row.forward.flops),
            ("backward FLOPs", row.backward.flops),
            ("saved bytes", row.saved_bytes),
        ):
            if count:
                console.print(f"  {name:15} {_formula(count)}", soft_wrap=True)
    live = numbers.timeline.live_bytes
    peak = max(range(len(live)), key=lambda i: live[i])
    change = numbers.timeline.changes[peak]
    console.print(f"[bold]peak[/bold], at these sizes in the {change.phase} of {change.node}")
    console.print(f"  {'bytes':15} {_formula(profiled.profile.timeline.live_bytes[peak])}")


def _grouped(rows: list[ModuleRow], depth: int | None) -> list[tuple[str, int, ModuleRow]]:
    """Per pattern of module names: the number of copies, and their sum."""
    groups: dict[str, list[ModuleRow]] = {}
    for row in rows:
        if (row.forward.kernels or row.parameters) and (depth is None or row.depth <= depth):
            groups.setdefault(pattern(row.path), []).append(row)
    # a list of blocks would repeat its blocks
    return [
        (path, len(copies), reduce(operator.add, copies))
        for path, copies in groups.items()
        if f"{path}.*" not in groups
    ]


def _nonzero(flops: Count) -> str:
    return flops_text(float(flops)) if flops else ""


def _formula(count: Count) -> str:
    return str(sympy.expand(count)).replace("**", "^")


def _as_rows(profiled: Profiled, numbers: ModelProfile, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The profile as plain data, for `--json`."""
    return {
        "sizes": sizes,
        "flops": numbers.flops,
        "saved_bytes": numbers.saved_bytes,
        "peak_bytes": numbers.peak_bytes,
        "state_bytes": profiled.state_bytes,
        "modules": [
            {
                "module": row.path,
                "parameters": row.parameters,
                "forward_flops": row.forward.flops,
                "backward_flops": row.backward.flops,
                "read_bytes": row.forward.read_bytes + row.backward.read_bytes,
                "written_bytes": row.forward.written_bytes + row.backward.written_bytes,
                "saved_bytes": row.saved_bytes,
            }
            for row in numbers.modules()
        ],
        "formulas": {
            "flops": _formula(profiled.profile.flops),
            "saved_bytes": _formula(profiled.profile.saved_bytes),
        }
        if profiled.profile.symbols
        else {},
    }
