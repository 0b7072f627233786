"""The step time of autopar's plan against the best baseline, on the same transport.

Training steps (forward, backward, optimizer) of eight models on 2 and 4 Gloo processes with one
thread each, of autopar's plan and of DistributedDataParallel, FSDP2, tensor parallelism by
`parallelize_module`, and on four processes FSDP2 with tensor parallelism on 2x2. The cluster is
measured first, as `autopar cluster` does it, for every mesh of so many processes; the plan is the
fastest predicted of any mesh, where one of more axes has to win by 5%.

All contestants are built in the same processes from the same weights, must lose the same on the
same global batch, and take turns, after a barrier each, in an order drawn anew every round: what
disturbs the machine disturbs all of them, and none always finds caches and heap as the same other
one left them. A ratio is that of two steps of one round; medians are of ratios.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.common import Row, console

MESHES = {2: ("2",), 4: ("4", "2x2")}
ROUNDS, QUICK_ROUNDS = 25, 5
OURS = "autopar"
# of a step; predictions of two meshes, each measured by itself, are not more exact than that
TIE = 0.05


@dataclass(frozen=True)
class CasePlans:
    """Plans of one case.

    Args:
        plans: by name, files of the cluster and of the plan.
        predicted_us: step time by name of contestant.
        words: autopar's plan.
    """

    plans: Mapping[str, tuple[str, str]]
    predicted_us: Mapping[str, float]
    words: str


def clusters(world: int, folder: Path, quick: bool) -> dict[str, Path]:
    """`ClusterInfo`s of all meshes of so many processes, measured if they are not in the folder.

    The device is the same in all: measured twice, it would decide between meshes by its noise.
    """
    from autopar.cli.cluster import write_measured
    from autopar.cluster.cluster import ClusterInfo
    from autopar.profiler.measure_links import measure_cluster

    files = {}
    for mesh in MESHES[world]:
        files[mesh] = folder / f"cluster-{mesh}.yaml"
        if not files[mesh].exists():
            console.print(f"measure the machine for mesh {mesh} ...", markup=False)
            measured = measure_cluster(mesh, "cpu", level="quick" if quick else "standard")
            assert measured is not None
            first = files[MESHES[world][0]]
            if first.exists():
                device = ClusterInfo.load(first).device
                measured = replace(measured, cluster=replace(measured.cluster, device=device))
            write_measured(measured, files[mesh])
    return files


def make_plans(name: str, files: Mapping[str, Path], folder: Path, *, baselines: bool) -> CasePlans:
    """Plan one case on every mesh.

    Args:
        baselines: also write the baselines' plans, for autopar's runtime to run them.
    """
    from autopar import ClusterInfo, autoplan
    from autopar.planner.baselines import baseline_plans
    from autopar.planner.planner import make_plan
    from benchmarks.regret_cases import case

    selected = case(name)
    model, batch = selected.build(), selected.batch()
    predicted: dict[str, float] = {}
    plans: dict[str, tuple[str, str]] = {}
    words, best = "", float("inf")
    for mesh, file in files.items():
        planned = autoplan(model, (), batch, cluster=ClusterInfo.load(file))
        step = planned.plan.time.step_us
        if step < (1 - TIE) * best:
            best, words = step, f"mesh {mesh}: {_words(planned.plan)}"
            planned.plan.save(folder / "plan.json")
            predicted[OURS] = step
            plans[OURS] = (str(file), str(folder / "plan.json"))
        for baseline in baseline_plans(planned.space):
            contestant = _SAME.get((mesh, baseline.name))
            if contestant is None:
                continue
            predicted[contestant] = baseline.time.step_us
            if baselines:
                path = folder / f"baseline{len(plans)}.json"
                make_plan(planned.space, baseline.choices, planned.plan.model).save(path)
                plans[f"{contestant} by autopar"] = (str(file), str(path))
                predicted[f"{contestant} by autopar"] = baseline.time.step_us
    return CasePlans(plans, predicted, words)


# The contestant that a baseline's plan corresponds to.
_SAME = {
    (mesh, baseline): name
    for mesh in ("2", "4")
    for baseline, name in (("DDP", "DDP"), ("FSDP (ZeRO-3)", "FSDP2"), ("Megatron TP", "TP"))
} | {("2x2", "Megatron TP, FSDP"): "FSDP2 + TP"}


def _words(plan: Any) -> str:
    return "; ".join(f"{m.name or 'model'} {m.words}" for m in plan.modules if m.words)


def race(name: str, world: int, case_plans: CasePlans, rounds: int, folder: Path) -> dict[str, Any]:
    """Run the contestants; the measurements of `regret_ranks.measure`."""
    job = folder / "job.json"
    job.write_text(json.dumps({"case": name, "plans": dict(case_plans.plans), "rounds": rounds}))
    return common.on_ranks("benchmarks.regret", world, str(job))


def rows_of(case: str, case_plans: CasePlans, measured: Mapping[str, Any]) -> Iterator[Row]:
    """Times beside predictions, and the ratio to the best other contestant."""
    names = list(measured["names"])
    seconds = np.array(measured["seconds"])
    processor = np.array(measured["processor"])
    ours = seconds[:, names.index(OURS)]
    for i, name in enumerate(names):
        yield Row(case, f"{name}", 1e3 * float(np.median(seconds[:, i])), "ms")
        if name in case_plans.predicted_us:
            yield Row(case, f"{name}, predicted", 1e-3 * case_plans.predicted_us[name], "ms")
        yield Row(case, f"{name}, processor", 1e3 * float(np.median(processor[:, i])), "ms")
    others = [i for i, name in enumerate(names) if OURS not in name]
    best = max(others, key=lambda i: float(np.median(ours / seconds[:, i])))
    low, middle, high = np.quantile(ours / seconds[:, best], (0.25, 0.5, 0.75))
    yield Row(case, f"ours / {names[best]}, quartile", float(low), "x")
    yield Row(case, f"ours / {names[best]}, median", float(middle), "x", 1.0)
    yield Row(case, f"ours / {names[best]}, quartile", float(high), "x")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    from benchmarks.regret_cases import CASES

    parser = common.parser(__doc__ or "")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--ranks", type=int, choices=sorted(MESHES), help="not both of 2 and 4")
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS} if not given")
    parser.add_argument(
        "--clusters", type=Path, help="folder with cluster-MESH.yaml; what is missing is measured"
    )
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="also run the baselines' plans by autopar's runtime",
    )
    options = parser.parse_args(arguments)
    console.print(common.machine(), markup=False)
    chosen = [c.name for c in CASES if options.only in c.name]
    with tempfile.TemporaryDirectory() as scratch:
        rows = _all(options, chosen[:1] if options.quick else chosen, Path(scratch))
    ratios = [r for r in rows if r.target is not None]
    worst = max(ratios, key=lambda r: r.value)
    headline = (
        f"ours / best of the others: geometric mean "
        f"{np.exp(np.mean([np.log(r.value) for r in ratios])):.2f}, "
        f"at most {worst.value:.2f} ({worst.case})"
    )
    return common.finish("Regret", rows, headline, options.json)


def _all(options: argparse.Namespace, names: Sequence[str], scratch: Path) -> list[Row]:
    folder = options.clusters or scratch
    folder.mkdir(parents=True, exist_ok=True)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    worlds = [options.ranks] if options.ranks else sorted(MESHES)[: 1 if options.quick else None]
    rows: list[Row] = []
    for world in worlds:
        files = clusters(world, folder, options.quick)
        for name in names:
            case_plans = make_plans(name, files, scratch, baselines=options.baselines)
            measured = race(name, world, case_plans, rounds, scratch)
            rows += rows_of(f"{name}, {world} ranks", case_plans, measured)
            console.print(
                f"{name}, {world} ranks: {case_plans.words}", markup=False, soft_wrap=True
            )
            console.print(f"  {rows[-2].metric} {rows[-2].value:.2f}", markup=False)
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        from benchmarks.regret_ranks import run

        run(sys.argv[2])
    else:
        sys.exit(main())
