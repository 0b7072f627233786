"""Predictions of published runs: each is a baseline plan of autopar, with its pipeline.

Blocks of a model are alike, so one of them is captured, costed and laid out, and stands for all.
Where parameters are gathered beside compute, a block costs what the second of two adds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from autopar.cluster.cluster import NETWORKS, ClusterInfo
from autopar.cluster.software import SOFTWARE
from autopar.ir.precision import Precision
from autopar.planner.baselines import baseline_plans
from autopar.planner.estimate import (
    estimate_memory,
    estimate_time,
    optimizer_us,
)
from autopar.planner.liveness import Liveness
from autopar.planner.pipeline_blocks import operator_chain
from autopar.planner.planner import PlanningProblem, build_problem
from autopar.planner.space import SearchSpace
from autopar.planner.stage_names import firsts_of
from autopar.schedule.pipeline.blocks import Block, Chain
from autopar.schedule.pipeline.option import Option
from autopar.schedule.pipeline.timeline import StageCost, peak_bytes, simulate
from autopar.tracer import ColoTracer
from benchmarks.published_frameworks import (
    as_published,
    as_run,
    context_axis,
    gathers,
    in_few_bits,
    load_balanced,
    log_probabilities_bytes,
    recompute,
    short_gathers,
)
from benchmarks.published_models import Decoder, ModelShape
from benchmarks.published_rows import Run

UNLIMITED = 1e15


@dataclass(frozen=True)
class Prediction:
    """A predicted step.

    Args:
        step_s: seconds.
        peak_gib: of the fullest rank.
        activation_gib: of these, activations.
        parts_s: of the first stage: forward, backward, and what follows the last backward.
    """

    step_s: float
    peak_gib: float
    activation_gib: float
    parts_s: dict[str, float]


def predict(run: Run) -> Prediction:
    """The step time and memory of a run."""
    return _Predictor(run).prediction()


def cluster_of(run: Run) -> ClusterInfo:
    """The devices and links of a run, pipe axis outermost."""
    degrees = {
        "pipe": run.pipe, "data": run.data, "context": run.context, "tensor": run.tensor,
    }  # fmt: skip
    axes = {name: n for name, n in degrees.items() if n > 1} or {"data": 1}
    mesh = ",".join(f"{name}={n}" for name, n in axes.items())
    cluster = ClusterInfo.of(
        mesh, run.device, network=NETWORKS[run.network], software=SOFTWARE[run.software],
        node_size=run.node_size,
    )  # fmt: skip
    return cluster.with_memory(UNLIMITED)


class _Predictor:
    def __init__(self, run: Run) -> None:
        self.run, self.cluster = run, cluster_of(run)

    def prediction(self) -> Prediction:
        if self.run.sharded in ("parameters", "gradients") and self.run.pipe == 1:
            return self.gathered()
        run = self.run
        stages = run.pipe * run.stages_per_rank
        parts, working = blocks_of(self.key())
        blocks, more = ([a, *[b] * run.shape.layers, c] for a, b, c in (parts, working))
        borders = self.borders(stages)
        link = self.cluster.links[0]
        name = "interleaved" if run.stages_per_rank > 1 else "1f1b"
        option = Option(
            name, run.pipe, run.stages_per_rank, run.microbatches, Chain(blocks, link, False),
            UNLIMITED, "all" if run.recompute == "full" else "none",
        )  # fmt: skip
        recomputes = run.recompute == "full"
        counts = tuple((b - a) * recomputes for a, b in pairwise(borders))
        costs = option.costs(borders, counts)
        schedule = option.schedule()
        timeline = simulate(schedule, costs)
        states = [sum(costs[s].state_bytes for s in own) for own in schedule.stages_of_rank]
        activations = [a - b for a, b in zip(timeline.peak_bytes, states, strict=True)]
        spans = [*pairwise(borders)]
        if run.stage_buffers:
            costs = self.with_buffers(costs, [blocks[b - 1] for _, b in spans])
        costs = [
            replace(c, recomputed_bytes=max(c.recomputed_bytes, *more[a:b]))
            for c, (a, b) in zip(costs, spans, strict=True)
        ]
        one, peak = costs[0], max(peak_bytes(schedule, costs))
        return Prediction(
            1e-6 * timeline.step_us, peak / 2**30, max(activations) / 2**30,
            {
                "forward": 1e-6 * one.forward_us, "backward": 1e-6 * one.backward_us,
                "after": 1e-6 * one.after_us,
            },
        )  # fmt: skip

    def with_buffers(
        self, costs: Sequence[StageCost], before_cuts: Sequence[Block]
    ) -> list[StageCost]:
        """Stages that hold, from the first step on, a buffer per microbatch for the input and for
        the gradient that they receive, and during a step what they send, as torch's pipelines do
        (`torch/distributed/pipelining/stage.py`). The results of the last stage are logits.

        Args:
            before_cuts: the last block of every stage.
        """
        run, held = self.run, []
        tokens = run.microbatch * run.shape.tokens // run.context
        logits = 2.0 * tokens * run.shape.vocabulary / run.tensor
        for s, (cost, block) in enumerate(zip(costs, before_cuts, strict=True)):
            takes = before_cuts[s - 1].forward_bytes if s else 0.0  # is a checkpoint as well
            gives = logits if s + 1 == len(costs) else block.forward_bytes + block.backward_bytes
            state_bytes = cost.state_bytes + run.microbatches * (takes + gives)
            held.append(
                replace(
                    cost, state_bytes=state_bytes, held_bytes=max(0.0, cost.held_bytes - takes),
                    weight_bytes=0.0,
                )
            )  # fmt: skip
        return held

    def gathered(self) -> Prediction:
        """A step of microbatches that each gather parameters and reduce gradients beside compute.
        What a block adds follows from two depths."""
        run, few, more = self.run, 1, 2
        at = [microbatch_of(self.key(n)) for n in (few, more)]
        pass_us, waits_us, step_us, peak = (
            a + (run.shape.layers - few) * (b - a) / (more - few) for a, b in zip(*at, strict=True)
        )
        total = run.microbatches * (pass_us + waits_us) + step_us
        return Prediction(
            1e-6 * total, peak / 2**30, 0.0,
            {"pass": 1e-6 * pass_us, "waits": 1e-6 * waits_us, "after": 1e-6 * step_us},
        )  # fmt: skip

    def borders(self, stages: int) -> tuple[int, ...]:
        """Where stages begin among embedding, blocks and head; as many blocks in each."""
        layers = self.run.shape.layers
        inner = [1 + layers * k // stages for k in range(1, stages)]
        return (0, *inner, layers + 2)

    def key(self, layers: int = 1) -> Run:
        """The run without what does not change costs of a microbatch."""
        shape = replace(self.run.shape, layers=layers)
        return replace(self.run, shape=shape, microbatches=1, stages_per_rank=1)


@cache
def blocks_of(key: Run) -> tuple[tuple[Block, Block, Block], tuple[float, float, float]]:
    """The embedding, a block and the head, on a rank of a stage; and bytes that the backward of
    each has at once beyond what it was left."""
    space, choices = laid_out(key)
    chain = as_run(operator_chain(space, choices), space, choices, key)
    places = firsts_of(space.graph, "layers.0,norm")
    first, layer, last = chain.between(places)
    # frameworks recompute blocks alone
    first = replace(first, recompute_us=0.0, checkpoint_bytes=first.held_bytes)
    last = replace(last, recompute_us=0.0, checkpoint_bytes=last.held_bytes)
    at = [0, *places, len(chain.nodes)]
    peaks = [backward_bytes(space, choices, a, b) for a, b in pairwise(at)]
    peaks[2] += log_probabilities_bytes(space, choices)
    left = (
        block.checkpoint_bytes if key.recompute == "full" else block.held_bytes
        for block in (first, layer, last)
    )
    a, b, c = (max(0.0, peak - held) for peak, held in zip(peaks, left, strict=True))
    return (first, layer, last), (a, b, c)


def backward_bytes(space: SearchSpace, choices: Sequence[int], first: int, end: int) -> float:
    """The most bytes that the backward of operators first to end - 1 has at once: what they saved,
    gradients of activations, and gradients of weights that are not yet summed."""
    held, gradients = np.zeros(end - first), 0.0
    for item in Liveness(space, math.inf).memory.items:
        edge = space.edges[item.index] if item.is_edge else None
        if not first <= item.first < end or item.kind not in ("activations", "transient"):
            continue
        value = float(item.values[tuple(choices[i] for i in item.decisions)])
        if edge is not None and edge.weight:  # gathered once for all microbatches
            gradients += value * edge.grad
        else:
            held[item.first - first : item.last + 1 - first] += value
    return float(held.max(initial=0.0)) + gradients


@cache
def microbatch_of(key: Run) -> tuple[float, float, float, float]:
    """Of a microbatch whose parameters are gathered: passes and exposed communication in us; the
    optimizer's step in us; peak memory in bytes."""
    space, choices = laid_out(key)
    again_bytes = 0.0
    if key.recompute in ("full", "half"):
        again_bytes = recompute(space, choices, key.recompute)
    liveness = Liveness(space, math.inf)
    peak = estimate_memory(space, choices, liveness).total_bytes + again_bytes
    peak += log_probabilities_bytes(space, choices)
    time, step_us = estimate_time(space, choices, liveness), optimizer_us(space, choices)
    again_us = sum(us for _, us in gathers(space, choices)) if again_bytes else 0.0
    less_us = 0.0
    for _, forward_us, backward_us in short_gathers(space, choices, key):
        less_us += forward_us * (2 if again_bytes else 1) + backward_us
    return time.compute_us - step_us, time.exposed_us + again_us - less_us, step_us, peak


@cache
def _graph(shape: ModelShape, samples: int, dtype: str, sums: str, master: bool) -> Any:
    with torch.device("meta"):
        model = Decoder(shape)
        ids = torch.zeros(samples, shape.tokens, dtype=torch.int64)
    precision = None
    if master:
        precision = Precision(dtype, "float32", sums or dtype)
    else:
        model = model.to(getattr(torch, dtype))
    tracer = ColoTracer(precision=precision)
    return model, tracer.trace(model, (), {"ids": ids, "labels": ids})


def laid_out(key: Run) -> tuple[SearchSpace, tuple[int, ...]]:
    """The space of a microbatch on the mesh of a stage, and the choices of the baseline."""
    problem = problem_of(key)
    space = problem.space
    if key.short:
        in_few_bits(space, key)
    if key.context > 1:
        load_balanced(space)
    if space.cluster.world_size == 1:
        return space, tuple(problem.decide().choices)
    (plan,) = baseline_plans(
        space, named=_baseline(key), sequence=key.sequence,
        gathers_again=key.sharded == "parameters", context=context_axis(space, key),
        mask=as_published(space, key),
    )  # fmt: skip
    return space, plan.choices


def problem_of(key: Run) -> PlanningProblem:
    model, graph = _graph(key.shape, key.microbatch * key.data, key.dtype, key.sums, key.master)
    state = 2.0 if key.master else 6.0  # moments; and weights in float32
    return build_problem(
        model, graph=graph, cluster=cluster_of(key).of_a_stage(), optimizer_state=state
    )


def _baseline(key: Run) -> str:
    several = key.data * key.context > 1
    if key.sharded and several:
        return "FSDP" if key.tensor == 1 else "Megatron TP, FSDP"
    if key.tensor == 1:
        return "DDP"
    return "Megatron TP, data parallel" if several else "Megatron TP"
