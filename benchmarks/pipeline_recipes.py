"""Pipelines on 64 to 1024 GPUs against published degrees of parallelism, under the cost model.

A recipe pins the mesh, the schedule, the stages and the microbatches. Its layouts within a stage
are those of a baseline in the same search space (`autopar/planner/baselines.py`), as in
`benchmarks.recipes`. Blocks are recomputed where they have to be, in all plans: all fit the memory
of a device. autopar chooses everything but the mesh, on a few meshes of as many devices, the
published one first, until planning has taken 90 s of processor time; with its own layouts and the
recipe's pipeline it is shown beside.

    model            GPUs  tensor, pipeline, data  schedule                  batch, microbatch
    GPT-3 175B       64    8, 8, 1                 interleaved, 3 per rank   64, 1     (1)
    GPT-3 175B       1024  8, 16, 8                1F1B                      1536, 1   (2)
    Llama 3.1 405B   512   8, 8, 8                 interleaved, 2 per rank   256, 1    (3)

(1) Korthikanti et al. 2022, table 3. (2) Megatron-LM, `examples/pretrain_gpt3_175B.sh`. (3)
torchtitan, `benchmarks/llama3_h100_202412_torchtitan.md`, table 5, where it says neither how many
stages a rank has nor how large a microbatch is: two, and one sample for each data rank. Its GPUs
have 96 GB. float8 and asynchronous tensor parallelism are left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.common import Row, console
from benchmarks.recipes import BOTH, MEGATRON, MODELS, TARGET

MEGATRON_ALONE = "Megatron TP"
PLANNING_S = 90.0
# Seconds of the solver, per mesh.
TIME_LIMIT = 20.0


@dataclass(frozen=True)
class Recipe:
    """A published way to train.

    Args:
        model: a key of `recipes.MODELS`.
        mesh: pipe outermost.
        device: of `autopar devices`.
        baseline: layouts within a stage; the beginning of the baseline's name.
        schedule: name and stages per rank.
        samples: of the batch.
        microbatches: of the batch.
        meshes: others of as many devices.
        memory: of a device, if it is not that of the table.
    """

    model: str
    mesh: str
    device: str
    baseline: str
    schedule: tuple[str, int]
    samples: int
    microbatches: int
    meshes: tuple[str, ...] = ()
    memory: str | None = None

    @property
    def name(self) -> str:
        return f"{self.model}, {self.mesh}"

    @property
    def stages(self) -> str:
        """Modules at which stages begin: as many blocks in each, fewer at the ends if they do not
        divide."""
        pipe = int(self.mesh.split(",")[0].removeprefix("pipe="))
        count = pipe * self.schedule[1]
        layers = MODELS[self.model].layers
        blocks = "model.model.decoder.layers" if "GPT" in self.model else "model.model.layers"
        # what the ends lack of a block is the embedding and the head
        padded = math.ceil(layers / count) * count
        ahead = (padded - layers) // 2
        return ",".join(f"{blocks}.{padded * k // count - ahead}" for k in range(1, count))


RECIPES = (
    Recipe(
        "GPT-3 175B", "pipe=8,tensor=8", "A100-80G", MEGATRON_ALONE, ("interleaved", 3), 64, 64,
        ("pipe=4,data=2,tensor=8", "pipe=2,data=4,tensor=8"),
    ),
    Recipe(
        "GPT-3 175B", "pipe=16,data=8,tensor=8", "A100-80G", MEGATRON, ("1f1b", 1), 1536, 192,
        ("pipe=8,data=16,tensor=8", "pipe=4,data=32,tensor=8"),
    ),
    Recipe(
        "Llama 3 405B", "pipe=8,data=8,tensor=8", "H100", BOTH, ("interleaved", 2), 256, 32,
        ("pipe=4,data=16,tensor=8", "pipe=2,data=32,tensor=8"), memory="96GB",
    ),
)  # fmt: skip


def compare(recipe: Recipe, others: Sequence[str]) -> Iterator[Row]:
    """The recipe's plan, and autopar's on its mesh and on others."""
    import torch

    from autopar import ClusterInfo
    from autopar.errors import AutoparError
    from autopar.planner.batch import TracedBatch
    from autopar.planner.microbatched import BatchPlanner
    from autopar.planner.stages import PipelineOptions
    from autopar.progress import Progress

    of = MODELS[recipe.model]
    model = of.build(of.layers)
    with torch.device("meta"):
        ids = torch.zeros(recipe.samples, of.tokens, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids}
    begin = time.process_time()
    traced = TracedBatch.of(model, (), batch, 0, None, Progress.of(None))
    split = traced.exact()
    captured_s = time.process_time() - begin

    def planner(mesh: str, schedule: str | None, stages: str | None) -> Any:
        cluster = ClusterInfo.of(mesh, recipe.device).with_memory(recipe.memory)
        pipeline = PipelineOptions.of(cluster, schedule, stages)
        return BatchPlanner(
            model, split, recipe.samples, cluster, pipeline, {"time_limit": TIME_LIMIT}
        )

    pinned = planner(recipe.mesh, recipe.schedule[0], recipe.stages)
    published = _published(pinned, recipe)
    console.print(f"  recipe: {_words(published)}", markup=False, soft_wrap=True)
    layouts = pinned.plan(recipe.microbatches).plan
    best: Any = None
    slowest_s = total_s = 0.0
    for mesh in (recipe.mesh, *others):
        if captured_s + total_s > PLANNING_S:
            console.print(f"  {mesh}: no time left", markup=False)
            continue
        begin = time.process_time()
        try:
            plan = planner(mesh, None, None).plan(None).plan
        except AutoparError as error:
            console.print(f"  {mesh}: {str(error)[:200]}", markup=False, soft_wrap=True)
            continue
        spent = time.process_time() - begin
        slowest_s, total_s = max(slowest_s, captured_s + spent), total_s + spent
        console.print(f"  {mesh}, {spent:.0f} s: {_words(plan)}", markup=False, soft_wrap=True)
        if best is None or plan.time.step_us < best.time.step_us:
            best = plan
    yield Row(recipe.name, recipe.baseline, 1e-3 * published.time.step_us, "ms")
    yield Row(recipe.name, "its pipeline, autopar's layouts", 1e-3 * layouts.time.step_us, "ms")
    yield Row(recipe.name, "autopar", 1e-3 * best.time.step_us, "ms")
    for name, plan in (("recipe", published), ("autopar", best)):
        yield Row(recipe.name, f"bubble, {name}", 100 * plan.pipeline.bubble_fraction, "%")
        peak = max(plan.pipeline.peak_bytes) / 2**30
        yield Row(recipe.name, f"memory, {name}", peak, "GiB", plan.budget_bytes / 2**30)
    ratio = layouts.time.step_us / published.time.step_us
    yield Row(recipe.name, "autopar's layouts / recipe", ratio, "x", TARGET)
    ratio = best.time.step_us / published.time.step_us
    yield Row(recipe.name, "autopar / recipe", ratio, "x", TARGET)
    yield Row(recipe.name, "capture", captured_s, "s")
    yield Row(recipe.name, "planning, slowest mesh with capture", slowest_s, "s", PLANNING_S)
    yield Row(recipe.name, "planning, all meshes that were tried", captured_s + total_s, "s")
    console.print(f"  autopar: {_words(best)}", markup=False, soft_wrap=True)


def _published(planner: Any, recipe: Recipe) -> Any:
    """The plan of the recipe, with the layouts of its baseline."""
    from autopar.planner.baselines import baseline_plans
    from autopar.planner.planner import Planned, build_problem, make_plan
    from autopar.planner.stages import plan_stages

    size = -(-recipe.samples // recipe.microbatches)
    problem = build_problem(
        planner.model, graph=planner.split.graph(size), cluster=planner.cluster.of_a_stage(),
        time_limit=TIME_LIMIT,
    )  # fmt: skip
    space = problem.space
    (baseline,) = baseline_plans(space, time_limit=TIME_LIMIT, named=recipe.baseline)
    plan = make_plan(space, baseline.choices, recipe.model)
    plan = replace(plan, budget_bytes=planner.cluster.budget_bytes)
    planned = Planned(plan, problem.space.graph, space, baseline.choices)
    return plan_stages(planned, planner.pipeline, recipe.samples, recipe.microbatches)


def _words(plan: Any) -> str:
    pipeline = plan.pipeline
    per_rank = len(pipeline.stages) // pipeline.ranks
    return (
        f"{1e-6 * plan.time.step_us:.2f} s, {pipeline.schedule.splitlines()[0]}, "
        f"{per_rank} stages a rank, {plan.microbatches} microbatches, "
        f"bubble {100 * pipeline.bubble_fraction:.1f}%"
    )


def compare_all(only: str, *, quick: bool) -> Iterator[Row]:
    """All recipes; the first one, without other meshes, if quick."""
    for recipe in RECIPES[:1] if quick else RECIPES:
        if only in recipe.name:
            console.print(f"{recipe.name}:", markup=False)
            yield from compare(recipe, () if quick else recipe.meshes)
