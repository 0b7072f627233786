"""Steps whose collectives are split and start ahead, against the same with them in one piece.

A Llama and a GPT-2 train by the plan that splits all weights and gathers them (FSDP's), within
three quarters of what the step would make with everything kept, on two and on four processes of one
host. Both schedules run in the same processes in turns; a step's time is that of the slowest rank.

Links between processes of one machine are memory, and moving it takes the same cores as compute.
So beside "loopback", which is that, a network is emulated: a collective is done at the earliest
a link of so many bytes/s has carried its messages, one after another, and processes sleep until
then. Devices are described as one core of a CPU, but with collectives beside compute.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks import common
from benchmarks.common import Row, console
from benchmarks.plan_memory import build

MODELS = ("Llama", "GPT-2")
MESHES = ("2", "2x2")
LINKS = {"loopback": None, "0.2 GB/s": 0.2e9, "0.05 GB/s": 0.05e9}  # bytes/s
_SHARE = 0.75


def rank(name: str, mesh: str, rounds: str) -> None:
    """One process of a mesh; rank 0 answers with seconds per step, of compute and predicted."""
    import torch
    import torch.distributed as dist

    from autopar import ClusterInfo, auto_engine
    from autopar.cluster.link import Link
    from autopar.planner.baselines import baseline_plans
    from autopar.planner.planner import build_problem, make_plan
    from autopar.testing.live_memory import training_state_bytes
    from benchmarks.slow_network import ALPHA_S, network

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    by_link: dict[str, dict[str, list[float]]] = {}
    for link, bytes_per_s in LINKS.items():
        cluster = ClusterInfo.of(mesh)
        if bytes_per_s is not None:
            links = tuple(Link(ALPHA_S, 1 / bytes_per_s) for _ in cluster.mesh)
            cluster = replace(cluster, links=links)
        model, batch = build(name)
        problem = build_problem(model, (), batch, cluster=cluster)
        baseline = next(e for e in baseline_plans(problem.space) if e.name.startswith("FSDP"))
        plan = make_plan(problem.space, baseline.choices, name)

        def engine(memory: float, overlaps: bool, cluster=cluster, plan=plan) -> Any:
            model, _ = build(name)
            optimizer = torch.optim.AdamW(model.parameters())
            device = replace(cluster.device, overlaps=overlaps)
            described = replace(cluster, device=device)
            return auto_engine(model, optimizer, described, plan=plan, memory=memory)

        def step(racer: Any, batch=batch) -> None:
            racer[0](**batch).backward()
            racer[1].step()
            racer[1].zero_grad()

        with network(bytes_per_s):
            ample = engine(2.0**36, False)
            step(ample)
            held = sum(training_state_bytes(*ample).values())
            budget = torch.tensor(held + _SHARE * ample[0].memory_plan.peak_bytes)
            dist.all_reduce(budget, dist.ReduceOp.MAX)
            racers = [engine(budget.item(), overlaps) for overlaps in (False, True)]
            times = torch.zeros(int(rounds), 2)
            for k in range(-2, int(rounds)):
                for who in (0, 1) if k % 2 else (1, 0):
                    dist.barrier()
                    begin = time.perf_counter()
                    step(racers[who])
                    times[k, who] = time.perf_counter() - begin
        dist.all_reduce(times, dist.ReduceOp.MAX)
        planned = [racer[0].memory_plan for racer in racers]
        by_link[link] = {
            "measured": times.median(0).values.tolist(),
            "predicted": [1e-6 * p.timeline.us for p in planned],
            "peak": [p.peak_bytes / 2**20 for p in planned],
        }
    if dist.get_rank() == 0:
        common.answer(by_link)
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="models whose name has this")
    parser.add_argument("--mesh", nargs="*", default=MESHES, help="of processes")
    options = parser.parse_args(arguments)
    console.print(common.machine(), markup=False)
    names = MODELS[:1] if options.quick else MODELS
    if options.only:
        names = tuple(n for n in names if any(word in n for word in options.only))
    rows: list[Row] = []
    ratios = []
    for name in names:
        for mesh in options.mesh[:1] if options.quick else options.mesh:
            count = math.prod(map(int, mesh.split("x")))
            steps = "3" if options.quick else "21"
            by_link = common.on_ranks("benchmarks.prefetch", count, name, mesh, steps)
            for link, figures in by_link.items():
                case = f"{name}, mesh {mesh}, {link}"
                for kind in ("measured", "predicted"):
                    joined, split = figures[kind]
                    rows.append(Row(case, f"{kind}, in one piece", 1e3 * joined, "ms"))
                    rows.append(Row(case, f"{kind}, split", 1e3 * split, "ms"))
                    console.print(
                        f"{case}, {kind}: {1e3 * joined:.0f} ms in one piece, "
                        f"{1e3 * split:.0f} ms split, {100 * (split / joined - 1):+.0f}%",
                        markup=False,
                    )
                console.print(
                    f"{case}: peak {figures['peak'][0]:.1f} MiB in one piece, "
                    f"{figures['peak'][1]:.1f} split; load {os.getloadavg()[0]:.1f}", markup=False,
                )  # fmt: skip
                joined, split = figures["measured"]
                ratios.append(split / joined)
    headline = f"split, a step takes {statistics.geometric_mean(ratios):.2f} of its time"
    return common.finish("Collectives split and ahead", rows, headline, options.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(*sys.argv[2:])
    else:
        sys.exit(main())
