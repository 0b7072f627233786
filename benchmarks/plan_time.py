"""How long planning takes: from a module on the meta device to the plan, stage by stage.

GPT-2, Llama 3, Mixtral and vision models at their published dimensions, planned for A100-80G, or
for H100 with whatever makes them fit the memory. Every repetition is a process of its own, so that
nothing is cached; imports are measured separately. The table shows medians.

With `--jitter`, each case is built once and searched with costs that differ by up to 5%
(`benchmarks/jitter.py`): the time of planning should not depend on luck. What is chosen to fit the
memory is left out there, as it consists of several searches.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import common, jitter
from benchmarks.common import Row, console

REPETITIONS = 3
# of every case: the gap in percent, and the memory of planning
GAP, RSS_MIB = 0.1, 2048
DEVICE = "A100-80G"


@dataclass(frozen=True)
class Case:
    """One planning problem.

    Args:
        model: a key of `MODELS`.
        mesh: such as "2x4".
        target_s: for the time from module to plan; None for none.
        layers: of the model; its own number if None.
        memory: budget per device; all of the device if None.
        device: a name of the table of devices.
        fit: recompute and split the batch where that is what fits.
        verbose: print the planner's progress.
    """

    model: str
    mesh: str
    target_s: float | None = None
    layers: int | None = None
    memory: str | None = None
    device: str = DEVICE
    fit: bool = False
    verbose: bool = False

    @property
    def name(self) -> str:
        layers = f", {self.layers} layers" if self.layers else ""
        budget = f", {self.memory}" if self.memory else ""
        fit = ", whatever makes it fit" if self.fit else ""
        return f"{self.model}{layers}, mesh {self.mesh}{budget}{fit}"


CASES = (
    Case("GPT-2", "8", 3.0),
    Case("GPT-2", "2x4", 5.0),
    Case("GPT-2", "2x2x2", 8.0),
    Case("GPT-2", "2x2x2x2x2"),
    Case("GPT-2", "2x4", memory="700MiB"),
    Case("GPT-2", "2x4", 6.0, memory="600MiB", fit=True),
    Case("Llama-3-8B, 16 texts of 8192", "8", 20.0, device="H100", fit=True),
    Case("Llama-3-8B, 16 texts of 8192", "2x4", 20.0, device="H100", fit=True),
    Case("Llama-3-70B, 64 texts of 8192", "8x8", 40.0, device="H100", fit=True),
    Case("Llama-3-8B", "8x8", 8.0),
    Case("Llama-3-8B", "4x8x8", 15.0),
    Case("Llama-3-8B", "4x4x4"),
    Case("Llama-3-8B, 16 texts of 65536", "32x64x8"),
    Case("Llama-3-405B", "8x16x8", layers=12),
    Case("Llama-3-405B", "8x16x8", 30.0),
    Case("ViT-L/16", "2x4", 8.0),
    Case("Swin-B", "2x4", 8.0),
    Case("ResNet-152", "2x4", 8.0),
    Case("ConvNeXt-L", "2x4", 8.0),
    Case("Mixtral-8x7B", "4x8", 15.0),
)
QUICK = (Case("GPT-2", "8", layers=2), Case("GPT-2", "2x4", layers=2))


def _gpt2(layers: int | None) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=layers or 12, vocab_size=50257, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _llama(hidden: int, inner: int, heads: int, blocks: int) -> Callable[[int | None], Any]:
    def build(layers: int | None) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads,
            num_key_value_heads=8, num_hidden_layers=layers or blocks, vocab_size=128256,
            max_position_embeddings=8192, use_cache=False,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    return build


def _mixtral(layers: int | None) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(num_hidden_layers=layers or 32, use_cache=False))


def _timm(name: str) -> Callable[[int | None], Any]:
    def build(layers: int | None) -> Any:
        import timm

        return timm.create_model(name)

    return build


@dataclass(frozen=True)
class Model:
    """How to build a model, and its batch: [samples, tokens], or images if there are no tokens."""

    build: Callable[[int | None], Any]
    samples: int
    tokens: int = 0
    dtype: str = "bfloat16"
    pixels: int = 224


MODELS = {
    "GPT-2": Model(_gpt2, 16, 128, dtype="float32"),
    "Llama-3-8B": Model(_llama(4096, 14336, 32, 32), 64, 4096),
    "Llama-3-8B, 16 texts of 8192": Model(_llama(4096, 14336, 32, 32), 16, 8192),
    "Llama-3-8B, 16 texts of 65536": Model(_llama(4096, 14336, 32, 32), 16, 65536),
    "Llama-3-70B, 64 texts of 8192": Model(_llama(8192, 28672, 64, 80), 64, 8192),
    "Llama-3-405B": Model(_llama(16384, 53248, 128, 126), 64, 4096),
    "Mixtral-8x7B": Model(_mixtral, 32, 4096),
    "ViT-L/16": Model(_timm("vit_large_patch16_224"), 256),
    "Swin-B": Model(_timm("swin_base_patch4_window7_224"), 256),
    "ResNet-152": Model(_timm("resnet152"), 256),
    "ConvNeXt-L": Model(_timm("convnext_large"), 256),
}


def build(case: Case) -> tuple[Any, dict[str, Any]]:
    """A model that returns its loss, on the meta device, and a batch."""
    import logging

    import torch

    from benchmarks.losses import Classifier, LossOnly

    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = MODELS[case.model]
    with torch.device("meta"):
        module = model.build(case.layers).to(getattr(torch, model.dtype)).train()
        if model.tokens:
            ids = torch.zeros(model.samples, model.tokens, dtype=torch.long)
            return LossOnly(module), {"input_ids": ids, "labels": ids}
        shape = (model.samples, 3, model.pixels, model.pixels)
        images = torch.zeros(shape, dtype=getattr(torch, model.dtype))
        labels = torch.zeros(model.samples, dtype=torch.long)
        return Classifier(module), {"images": images, "labels": labels}


def work(case: Case) -> dict[str, Any]:
    """Plan once, in this process; return what was measured."""
    start = time.perf_counter()
    import torch  # noqa: F401

    from autopar import ClusterInfo, autoplan
    from autopar.compile import plan_to_fit

    imports = time.perf_counter() - start
    module, batch = build(case)
    cluster = ClusterInfo.of(case.mesh, case.device)
    say = (lambda line: print(line, file=sys.stderr)) if case.verbose else None
    start, busy = time.perf_counter(), time.process_time()
    options: dict[str, Any] = {"cluster": cluster, "memory": case.memory, "progress": say}
    if case.fit:
        plan = plan_to_fit(module, (), batch, **options).planned.plan
    else:
        plan = autoplan(module, (), batch, **options).plan
    total = time.perf_counter() - start
    return {
        "imports_s": imports,
        "total_s": total,
        "busy_s": time.process_time() - busy,
        "stages_s": dict(plan.solver.seconds),
        "gap": plan.solver.gap,
        "method": plan.solver.method,
        "step_ms": plan.time.step_us / 1e3,
        "memory_mib": plan.memory.total_bytes / 2**20,
        "rss_mib": common.peak_rss_mib(),
    }


def jitter_work(case: Case, seeds: int) -> dict[str, Any]:
    """Plan once up to the search, and search with the costs of each seed, in this process."""
    from autopar import ClusterInfo
    from autopar.planner.planner import build_problem
    from autopar.progress import TIME_LIMIT

    module, batch = build(case)
    cluster = ClusterInfo.of(case.mesh, case.device).with_memory(case.memory)
    start = time.process_time()
    problem = build_problem(module, (), batch, cluster=cluster)
    before = time.process_time() - start
    runs = jitter.work(problem.space, cluster.budget_bytes, range(seeds), TIME_LIMIT)
    return {"before_s": before, "runs": runs}


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
        Row(case.name, "processor time", median("busy_s"), "s"),
        *(Row(case.name, stage, seconds, "s") for stage, seconds in stages.items()),
        Row(case.name, "the plan's text and estimates", statistics.median(rest), "s"),
        Row(case.name, "imports (torch, autopar), separate", median("imports_s"), "s"),
        Row(case.name, "gap to the bound", 100 * max(r["gap"] for r in runs), "%", GAP),
        Row(case.name, "predicted step", median("step_ms"), "ms"),
        Row(case.name, "predicted memory", median("memory_mib"), "MiB"),
        Row(case.name, "peak resident memory", max(r["rss_mib"] for r in runs), "MiB", RSS_MIB),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    parser = common.parser(__doc__ or "")
    parser.add_argument(
        "--repetitions", type=int, default=None, help=f"of each case; {REPETITIONS} if not given"
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--verbose", action="store_true", help="show the planner's progress")
    parser.add_argument("--jitter", action="store_true", help="costs that differ by up to 5%%")
    parser.add_argument(
        "--seeds", type=int, help=f"of --jitter; {jitter.SEEDS}, {jitter.QUICK_SEEDS} if quick"
    )
    options = parser.parse_args(arguments)
    cases = [c for c in (QUICK if options.quick else CASES) if options.only in c.name]
    cases = [replace(c, verbose=options.verbose) for c in cases]
    repetitions = options.repetitions or (1 if options.quick else REPETITIONS)
    console.print(common.machine(), markup=False)
    if options.jitter:
        seeds = options.seeds or (jitter.QUICK_SEEDS if options.quick else jitter.SEEDS)
        return _jittered([case for case in cases if not case.fit], seeds, options.json)
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


def _jittered(cases: Sequence[Case], seeds: int, path: Path | None) -> int:
    """Measure with jittered costs; returns the exit code."""
    rows: list[Row] = []
    for case in cases:
        answer = common.in_fresh_process(
            "benchmarks.plan_time", asdict(case) | {"seeds": seeds}, timeout_s=3600
        )
        rows += jitter.rows_of(case.name, answer["before_s"], answer["runs"])
        seconds = ", ".join(f"{s:.1f}" for s in sorted(answer["runs"]["seconds"]))
        console.print(f"{case.name}: searches of {seconds} s", markup=False, soft_wrap=True)
    ratios = [r for r in rows if r.metric.endswith("planning, 95th percentile / median")]
    worst = max(ratios, key=lambda r: r.value)
    gap = max(r.value for r in rows if r.metric.endswith("gap"))
    headline = (
        f"95th percentile at most {worst.value:.2f} x the median ({worst.case}), gap at most "
        f"{gap:.2f}%"
    )
    title = f"Planning time with jittered costs, {seeds} seeds"
    return common.finish(title, rows, headline, path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        given = json.loads(sys.argv[2])
        seeds = given.pop("seeds", 0)
        case = Case(**given)
        common.answer(jitter_work(case, seeds) if seeds else work(case))
    else:
        sys.exit(main())
