"""The largest Llama that trains within a budget of device memory, with its states on the host.

Device memory is emulated by a budget, and the link to the host by its bandwidth: a copy takes its
bytes over the bandwidth, in a queue beside compute. A reference model's parameters, gradients and
AdamW moments, all in float32, are its states; budgets are 1/2 to 1/16 of them. Models grow in width
and depth together.

Contestants, each with AdamW fused on the host, and each by its best setting:

* autopar with a tier "host" (`step_beside` compares when its optimizer steps);
* FSDP2 with `CPUOffloadPolicy`, as it runs on a CPU: layers of blocks, or of every linear layer;
  with and without activation checkpointing. It copies nothing on a CPU, so the link's time is
  computed and taken to be hidden as far as there is compute;
* DeepSpeed, if it is installed, on its accelerator "cpu": ZeRO-Offload (stage 2, with the optimizer
  on the host), and stage 3 with parameters there too; with and without checkpointing. The time of
  the link as with FSDP2. The optimizer is torch's fused one, as `DeepSpeedCPUAdam` is compiled
  first;
* torchao's recipe by hand (its class takes GPUs only): gradients move in hooks, as they are made,
  each parameter is stepped on the host and copied back.

Steps that are compared take turns in one process, as the machine may be busy, and the least time of
each counts. The same is counted for all: every storage that a step makes until it is freed, and
what stays on the device between steps: nothing but inputs for autopar, FSDP2 and stage 3,
parameters for ZeRO-Offload and the recipe. A gradient that is a result of FSDP2's step counts as on
the host as soon as it exists.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

from benchmarks import common
from benchmarks.common import Row, console
from benchmarks.offload_contestants import BANDWIDTH, SETTINGS, TRAINERS, parameters

SHARES = (2, 4, 8, 16)
REFERENCE = 4  # of the sizes
SIZES = (2, 3, 4, 5, 6, 7, 8)  # of 64 in width, and as many layers
QUICK = (3, 4)
PREDICTED = 3.0  # %, by which a peak may be off


def worker(arguments: dict[str, Any]) -> None:
    """Measurements in a process of their own: peaks of one case after another, or the times of
    steps of several cases that take turns."""
    import torch

    torch.set_num_threads(1)
    rounds = arguments["rounds"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, trainers = [], []
        for who, case in arguments["cases"]:
            gc.collect()
            trainer = TRAINERS[who](**case)
            found.append(trainer.found)
            trainers.append(trainer if rounds else None)
        times: list[list[float]] = [[] for _ in trainers]
        for order in common.turns(len(trainers), rounds):
            for k in order:
                start = time.perf_counter()
                trainers[k].step()
                times[k].append(time.perf_counter() - start)
        for k, trainer in enumerate(trainers):
            if trainer is not None:
                found[k]["seconds"] = max(min(times[k]), trainer.link_s)
    common.answer({"found": found})


# -- the contest --------------------------------------------------------------------------------


Case = tuple[str, dict[str, Any]]


def _measured(cases: Sequence[Case], rounds: int = 0) -> list[dict[str, Any]]:
    answer = common.in_fresh_process(
        "benchmarks.offload", {"cases": list(cases), "rounds": rounds}, timeout_s=7200.0
    )
    for case, found in zip(cases, answer["found"], strict=True):
        console.print(f"{case}: {found}", markup=False)
    return list(answer["found"])


def _peaks(sizes: Sequence[int], budget: float) -> dict[str, dict[int, list[tuple[float, Case]]]]:
    """What the others take with each of their settings, by size, up to the first that is too large
    for a budget."""
    found: dict[str, dict[int, list[tuple[float, Case]]]] = {}
    for who, settings in SETTINGS.items():
        if who == "DeepSpeed" and importlib.util.find_spec("deepspeed") is None:
            console.print("no rows of DeepSpeed: it is not installed", markup=False)
            continue
        found[who] = {}
        for size in sizes:
            cases: list[Case] = [
                (who, {"size": size, **dict(zip(settings, values, strict=True))})
                for values in itertools.product(*settings.values())
            ]
            results = _measured(cases)
            found[who][size] = [(r["peak"], c) for c, r in zip(cases, results, strict=True)]
            if min(peak for peak, _ in found[who][size]) > budget:
                break
    return found


def _largest(of: dict[int, list[tuple[float, Case]]], budget: float) -> int:
    return max(
        (s for s, tried in of.items() if any(peak <= budget for peak, _ in tried)), default=0
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--only", metavar="SHARE", help="one of the budgets, such as 1/8")
    options = parser.parse_args(arguments)
    console.print(common.machine(), markup=False)
    sizes, rounds = (QUICK, 5) if options.quick else (SIZES, 6)
    shares = SHARES[2:3] if options.quick else SHARES
    shares = tuple(n for n in shares if options.only in (None, f"1/{n}"))
    count = {size: parameters(size) for size in sizes}
    budgets = {n: 16 * count[REFERENCE] / n for n in shares}
    others = _peaks(sizes, max(budgets.values()))
    rows: list[Row] = []
    worst = 0.0
    for share, budget in budgets.items():
        case = f"1/{share} of the states, {budget / 2**20:.1f} MiB"
        best = {name: _largest(of, budget) for name, of in others.items()}
        trained: dict[int, list[tuple[str, dict[str, Any]]]] = {}
        for size in sorted({*best.values()} - {0}) + [s for s in sizes if s > max(best.values())]:
            contestants: list[Case] = [("autopar", {"size": size, "budget": budget})]
            for of in others.values():
                contestants += [c for peak, c in of.get(size, []) if peak <= budget]
            found = _measured(contestants, rounds)
            if found[0]["peak"] > budget:
                break
            names = [who for who, _ in contestants]
            trained[size] = list(zip(names, found, strict=True))
            if size > max(best.values()):  # one size more is enough to be larger
                break
        largest = max(trained, default=0)
        rows.append(Row(case, "parameters, autopar (or more)", count.get(largest, 0) / 1e6, "M"))
        for name in others:
            size = best[name]
            rows.append(Row(case, f"parameters, {name}", count.get(size, 0) / 1e6, "M"))
            share_of = 100 * count.get(size, 0) / count[largest] if largest else 1000.0
            end = 100.0 if largest == sizes[-1] else 99.9  # larger, unless no size is
            rows.append(Row(case, f"parameters, {name} of autopar", share_of, "%", end))
        for s, results in trained.items():
            size_text = f"{count[s] / 1e6:.1f} M"
            found_here = results[0][1]
            seconds = found_here["seconds"]
            rows.append(Row(case, f"step of {size_text}, autopar", 1e3 * seconds, "ms"))
            for name in others:
                times = [result["seconds"] for who, result in results if who == name]
                if times:
                    ratio = 100 * seconds / min(times)
                    rows.append(Row(case, f"step of {size_text}, {name}", 1e3 * min(times), "ms"))
                    rows.append(Row(case, f"autopar of {name}, {size_text}", ratio, "%", 100.0))
            off = 100 * abs(found_here["predicted"] / found_here["peak"] - 1)
            worst = max(worst, off)
            used = 100 * found_here["peak"] / budget
            rows.append(Row(case, f"peak of {size_text}, of the budget", used, "%", 100.0))
            rows.append(Row(case, f"peak of {size_text}, predicted off by", off, "%", PREDICTED))
    headline = f"predicted peaks are within {worst:.2f}% of the measured ones"
    title = f"States on the host, over a link of {BANDWIDTH / 1e9:g} GB/s"
    return common.finish(title, rows, headline, options.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(json.loads(sys.argv[2]))
    else:
        sys.exit(main())
