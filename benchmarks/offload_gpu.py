"""On one GPU: the largest GPT-2 and Llama that train within 10 GiB and within the card, with states
on the host, and tokens per second beside a run in memory. Five minutes at most.

Compute is in bfloat16, parameters, fetches and AdamW in float32 (`precision="bf16"`). The link to
the host is measured first. Models grow by layers until one does not fit, or the time is over.
Without a GPU it says so and measures nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks import common
from benchmarks.common import Row, console

SECONDS = 270.0
CAP = 10 * 2**30
LAYERS = (8, 16, 32, 64)
VOCABULARY, BATCH, LENGTH, WIDTH = 32000, 4, 1024, 2048
PREDICTED = 3.0


def build(name: str, layers: int) -> Any:
    from benchmarks.recompute import gpt2, llama

    make = gpt2 if name == "GPT-2" else llama
    return make(layers, VOCABULARY, LENGTH, WIDTH)


def run(name: str, layers: int, cluster: Any, memory: float, steps: int) -> dict[str, float] | None:
    """Train a few steps; None if the model does not fit."""
    import torch

    from autopar import auto_engine
    from autopar.comm import world
    from autopar.errors import InfeasibleError
    from autopar.testing.live_memory import training_state_bytes

    world.stop()
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    model = build(name, layers)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), device="cuda")
    try:
        model, optimizer = auto_engine(
            model, optimizer, cluster, memory=memory, precision="bf16", example_inputs=(ids,),
            time_limit=20.0,
        )  # fmt: skip
    except InfeasibleError as error:
        console.print(f"{name}, {layers} layers: {error}", markup=False)
        return None
    times = []
    for _ in range(steps):
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        model(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    held = ids.nbytes + sum(b.nbytes for b in model.buffers())
    if not model.plan.states_on:
        held += sum(training_state_bytes(model, optimizer).values())
    return {
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "tokens": BATCH * LENGTH / min(times[1:]),
        "peak": float(torch.cuda.max_memory_allocated()),
        "predicted": float(model.memory_plan.peak_bytes + held),
        "on_tier": float(bool(model.plan.states_on)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    options = common.parser(__doc__ or "").parse_args(arguments)
    console.print(common.machine(), markup=False)
    import torch

    if not torch.cuda.is_available():
        console.print("no GPU here: nothing is measured", markup=False)
        return 0
    from autopar.cluster.local import as_cluster
    from autopar.cluster.tiers import Tier
    from autopar.profiler.measure import QUICK
    from autopar.profiler.measure_links import measure_host_link

    begin = time.monotonic()
    alone = as_cluster("1")
    link = measure_host_link(torch.device("cuda"), QUICK)
    assert link is not None
    host = Tier("host", 1 / link.beta, max(link.alpha, 0.0))
    tiered = replace(alone, tiers=(host,))
    console.print(f"link to the host: {1e-9 / link.beta:.1f} GB/s", markup=False)
    card = 0.92 * torch.cuda.get_device_properties(0).total_memory
    rows: list[Row] = []
    for name in ("Llama", "GPT-2"):
        for what, memory in (("10 GiB", float(CAP)), ("the card", card)):
            for layers in LAYERS[:2] if options.quick else LAYERS:
                if time.monotonic() - begin > SECONDS:
                    console.print("the time is over", markup=False)
                    break
                found = run(name, layers, tiered, memory, 3)
                if found is None:
                    break
                case = f"{name} of {found['parameters'] / 1e9:.2f} B in {what}"
                rows.append(Row(case, "states on the host", found["on_tier"], ""))
                rows.append(Row(case, "tokens", found["tokens"], "1/s"))
                rows.append(
                    Row(case, "peak, of the memory", 100 * found["peak"] / memory, "%", 100)
                )
                off = 100 * abs(found["predicted"] / found["peak"] - 1)
                rows.append(Row(case, "peak, predicted off by", off, "%", PREDICTED))
                within = run(name, layers, alone, card, 3)
                if within is not None:
                    rows.append(Row(case, "tokens in memory", within["tokens"], "1/s"))
    return common.finish("States on the host, one GPU", rows, f"{len(rows)} rows", options.json)


if __name__ == "__main__":
    sys.exit(main())
