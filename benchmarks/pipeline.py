"""Pipelines: steps against the same cuts by hand, predictions, bubbles, and published recipes.

*Measured.* A GPT-2 and a Llama with a wide MLP train on 2 and 4 Gloo processes, a stage or two on
each. The same model, cut by hand into torch's `PipelineStage`s, runs the same schedule with the
same cuts, microbatches and batch. Contestants take turns in the same processes as in
`benchmarks.regret`, and must lose the same. Over slow links (`benchmarks/slow_network.py`), the
pipeline that autopar chooses runs against its plan without one and DistributedDataParallel.

*Predicted.* The cluster is measured first, as `autopar cluster` does it. The error of a predicted
step is relative to the median of the measured ones.

*Bubbles.* Simulated schedules of equal stages, against the published formulas.

*Recipes.* Plans for 64 to 1024 GPUs against published degrees (`benchmarks/pipeline_recipes.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.common import Row, console

PARTS = ("bubbles", "measured", "recipes")
MICROBATCHES = 8
SCHEDULES = ("1f1b", "gpipe", "interleaved", "zbv")
LINKS = {"host": None, "0.2 GB/s": 0.2e9, "0.05 GB/s": 0.05e9}  # bytes/s
ROUNDS, QUICK_ROUNDS = 15, 3
CHOSEN = "as autopar chooses"
EXACT = 1e-9


# -- bubbles ---------------------------------------------------------------------------------------


def bubbles() -> Iterator[Row]:
    """How far simulated bubbles are from their formulas; equal stages, no transfers.

    1F1B idles (p - 1)/(m + p - 1) of a step (Narayanan et al. 2021), with v stages per rank
    (p - 1)/(v m) of the ideal step. ZB-H1's bubble is a third of that of 1F1B (Qi et al. 2023), and
    ZBV has none by its authors' definition: no rank is idle between its first and last action.
    """
    from autopar.schedule.pipeline.schedules import make_schedule
    from autopar.schedule.pipeline.timeline import StageCost, Timeline, simulate

    def run(name: str, p: int, m: int, per_rank: int | None = None) -> Timeline:
        schedule = make_schedule(name, p, m, per_rank)
        return simulate(schedule, [StageCost(1, 1, 1)] * schedule.stages)

    for p, m in ((2, 8), (4, 8), (8, 32), (16, 192)):
        one = run("1f1b", p, m)
        pairs = {
            "1f1b": (one.bubble_fraction, (p - 1) / (m + p - 1)),
            "interleaved, 3 stages a rank": (
                run("interleaved", p, m, 3).bubble_over_compute, (p - 1) / (3 * m),
            ),
            "zb-h1": (run("zb-h1", p, m).bubble_over_compute, one.bubble_over_compute / 3),
            "zbv": (run("zbv", p, m).bubble_rate, 0.0),
        }  # fmt: skip
        for name, (simulated, published) in pairs.items():
            case = f"bubble of {name}, {p} ranks, {m} microbatches"
            yield Row(case, "simulated", 100 * simulated, "%")
            yield Row(case, "off the formula", 100 * abs(simulated - published), "%", EXACT)


# -- measured --------------------------------------------------------------------------------------


def clusters(ranks: int, folder: Path, quick: bool) -> dict[str, Path]:
    """Files of the measured cluster: of stages, and without a pipeline, with the same links."""
    from autopar import ClusterInfo
    from autopar.cli.cluster import write_measured
    from autopar.profiler.measure_links import measure_cluster

    stages, flat = folder / f"cluster-pipe={ranks}.yaml", folder / f"cluster-{ranks}.yaml"
    if not stages.exists():
        console.print(f"measure the machine for {ranks} stages ...", markup=False)
        measured = measure_cluster(f"pipe={ranks}", "cpu", level="quick" if quick else "standard")
        assert measured is not None
        write_measured(measured, stages)
    flat.write_text(replace(ClusterInfo.load(stages), axis_names=()).to_yaml())
    return {"stages": stages, "flat": flat}


def _slowed(files: Mapping[str, Path], bytes_per_s: float, folder: Path) -> dict[str, Path]:
    """The same devices, with collectives beside compute, on the emulated network."""
    from autopar import ClusterInfo
    from autopar.cluster.link import Link
    from benchmarks.slow_network import ALPHA_S

    slow = {}
    for name, file in files.items():
        cluster = ClusterInfo.load(file)
        cluster = replace(
            cluster,
            links=tuple(Link(ALPHA_S, 1 / bytes_per_s) for _ in cluster.mesh),
            device=replace(cluster.device, overlaps=True),
        )
        slow[name] = folder / f"slow-{name}.yaml"
        slow[name].write_text(cluster.to_yaml())
    return slow


def race(
    name: str, ranks: int, files: Mapping[str, Path], schedules: Sequence[str],
    bytes_per_s: float | None, rounds: int, folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """Run the contestants; the measurements of `pipeline_ranks.measure`."""
    if bytes_per_s is not None:
        files = _slowed(files, bytes_per_s, folder)
    job = {
        "case": name,
        "clusters": {k: str(file) for k, file in files.items()},
        "microbatches": MICROBATCHES,
        "schedules": list(schedules),
        "bytes_per_s": bytes_per_s,
        "rounds": rounds,
    }
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    return common.on_ranks("benchmarks.pipeline", ranks, str(file))


def rows_of(case: str, measured: Mapping[str, Any]) -> Iterator[Row]:
    """Times beside predictions, and ratios of steps of one round."""
    names, plans = list(measured["names"]), measured["plans"]
    seconds = dict(zip(names, np.array(measured["seconds"]).T, strict=True))
    processor = dict(zip(names, np.array(measured["processor"]).T, strict=True))
    for name in names:
        middle = float(np.median(seconds[name]))
        yield Row(case, name, 1e3 * middle, "ms")
        yield Row(case, f"{name}, processor", 1e3 * float(np.median(processor[name])), "ms")
        if name in plans:
            predicted = plans[name]["seconds"]
            yield Row(case, f"{name}, predicted", 1e3 * predicted, "ms")
            off = 100 * abs(predicted / middle - 1)
            yield Row(case, f"{name}, prediction off by", off, "%", 10.0)
    for schedule in SCHEDULES:
        ours, theirs = f"{schedule}, autopar", f"{schedule}, torch"
        if ours in seconds:
            yield from _ratio(case, f"{ours} / torch", seconds[ours] / seconds[theirs])
            of_processor = float(np.median(processor[ours] / processor[theirs]))
            yield Row(case, f"{ours} / torch, processor", of_processor, "x")
    without = [n for n in ("autopar, no pipeline", "DDP") if n in seconds]
    if without:
        best = min(without, key=lambda n: float(np.median(seconds[n])))
        yield from _ratio(case, f"{CHOSEN} / {best}", seconds[CHOSEN] / seconds[best])


def _ratio(case: str, metric: str, ratios: np.ndarray) -> Iterator[Row]:
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    yield Row(case, f"{metric}, quartile", float(low), "x")
    yield Row(case, f"{metric}, median", float(middle), "x", 1.0)
    yield Row(case, f"{metric}, quartile", float(high), "x")


def measure(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """All cases."""
    from benchmarks.pipeline_cases import CASES

    quick = options.quick
    rounds = options.rounds or (QUICK_ROUNDS if quick else ROUNDS)
    schedules = options.schedules or (SCHEDULES[:1] if quick else SCHEDULES)
    worlds = [options.ranks] if options.ranks else [2] if quick else [2, 4]
    links = options.links or ([*LINKS][:2] if quick else LINKS)
    for ranks in worlds:
        files = clusters(ranks, folder, quick)
        for of in CASES[:1] if quick else CASES:
            for link in links:
                bytes_per_s = LINKS[link]
                case = f"{of.name}, {ranks} ranks" + (f", {link}" if bytes_per_s else "")
                if options.only not in case:
                    continue
                # over slow links, one schedule shows it
                raced = schedules if bytes_per_s is None else schedules[:1]
                measured = race(of.name, ranks, files, raced, bytes_per_s, rounds, folder)
                rows = list(rows_of(case, measured))
                for name, plan in measured["plans"].items():
                    console.print(f"{case}, {name}: {plan['words']}", markup=False, soft_wrap=True)
                for row in rows:
                    if row.target == 1.0:
                        console.print(f"  {row.metric} {row.value:.2f}", markup=False)
                yield from rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    from benchmarks import pipeline_recipes

    parser = common.parser(__doc__ or "")
    parser.add_argument("--only", default="", help="cases and recipes whose name has this in it")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="not all")
    parser.add_argument("--ranks", type=int, choices=(2, 4), help="not both of 2 and 4")
    parser.add_argument("--schedules", nargs="*", choices=SCHEDULES, help="not all")
    parser.add_argument("--links", nargs="*", choices=LINKS, help="not all")
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS} if not given")
    parser.add_argument(
        "--clusters", type=Path, help="folder with cluster-pipe=N.yaml; measured if missing"
    )
    options = parser.parse_args(arguments)
    console.print(common.machine(), markup=False)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.clusters or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if "bubbles" in options.parts:
            rows += bubbles()
        if "measured" in options.parts:
            rows += measure(options, folder)
        if "recipes" in options.parts:
            rows += pipeline_recipes.compare_all(options.only, quick=options.quick)
    return common.finish("Pipelines", rows, _headline(rows), options.json)


def _headline(rows: Sequence[Row]) -> str:
    parts = []
    for words, what in (
        ("autopar / torch, median", "autopar / torch's pipelines by hand"),
        (f"{CHOSEN} / ", "pipeline / best without one on slow links"),
        ("autopar / recipe", "autopar / recipe"),
    ):
        ratios = [r.value for r in rows if words in r.metric and r.target is not None]
        if ratios:
            parts.append(f"{what}: {min(ratios):.2f} to {max(ratios):.2f}")
    return "; ".join(parts) or "simulated bubbles are as published"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        from benchmarks.pipeline_ranks import run

        run(sys.argv[2])
    else:
        sys.exit(main())
