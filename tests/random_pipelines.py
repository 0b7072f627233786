"""Random pipelines on simulated ranks: cuts, schedule, microbatches and layouts are drawn.

The ranks are threads of one process (`autopar/testing/simulated_pipeline.py`). They train with
plain tensors for the shards of parameters, in float64, beside a model on one device.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from autopar import ClusterInfo
from autopar.compiled_step import Arguments, CompiledStep, Place, StepOptions, StepPlan
from autopar.ir.graph import ModelGraph
from autopar.ir.spec import ShardingSpec
from autopar.passes.apply_sharding import LocalProgram
from autopar.plan import ShardingPlan
from autopar.plan_records import PipelinePlan
from autopar.planner.decisions import FixedLayouts
from autopar.planner.planner import build_problem, make_plan, trainable_inputs
from autopar.planner.stages import schedule_of
from autopar.runtime.batch import BatchLayout
from autopar.runtime.call import Call
from autopar.runtime.distribute import shard_of
from autopar.runtime.pipeline_runtime import Pipeline
from autopar.runtime.split_compiler import SplitCompiler
from autopar.runtime.split_function import train
from autopar.runtime.split_step import SplitStep
from autopar.schedule.pipeline.schedules import SCHEDULES
from autopar.testing.simulated_pipeline import Mailboxes, SimulatedPipeline
from autopar.testing.simulated_ranks import SimulatedMesh
from autopar.tracer import ColoTracer
from tests.clusters import eager_to_shard
from tests.models import OPTIMIZERS
from tests.pipelines import MODELS, loss_of
from tests.planning import random_choices

NAMES = ("gpt2", "mlp", "unet", "experts", "thrice", "tied", "crossings", "frozen", "frozen end")
MESHES = ("pipe=2,data=2,tensor=2", "pipe=2", "pipe=3", "pipe=4", "pipe=2,data=2", "data=2,pipe=2")
STEPS = 2


@dataclass(frozen=True)
class Draw:
    """One pipeline; prints as what was drawn."""

    seed: int
    name: str
    mesh: str
    schedule: str
    microbatches: int
    optimizer: str

    @staticmethod
    def of(seed: int, *, small: bool = False) -> Draw:
        """Args:
        small: without the models and the mesh that take longest.
        """
        rng = np.random.default_rng(seed)
        names, meshes = (NAMES[1:], MESHES[1:]) if small else (NAMES, MESHES)
        return Draw(
            seed,
            names[rng.integers(len(names))],
            meshes[rng.integers(len(meshes))],
            str(rng.choice([name for name, row in SCHEDULES.items() if row.trains])),
            int(rng.integers(1, 9)),
            str(rng.choice(sorted(OPTIMIZERS))),
        )

    @property
    def cluster(self) -> ClusterInfo:
        return eager_to_shard(self.mesh)


class _Deciding:
    """Draws the plan of a microbatch, once for all ranks."""

    def __init__(self, draw: Draw, model: nn.Module) -> None:
        self.draw, self.model = draw, model
        self.rng = np.random.default_rng(draw.seed + 1)
        self.plans: dict[str, ShardingPlan] = {}

    def __call__(
        self, graph: ModelGraph, fixed: FixedLayouts, alike: CompiledStep | None, **_: Any
    ) -> StepPlan:
        if graph.fingerprint not in self.plans:
            cluster = self.draw.cluster.of_a_stage()
            problem = build_problem(self.model, cluster=cluster, graph=graph, fixed=fixed)
            choices = random_choices(problem.space, self.rng)
            plan = make_plan(problem.space, choices, type(self.model).__name__)
            pipeline = self._pipeline(graph) if alike is None else alike.plan.pipeline
            self.plans[graph.fingerprint] = replace(plan, pipeline=pipeline)
        return StepPlan(self.plans[graph.fingerprint])

    def _pipeline(self, graph: ModelGraph) -> PipelinePlan:
        draw, cluster = self.draw, self.draw.cluster
        assert cluster.pipe_axis is not None
        stages = cluster.pipeline_ranks * SCHEDULES[draw.schedule].stages_per_rank
        names = [n.name for n in graph.compute_nodes()]
        at = sorted(1 + self.rng.choice(len(names) - 1, stages - 1, replace=False))
        return PipelinePlan(
            cluster.pipe_axis, cluster.pipeline_ranks, tuple(names[k] for k in at), draw.schedule,
            draw.microbatches, (), 0.0, 0.0, (),
        )  # fmt: skip


class _Rank:
    """One rank, with plain tensors for shards."""

    def __init__(
        self, draw: Draw, model: nn.Module, graph: ModelGraph, decide: _Deciding,
        coords: tuple[int, ...], groups: tuple[str, ...], mail: Mapping[Any, Mailboxes],
    ) -> None:  # fmt: skip
        self.draw, self.model, self.graph, self.coords = draw, model, graph, coords
        cluster = draw.cluster
        axis = cluster.pipe_axis
        assert axis is not None
        self.axis, self.mesh = axis, cluster.of_a_stage().mesh
        self.inside = tuple(0 if k == axis else c for k, c in enumerate(coords))
        self.shards: dict[str, nn.Parameter] = {}
        self.where: dict[str, tuple[ShardingSpec, int | None]] = {}
        self.losses: list[float] = []
        place = Place(coords, groups)

        def pipeline_of(plan: PipelinePlan) -> Pipeline:
            return SimulatedPipeline.of(schedule_of(plan), coords[axis], mail[self.inside])

        batch = MODELS[draw.name].batch(0)
        call = Call.of((), batch)
        layout = BatchLayout.of("global", cluster, call, [])
        compiler = SplitCompiler(
            count=draw.microbatches,
            independent=False,
            batch_dim=0,
            pipeline=None,
            place=place,
            stage_place=place.of_a_stage(cluster),
            mesh=None,  # type: ignore[arg-type]
            device=torch.device("cpu"),
            cluster=cluster,
            options=StepOptions(cluster.of_a_stage()),
            decide=decide,
            planner=None,
            example=self._example,
            trace=None,  # type: ignore[arg-type]
            pipeline_of=pipeline_of,
        )
        trainable = trainable_inputs(graph, model)
        _, self.step, _ = compiler.compile(call, layout, graph, trainable, {})
        trained = [p for p in self.shards.values() if p.requires_grad]
        self.optimizer = OPTIMIZERS[draw.optimizer](trained)

    def _example(
        self, plan: ShardingPlan, owners: Mapping[str, int | None], graph: ModelGraph,
        local: LocalProgram,
    ) -> Arguments:  # fmt: skip
        """Lay the parameters out; tensors like those of the rank's program."""
        if not self.shards:
            specs = plan.parameter_specs()
            for name, p in self.model.named_parameters():
                if name in specs:
                    owner = owners[name]
                    part = shard_of(p.detach(), specs[name], self.mesh, self.inside).clone()
                    if owner is not None and owner != self.coords[self.axis]:
                        part = part.narrow(0, 0, 0).clone()
                    self.shards[name] = nn.Parameter(part, requires_grad=p.requires_grad)
                    self.where[name] = specs[name], owner
        nodes = local.gm.graph.find_nodes(op="placeholder")
        names = list(graph.parameters.values())
        tensors = [
            torch.zeros(node.meta["local_shape"], dtype=torch.float64).requires_grad_(
                self.shards[name].requires_grad
            )
            for name, node in zip(names, nodes, strict=False)
        ]
        buffers = dict(self.model.named_buffers())
        tensors += [buffers[n] for n in graph.buffers.values()]
        tensors += graph.constants.values()
        inputs = [graph.placeholders[n].meta["val"] for n in graph.inputs if n is not None]
        tensors += [
            shard_of(torch.zeros(x.shape, dtype=x.dtype), spec, self.mesh, self.inside)
            for x, spec in zip(inputs, local.input_specs, strict=True)
        ]
        return Arguments(tensors)

    def train(self) -> None:
        buffers = dict(self.model.named_buffers())
        for number in range(STEPS):
            batch = MODELS[self.draw.name].batch(number)
            flat = [self.shards[n] for n in self.graph.parameters.values()]
            flat += [buffers[n] for n in self.graph.buffers.values()]
            flat += self.graph.constants.values()
            results = train(self.step, *flat, *batch.values())
            results = self.graph.carry_out(self.model, list(results), [], {})
            loss = loss_of(results)
            self.optimizer.zero_grad()
            # the last step brings what was not expected, so that slices run again
            (loss if number < STEPS - 1 else loss * 0.5 + loss.detach() * loss).backward()
            self.losses.append(loss.item())
            self.optimizer.step()

    def gap(self, alone: nn.Module) -> float:
        """Largest difference of parameters and of the last gradients."""
        worst = 0.0
        whole = dict(alone.named_parameters())
        for name, shard in self.shards.items():
            spec, owner = self.where[name]
            if owner is not None and owner != self.coords[self.axis]:
                assert not shard.numel()
                continue
            pairs = [(shard.detach(), whole[name].detach())]
            if whole[name].grad is not None:
                assert shard.grad is not None, name
                pairs.append((shard.grad, whole[name].grad))
            for mine, theirs in pairs:
                expected = shard_of(theirs, spec, self.mesh, self.inside)
                assert mine.shape == expected.shape
                if mine.numel():
                    worst = max(worst, (mine - expected).abs().max().item())
        return worst


def largest_error(draw: Draw) -> float:
    """Largest difference to one device: losses, parameters, gradients."""
    alone = MODELS[draw.name].build()
    model = copy.deepcopy(alone)
    batch = MODELS[draw.name].batch(0)
    graph = ColoTracer().trace(model, (), batch)
    decide, cluster = _Deciding(draw, model), draw.cluster
    axis, sizes = cluster.pipe_axis, cluster.mesh
    mail = {
        tuple(0 if k == axis else c for k, c in enumerate(coords)): Mailboxes()
        for coords in product(*map(range, sizes))
    }
    with SimulatedMesh(sizes, timeout_s=60) as mesh:
        ranks = {
            c: _Rank(draw, model, graph, decide, c, groups, mail)
            for c, groups in mesh.groups.items()
        }
        _agree_on_results({c: rank.step for c, rank in ranks.items()})
        mesh.run(lambda coords: ranks[coords].train())
    losses = _reference(draw.name, draw.optimizer, alone)
    worst = max(
        abs(a - b) for rank in ranks.values() for a, b in zip(rank.losses, losses, strict=True)
    )
    return max(worst, *(rank.gap(alone) for rank in ranks.values()))


def _agree_on_results(steps: Mapping[Any, SplitStep]) -> None:
    """What ranks tell each other when they compile: which results have gradients."""
    flags = [any(each) for each in zip(*(s.differentiable for s in steps.values()), strict=True)]
    expected = next((s.expected for s in steps.values() if s.expected), None)
    for step in steps.values():
        step.differentiable, step.expected = flags, expected


def _reference(name: str, optimizer: str, alone: nn.Module) -> list[float]:
    made = OPTIMIZERS[optimizer]([p for p in alone.parameters() if p.requires_grad])
    losses = []
    for number in range(STEPS):
        loss = loss_of(alone(**MODELS[name].batch(number)))
        made.zero_grad()
        (loss if number < STEPS - 1 else loss * 0.5 + loss.detach() * loss).backward()
        losses.append(loss.item())
        made.step()
    return losses
