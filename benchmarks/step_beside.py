"""The optimizer's step on the host beside the backward, against after it.

Wide layers with AdamW, states on a tier "host" over an emulated link: the slower it is, the more of
the backward waits, and the more of a processor is free. Both ways take turns in one process.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks import common
from benchmarks.common import Row, console
from benchmarks.offload_link import Link, emulated

WIDTH, LAYERS, BATCH = 2048, 10, 16
BANDWIDTHS = (0.5e9, 1e9, 2e9)


def training(bandwidth: float, beside: bool) -> Callable[[], list[float]]:
    """A step of training: its seconds, those of `optimizer.step()`, and those of the processor that
    the main thread takes."""
    import torch

    from autopar import ClusterInfo, auto_engine
    from autopar.cluster.tiers import Tier
    from autopar.comm import world
    from autopar.runtime.step_on_shards import StepOnShards

    world.stop()
    torch.manual_seed(0)
    layers = [m for _ in range(LAYERS) for m in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU())]
    model: Any = torch.nn.Sequential(*layers)
    optimizer: Any = torch.optim.AdamW(model.parameters())
    memory = 1.2 * sum(p.nbytes for p in model.parameters())
    cluster, x = ClusterInfo.of("1"), torch.randn(BATCH, WIDTH)
    device = replace(cluster.device, overlaps=True)
    cluster = replace(cluster, device=device, tiers=(Tier("host", bandwidth, 2e-5),))
    model, optimizer = auto_engine(
        model, optimizer, cluster, memory=memory, example_inputs=x, progress=False, microbatches=1
    )
    if not beside:
        StepOnShards.of(optimizer).only_after_the_backward()
    link = Link(bandwidth)

    def step() -> list[float]:
        start, own = time.perf_counter(), time.thread_time()
        with emulated(link):
            model(x).square().mean().backward()
            before = time.perf_counter()
            optimizer.step()
            after = time.perf_counter()
            optimizer.zero_grad()
        return [time.perf_counter() - start, after - before, time.thread_time() - own]

    step()
    step()
    return step


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    import torch

    from autopar.runtime import speculative_step

    options = common.parser(__doc__ or "").parse_args(arguments)
    console.print(common.machine(), markup=False)
    torch.set_num_threads(1)
    speculative_step._TIMED = 0  # not only where it is faster
    rows: list[Row] = []
    for bandwidth in BANDWIDTHS[1:2] if options.quick else BANDWIDTHS:
        ways = {name: training(bandwidth, name == "beside") for name in ("beside", "after")}
        seconds: dict[str, list[list[float]]] = {name: [] for name in ways}
        names = list(ways)
        for order in common.turns(len(names), 6 if options.quick else 14):
            for k in order:
                seconds[names[k]].append(ways[names[k]]())
        case = f"{bandwidth / 1e9:g} GB/s"
        for k, of in enumerate(("step", "optimizer.step()", "processor time of the main thread")):
            for name, times in seconds.items():
                rows.append(Row(case, f"{of}, {name}", 1e3 * min(t[k] for t in times), "ms"))
    return common.finish("The optimizer's step beside the backward", rows, "", options.json)


if __name__ == "__main__":
    sys.exit(main())
