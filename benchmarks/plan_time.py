"""How long planning takes: GPT-2 at full size, from the module to the plan, stage by stage.

Hugging Face GPT-2 (12 layers, vocabulary 50257, no dropout) on the meta device with a batch of 16
sequences of 128 tokens, planned for A100-80G on the meshes 8 and 2x4, and once more with so little
memory that it binds. Every repetition is a process of its own, so that no trace, profile or
conversion table is found ready; imports are measured apart. Medians are shown.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import common
from benchmarks.common import Row, console

TARGET_S = 10.0
REPETITIONS = 5
DEVICE = "A100-80G"


@dataclass(frozen=True)
class Case:
    """One planning problem.

    Args:
        mesh: such as "2x4".
        memory: budget per device; all of the device if None.
        layers, vocabulary: of the model.
        target_s: bound on the time from module to plan; None for none.
    """

    mesh: str
    memory: str | None = None
    layers: int = 12
    vocabulary: int = 50257
    target_s: float | None = TARGET_S

    @property
    def name(self) -> str:
        budget = f", {self.memory}" if self.memory else ""
        return f"GPT-2, {self.layers} layers, mesh {self.mesh}{budget}"


CASES = (Case("8"), Case("2x4"), Case("2x4", memory="700MiB", target_s=None))
QUICK = (
    Case("8", layers=2, vocabulary=1001, target_s=None),
    Case("2x4", layers=2, vocabulary=1001, target_s=None),
)


def work(case: Case) -> dict[str, Any]:
    """Plan once, in this process; what was measured."""
    start = time.perf_counter()
    import torch

    from autopar import ClusterInfo, autoplan

    imports = time.perf_counter() - start

    import logging

    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=case.layers, vocab_size=case.vocabulary, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.device("meta"):
        model = GPT2LMHeadModel(config).train()
    ids = torch.zeros(16, 128, dtype=torch.long, device="meta")
    cluster = ClusterInfo.of(case.mesh, DEVICE)
    start = time.perf_counter()
    plan = autoplan(
        model, (), {"input_ids": ids, "labels": ids}, cluster=cluster, memory=case.memory
    ).plan
    total = time.perf_counter() - start
    return {
        "imports_s": imports,
        "total_s": total,
        "stages_s": dict(plan.solver.seconds),
        "gap": plan.solver.gap,
        "method": plan.solver.method,
        "step_ms": plan.time.step_us / 1e3,
        "memory_mib": plan.memory.total_bytes / 2**20,
        "rss_mib": common.peak_rss_mib(),
    }


def rows_of(case: Case, runs: Sequence[dict[str, Any]]) -> list[Row]:
    """Medians over the runs."""

    def median(key: str) -> float:
        return statistics.median(float(run[key]) for run in runs)

    stages = {s: statistics.median(r["stages_s"][s] for r in runs) for s in runs[0]["stages_s"]}
    rest = [r["total_s"] - sum(r["stages_s"].values()) for r in runs]
    totals = [r["total_s"] for r in runs]
    return [
        Row(case.name, "module to plan", median("total_s"), "s", case.target_s),
        Row(case.name, "slowest repetition", max(totals), "s"),
        *(Row(case.name, stage, seconds, "s") for stage, seconds in stages.items()),
        Row(case.name, "the plan's text and estimates", statistics.median(rest), "s"),
        Row(case.name, "imports (torch, autopar), apart", median("imports_s"), "s"),
        Row(case.name, "gap to the bound", 100 * max(r["gap"] for r in runs), "%"),
        Row(case.name, "predicted step", median("step_ms"), "ms"),
        Row(case.name, "predicted memory", median("memory_mib"), "MiB"),
        Row(case.name, "peak resident memory", max(r["rss_mib"] for r in runs), "MiB"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    parser = common.parser(__doc__ or "")
    parser.add_argument(
        "--repetitions", type=int, default=None, help=f"of each case; {REPETITIONS} if not given"
    )
    options = parser.parse_args(arguments)
    cases = QUICK if options.quick else CASES
    repetitions = options.repetitions or (1 if options.quick else REPETITIONS)
    console.print(common.machine(), markup=False)
    rows: list[Row] = []
    for case in cases:
        runs = []
        for i in range(repetitions):
            runs.append(common.in_fresh_process("benchmarks.plan_time", asdict(case)))
            console.print(
                f"{case.name}: run {i + 1} of {repetitions} took {runs[-1]['total_s']:.2f} s, "
                f"{runs[-1]['method']}",
                markup=False,
            )
        rows += rows_of(case, runs)
    headline = "; ".join(
        f"{r.case}: {r.value:.2f} s" + (f" (target {r.target:g} s)" if r.target else "")
        for r in rows
        if r.metric == "module to plan"
    )
    plural = "s" if repetitions > 1 else ""
    title = f"Planning time, median of {repetitions} repetition{plural}"
    return common.finish(title, rows, headline, options.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        common.answer(work(Case(**json.loads(sys.argv[2]))))
    else:
        sys.exit(main())
