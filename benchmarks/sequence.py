"""Attention over a split sequence: times, memory, bytes, and plans for up to a million tokens.

*Measured.* Llama's blocks train on one sequence of 2 to 32 thousand tokens, on 2 and 4 Gloo
processes: by each of autopar's strategies for attention (queries split and keys gathered, a ring,
heads split, sequence exchanged for heads within attention), by the plan that autopar chooses for
the measured machine, by the ring of torch's context parallelism with either of its ways to move
keys, and by Ulysses by hand. Contestants take turns in the same processes as in
`benchmarks.regret`, and must lose the same.

*Memory.* The longest sequence that trains within a budget, by contestant, and peaks against
predictions (`benchmarks/sequence_memory.py`).

*Bytes.* What a rank sends for one attention, counted in the program that runs, against the formulas
of the papers; and causal work per rank (`benchmarks/sequence_bytes.py`).

*Planned.* Llama 3 on 8 and 64 H100 up to a million tokens (`benchmarks/sequence_plans.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.common import Row, console
from benchmarks.sequence_cases import CASES, Case

PARTS = ("bytes", "measured", "memory", "planned")
ROUNDS, QUICK_ROUNDS = 11, 3
OURS = "autopar"
ATTENTION = "**.scaled_dot_product_attention"
# Of a step by hand; medians of rounds differ by as much when a contestant races itself.
NOISE = 1.03
MEMORY_TARGET = 3.0  # percent


def strategies(of: Case, ranks: int) -> dict[str, dict[str, str]]:
    """Constraints by the name of a strategy, on a mesh of one axis."""
    forced = {"queries": "by q", "ring": "by ring"}
    if of.keys % ranks == 0:
        forced["heads"] = "RS0RR"
    if of.grouped:
        forced["exchange"] = "by exchange"
    return {f"autopar, {name}": {ATTENTION: layout} for name, layout in forced.items()}


@dataclass(frozen=True)
class CasePlans:
    """Plans of one case.

    Args:
        files: by name, files of the cluster and of the plan.
        predicted_us: step time by name.
        words: autopar's plan.
    """

    files: Mapping[str, tuple[str, str]]
    predicted_us: Mapping[str, float]
    words: str


def make_plans(of: Case, clusters: Mapping[str, Path], ranks: int, folder: Path) -> CasePlans:
    """autopar's plan of the fastest mesh, and that of each strategy on the mesh of one axis."""
    from autopar import ClusterInfo, autoplan
    from benchmarks.regret import TIE

    model, batch = of.build(), of.batch()
    files: dict[str, tuple[str, str]] = {}
    predicted: dict[str, float] = {}
    words, best = "", float("inf")

    def plan(name: str, mesh: str, constraints: Mapping[str, str] | None = None) -> Any:
        cluster = ClusterInfo.load(clusters[mesh])
        made = autoplan(model, (), batch, cluster=cluster, constraints=constraints).plan
        if name not in predicted or made.time.step_us < (1 - TIE) * best:
            file = folder / f"{len(files)}.json" if name not in files else Path(files[name][1])
            made.save(file)
            files[name] = str(clusters[mesh]), str(file)
            predicted[name] = made.time.step_us
        return made

    for mesh in clusters:
        made = plan(OURS, mesh)
        if predicted[OURS] == made.time.step_us:
            best, words = made.time.step_us, f"mesh {mesh}: {words_of(made)}"
    for name, constraints in strategies(of, ranks).items():
        plan(name, str(ranks), constraints)
    return CasePlans(files, predicted, words)


def words_of(plan: Any) -> str:
    """A plan in words, and how it splits attention."""
    attention = [f"{k}: {v}" for k, v in plan.choices.items() if k.startswith("scaled_dot")][:1]
    modules = [f"{m.name or 'model'} {m.words}" for m in plan.modules if m.words]
    return "; ".join([*attention, *modules])


def on_ranks(ranks: int, job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run a job of `sequence_ranks.run`."""
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    return common.on_ranks("benchmarks.sequence", ranks, str(file))


def rows_of(case: str, case_plans: CasePlans, measured: Mapping[str, Any]) -> Iterator[Row]:
    """Times beside predictions, peaks, and ratios of steps of one round."""
    names = list(measured["names"])
    seconds = dict(zip(names, np.array(measured["seconds"]).T, strict=True))
    processor = dict(zip(names, np.array(measured["processor"]).T, strict=True))
    for name in names:
        yield Row(case, name, 1e3 * float(np.median(seconds[name])), "ms")
        yield Row(case, f"{name}, processor", 1e3 * float(np.median(processor[name])), "ms")
        if name in case_plans.predicted_us:
            yield Row(case, f"{name}, predicted", 1e-3 * case_plans.predicted_us[name], "ms")
        peak = measured["peaks"][name]
        yield Row(case, f"{name}, peak", peak / 2**20, "MiB")
        if name in measured["predicted_bytes"]:
            off = 100 * abs(measured["predicted_bytes"][name] / peak - 1)
            yield Row(case, f"{name}, peak as planned off by", off, "%", MEMORY_TARGET)

    def fastest(chosen: Sequence[str]) -> str:
        return min(chosen, key=lambda name: float(np.median(seconds[name] / seconds[OURS])))

    by_hand = [n for n in names if not n.startswith(OURS)]
    forced = [n for n in names if n.startswith(f"{OURS},")]
    for best in (fastest(by_hand), fastest(forced)):
        low, middle, high = np.quantile(seconds[OURS] / seconds[best], (0.25, 0.5, 0.75))
        yield Row(case, f"ours / {best}, quartile", float(low), "x")
        yield Row(case, f"ours / {best}, median", float(middle), "x", NOISE)
        yield Row(case, f"ours / {best}, quartile", float(high), "x")


def measure(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """All cases."""
    from benchmarks.regret import clusters

    quick = options.quick
    rounds = options.rounds or (QUICK_ROUNDS if quick else ROUNDS)
    for ranks in _worlds(options):
        files = clusters(ranks, folder, quick)
        for of in CASES[:2] if quick else CASES:
            case = f"{of.name}, {ranks} ranks"
            if options.only not in case:
                continue
            case_plans = make_plans(of, files, ranks, folder)
            job = {
                "kind": "race", "case": asdict(of), "plans": case_plans.files, "rounds": rounds,
            }  # fmt: skip
            rows = list(rows_of(case, case_plans, on_ranks(ranks, job, folder)))
            console.print(f"{case}: {case_plans.words}", markup=False, soft_wrap=True)
            for row in rows:
                if row.target == NOISE:
                    console.print(f"  {row.metric} {row.value:.2f}", markup=False)
            yield from rows


def _worlds(options: argparse.Namespace) -> list[int]:
    return [options.ranks] if options.ranks else [2] if options.quick else [2, 4]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    from benchmarks import sequence_bytes, sequence_memory, sequence_plans

    parser = common.parser(__doc__ or "")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="not all")
    parser.add_argument("--ranks", type=int, choices=(2, 4), help="not both of 2 and 4")
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS} if not given")
    parser.add_argument(
        "--clusters", type=Path, help="folder with cluster-MESH.yaml; what is missing is measured"
    )
    options = parser.parse_args(arguments)
    console.print(common.machine(), markup=False)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.clusters or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if "bytes" in options.parts:
            rows += sequence_bytes.rows(quick=options.quick)
        if "measured" in options.parts:
            rows += measure(options, folder)
        if "memory" in options.parts:
            rows += sequence_memory.rows(
                _worlds(options), options.quick, options.only, strategies,
                lambda ranks, job: on_ranks(ranks, job, folder),
            )  # fmt: skip
        if "planned" in options.parts:
            rows += sequence_plans.rows(options.only, quick=options.quick)
    return common.finish("Sequences", rows, _headline(rows), options.json)


def _headline(rows: Sequence[Row]) -> str:
    ratios = [r.value for r in rows if r.target == NOISE]
    return f"autopar / best: {min(ratios):.2f} to {max(ratios):.2f}" if ratios else ""


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        from benchmarks.sequence_ranks import run

        run(sys.argv[2])
    else:
        sys.exit(main())
