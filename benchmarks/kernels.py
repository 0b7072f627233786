"""Every kernel of autopar's table on one GPU, forward and backward, at five sizes, against eager
PyTorch and Inductor. Five minutes at most.

What is run is each row's sample, as authors write it, in bfloat16. The bytes are those that the
kernels must move: their operands and results, once. The share of the peak is those bytes, over the
time, over the card's bandwidth. Times are of calls that wait in a queue, so that launches hide.

Without a GPU nothing is timed. With --quick (on any machine) every row is run once through Triton's
interpreter, on the CPU, and held to float64.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import common
from benchmarks.common import Row, console

SECONDS = 270.0
SIZES = ((2048, 1024), (4096, 2048), (8192, 4096), (16384, 4096), (8192, 8192))
# Bytes over the bandwidth are 0.85 of the time or more; and Inductor is not faster.
MOST_OVER_IDEAL, MOST_OF_INDUCTOR = 1 / 0.85, 1.0
ROUNDINGS = 4.0
QUICK_SHAPES = ((6, 50), (17, 258))


def interpreted() -> list[Row]:
    """Every row through the interpreter, at odd shapes, against float64."""
    import torch

    from autopar.kernels import launch
    from autopar.kernels.table import ROWS
    from autopar.testing.kernels import roundings_off

    rows = []
    for kernel in ROWS:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            off = max(roundings_off(kernel, *shape, dtype) for shape in QUICK_SHAPES)
            name = str(dtype).removeprefix("torch.")
            rows.append(Row(kernel.name, f"{name}: error", off, "roundings", ROUNDINGS))
    if launch.failed:
        raise RuntimeError(f"kernels could not be built: {launch.failed}")
    return rows


def measured(deadline: float) -> list[Row]:
    """Times on the GPU. Sizes that the time does not allow for are left out, and named."""
    import torch
    from triton.testing import get_dram_gbps

    from autopar.kernels import launch
    from autopar.kernels.table import ROWS

    peak = 1e9 * get_dram_gbps()  # by the memory's clock and its bus
    rows: list[Row] = []
    left_out = []
    for count, size in enumerate(SIZES):
        for kernel in ROWS:
            case = f"{kernel.name}, {size[0]} x {size[1]}"
            if time.perf_counter() > deadline:
                left_out.append(case)
                continue
            torch.manual_seed(0)
            operands = [
                t.detach().cuda().requires_grad_(t.requires_grad)
                for t in kernel.sample.operands(*size, torch.bfloat16)
            ]
            rows += _of_case(case, kernel, operands, peak)
            torch.cuda.empty_cache()
        console.print(f"{count + 1} of {len(SIZES)} sizes", style="dim")
    if launch.failed:
        raise RuntimeError(f"kernels could not be built: {launch.failed}")
    if left_out:
        console.print(f"left out, as the time is over: {', '.join(left_out)}", markup=False)
    return rows


def _of_case(case: str, kernel: Any, operands: Sequence[Any], peak: float) -> list[Row]:
    import torch

    from autopar.profiler.clock import seconds_of
    from autopar.profiler.time_model import KernelLog
    from autopar.testing.kernels import as_tuple, kernels_in, with_kernels

    gm = with_kernels(kernel.sample.run, operands)
    if not kernels_in(gm):
        raise RuntimeError(f"{case}: the kernel was not substituted")
    torch._dynamo.reset()
    methods: dict[str, Callable[..., Any]] = {
        "autopar": gm,
        "eager": kernel.sample.run,
        "Inductor": torch.compile(kernel.sample.run, dynamic=False),
    }
    leaves = [t for t in operands if t.requires_grad]
    seeds = [torch.randn_like(result) for result in as_tuple(kernel.sample.run(*operands))]

    def step(run: Callable[..., Any]) -> None:
        torch.autograd.grad(as_tuple(run(*operands)), leaves, seeds)

    with KernelLog() as log:
        step(methods["autopar"])
    moved = sum(work.read_bytes + work.written_bytes for work, _ in log.kernels)
    device = operands[0].device
    seconds = {
        name: seconds_of(lambda run=run: step(run), device, 0.1, queued=True)  # type: ignore[misc]
        for name, run in methods.items()
    }
    ours = seconds["autopar"]
    return [
        Row(case, "time", 1e6 * ours, "us"),
        Row(case, "rate", moved / ours / 1e9, "GB/s"),
        Row(case, "share of the card's peak", 100 * moved / ours / peak, "%"),
        Row(case, "time over that at the peak", ours * peak / moved, "x", MOST_OVER_IDEAL),
        Row(case, "time over eager's", ours / seconds["eager"], "x", 1.0),
        Row(case, "time over Inductor's", ours / seconds["Inductor"], "x", MOST_OF_INDUCTOR),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = common.parser(__doc__).parse_args(arguments)
    if options.quick:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import torch

    from autopar.kernels import kernels_run_on

    if not (kernels_run_on("cpu") if options.quick else torch.cuda.is_available()):
        missing = "Triton is not installed" if options.quick else "there is no GPU here"
        hint = "" if options.quick else "; --quick runs every kernel through Triton's interpreter"
        console.print(f"{missing}: nothing was run, and no figure exists{hint}", markup=False)
        return 0
    console.print(f"{common.machine()}\n", markup=False, soft_wrap=True)
    if options.quick:
        rows = interpreted()
        worst = max(row.value for row in rows)
        headline = (
            f"interpreted on the CPU, no times: {len({r.case for r in rows})} kernels, "
            f"at most {worst:.1f} roundings from float64"
        )
        return common.finish("Triton kernels, interpreted", rows, headline, options.json)
    console.print(f"{torch.cuda.get_device_name()}\n", markup=False)
    rows = measured(time.perf_counter() + SECONDS)
    missed = sum(row.ok is False for row in rows)
    headline = f"{len({r.case for r in rows})} cases, {missed} targets missed"
    return common.finish("Triton kernels", rows, headline, options.json)


if __name__ == "__main__":
    sys.exit(main())
