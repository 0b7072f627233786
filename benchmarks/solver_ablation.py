"""What each layer of the solver earns: the search with one layer switched off at a time.

The cases are those of `benchmarks.plan_time`. A case is traced and costed once, in a process of its
own; then the search runs with all layers, and with each of them disabled. Times are processor times
of the search alone. A layer earns its place where the search without it takes longer, ends with a
larger gap, or finds a slower plan.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks import common
from benchmarks.common import Row, console
from benchmarks.plan_time import CASES, DEVICE, QUICK, Case, build

TIME_LIMIT_S = 60.0
# A search is repeated until all repetitions took this long, and at most this often.
ENOUGH_S, REPETITIONS = 3.0, 5


def work(case: Case) -> dict[str, Any]:
    """Per layer that is disabled ("" for none): seconds, gap and step of the search."""
    from autopar import ClusterInfo
    from autopar.planner.planner import build_problem
    from autopar.planner.search import search
    from autopar.solver import LAYERS

    model, batch = build(case)
    cluster = ClusterInfo.of(case.mesh, DEVICE).with_memory(case.memory)
    space = build_problem(model, (), batch, cluster=cluster).space
    # imports, and tables that are computed once
    search(space, budget_bytes=cluster.budget_bytes, time_limit=TIME_LIMIT_S)
    runs = {}
    for layer in ("", *LAYERS):
        seconds: list[float] = []
        while len(seconds) < REPETITIONS and sum(seconds) < ENOUGH_S:
            start = time.process_time()
            result = search(
                space, budget_bytes=cluster.budget_bytes, time_limit=TIME_LIMIT_S,
                disable=frozenset({layer} - {""}),
            )  # fmt: skip
            seconds.append(time.process_time() - start)
        gap = 1 - result.bound_us / result.step_us
        runs[layer] = {
            "seconds": statistics.median(seconds), "gap": max(0.0, gap), "step_us": result.step_us
        }  # fmt: skip
    return runs


def rows_of(case: Case, runs: dict[str, dict[str, float]]) -> list[Row]:
    """Time, gap and plan without each layer, compared with those of all layers."""
    full = runs[""]
    rows = [
        Row(case.name, "all layers: search", full["seconds"], "s"),
        Row(case.name, "all layers: gap", 100 * full["gap"], "%"),
    ]
    for layer, run in runs.items():
        if layer:
            slower = 100 * (run["step_us"] / full["step_us"] - 1)
            rows += [
                Row(case.name, f"{layer} off: time ratio", run["seconds"] / full["seconds"], "x"),
                Row(case.name, f"{layer} off: gap", 100 * run["gap"], "%"),
                Row(case.name, f"{layer} off: slower plan", slower, "%"),
            ]
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args(arguments)
    cases = [c for c in (QUICK if options.quick else CASES) if options.only in c.name]
    console.print(common.machine(), markup=False)
    rows: list[Row] = []
    for case in cases:
        runs = common.in_fresh_process("benchmarks.solver_ablation", asdict(case), timeout_s=3600)
        rows += rows_of(case, runs)
        console.print(f"{case.name}: {runs['']['seconds']:.2f} s with all layers", markup=False)
    worst: dict[str, float] = {}
    for row in rows:
        layer, off, metric = row.metric.partition(" off: ")
        if off and metric == "time ratio":
            worst[layer] = max(worst.get(layer, 0.0), row.value)
    headline = "largest time ratio without a layer: " + ", ".join(
        f"{layer} {ratio:.1f}x" for layer, ratio in worst.items()
    )
    return common.finish("Layers of the solver", rows, headline, options.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        common.answer(work(Case(**json.loads(sys.argv[2]))))
    else:
        sys.exit(main())
