"""Compiles a call of a model as a step that runs in microbatches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.fx as fx
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from autopar.cluster.cluster import ClusterInfo
from autopar.comm.stored_layout import StoredLayout
from autopar.compile import apply_plan
from autopar.compiled_stages import CompiledSlice, compile_stages, stage_programs
from autopar.compiled_step import Arguments, CompiledStep, Place, StepOptions, StepPlan
from autopar.errors import EngineError, PlanError
from autopar.ir.graph import ModelGraph, shape_of
from autopar.ir.spec import ShardingSpec
from autopar.passes.apply_sharding import LocalProgram
from autopar.passes.cut import StageProgram
from autopar.passes.microbatches import (
    Microbatches,
    exact_microbatches,
    independent_microbatches,
)
from autopar.passes.split_regions import split_regions
from autopar.passes.time_split import even_sizes
from autopar.plan import ShardingPlan
from autopar.plan_records import PipelinePlan
from autopar.planner.decisions import FixedLayouts
from autopar.planner.microbatched import BatchPlanner
from autopar.planner.stages import PipelineOptions, schedule_of
from autopar.runtime.batch import BatchDim, BatchLayout, batch_dims
from autopar.runtime.bound_step import WholeResult
from autopar.runtime.call import Call
from autopar.runtime.pipeline_runtime import Pipeline
from autopar.runtime.split_binder import SplitBinder
from autopar.runtime.split_step import SplitStep

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitCompiler:
    """
    Args:
        count: of microbatches; chosen if None.
        independent: each is a batch of its own.
        batch_dim: of the inputs, where all ranks pass the same batch.
        pipeline: its ranks, and what is fixed of it; None without one.
        place: of this rank; `stage_place` on the mesh of its stage.
        cluster: of all ranks.
        options: of the stages, with the cluster of one.
        decide: the plan of a microbatch, as `StepPlanner.decide`; on rank 0.
        planner: of a batch in microbatches, with layouts that are fixed.
        example: tensors that a program of a microbatch is called with; lays parameters out.
        trace: captures the model for a call.
        pipeline_of: this rank's place in the pipeline of a plan.
    """

    count: int | None
    independent: bool
    batch_dim: BatchDim
    pipeline: PipelineOptions | None
    place: Place
    stage_place: Place
    mesh: DeviceMesh
    device: torch.device
    cluster: ClusterInfo
    options: StepOptions
    decide: Callable[..., StepPlan]
    planner: Callable[[Microbatches, int, FixedLayouts], BatchPlanner] | None
    example: Callable[[ShardingPlan, Mapping[str, int | None], ModelGraph, LocalProgram], Arguments]
    trace: Callable[[Call], ModelGraph]
    pipeline_of: Callable[[PipelinePlan], Pipeline]

    def compile(
        self,
        call: Call,
        layout: BatchLayout,
        graph: ModelGraph,
        trainable: frozenset[str],
        stored: Mapping[str, StoredLayout],
    ) -> tuple[CompiledStep, SplitStep, dict[int, WholeResult]]:
        """Compile the step of a call.

        Args:
            graph: of the call.
            trainable: placeholder names of the parameters that require grad.
            stored: how parameters are laid out already, by name.

        Raises:
            NotSeparableError: the batch cannot be split exactly.
        """
        samples, dims = self._dims(layout)
        self._check(call, layout, samples)
        if not layout.local and min(samples, self.count or samples) <= 1:
            # one microbatch is the batch, and nothing has to separate
            return replace(self, count=1, independent=False)._compile(
                call, layout, graph, trainable, stored, max(samples, 1), {}
            )
        elif self.count is not None and self.count > samples:
            log.info("%d microbatches of %d samples: one each", samples, samples)
            return replace(self, count=samples)._compile(
                call, layout, graph, trainable, stored, samples, dims
            )
        return self._compile(call, layout, graph, trainable, stored, samples, dims)

    def _compile(
        self, call: Call, layout: BatchLayout, graph: ModelGraph, trainable: frozenset[str],
        stored: Mapping[str, StoredLayout], samples: int, dims: Mapping[int, int],
    ) -> tuple[CompiledStep, SplitStep, dict[int, WholeResult]]:  # fmt: skip
        ranks = layout.cluster.world_size if layout.local else 1
        split = self._split(call, graph, trainable, dims, samples * ranks, ranks)
        fixed = FixedLayouts(parameters={name: layout.spec for name, layout in stored.items()})
        chosen = self._chosen(split, samples, fixed)
        count = self.count if chosen is None else chosen.plan.microbatches
        assert count is not None
        sizes = even_sizes(samples, count)
        compiled: dict[int, CompiledSlice] = {}
        first: CompiledStep | None = None
        pipeline: Pipeline | None = None
        stage_place = self.stage_place
        specs = {name: layout.spec for name, layout in stored.items()}
        owners = {name: layout.stage for name, layout in stored.items()}
        for size in sorted(set(sizes), reverse=True):
            slice_ = split.graph(size * ranks)
            fixed = self._fixed(layout, slice_, split, specs)
            decided = partial(self._decided, slice_, fixed, first, chosen, count, samples * ranks)
            planned, local = apply_plan(
                slice_, decided,
                self.stage_place, self.options, trainable=trainable,
                output_specs=fixed.outputs if first is None else _as_before(slice_, first.local),
            )  # fmt: skip
            plan = planned.plan
            specs = specs or plan.parameter_specs()  # other sizes find parameters laid out so
            called_with: Arguments | None = None
            if plan.time_splits and plan.pipeline is None:
                called_with = self.example(plan, owners, slice_, local)
                local = self._in_slices(local, called_with, plan)
            firsts = _numbers(slice_, plan)
            programs = stage_programs(slice_, plan, local, self.options, firsts)
            if pipeline is None and plan.pipeline is not None:
                pipeline = self.pipeline_of(plan.pipeline)
                stage_place = replace(self.stage_place, ranks=pipeline.alike)
            if pipeline is not None and not owners:
                owners = _owners(slice_, programs, pipeline)
            called_with = called_with or self.example(plan, owners, slice_, local)
            compile_own = partial(
                compile_stages, slice_, planned, local, programs, called_with, stage_place,
                self.options, own=(0,) if pipeline is None else pipeline.own,
                split_backward=pipeline is not None and pipeline.splits_backward,
            )  # fmt: skip
            stages = compiled[size] = self.place.ranks.together(compile_own)
            if first is None:
                stage = next(iter(stages.stages.values()))
                first = CompiledStep(graph, plan, local, stage.body, stage.memory)
        assert first is not None
        binder = SplitBinder(
            graph, split, compiled, sizes, dims, layout, trainable, pipeline, owners,
            self.stage_place, self.mesh, self.device, self.options.progress,
        )  # fmt: skip
        return first, binder.step(), binder.whole_results

    def _check(self, call: Call, layout: BatchLayout, samples: int) -> None:
        if layout.local and not samples:
            raise EngineError(
                "batch='local', and no input has a batch dim that could be split into "
                "microbatches; say which by batch_dim="
            )
        if any(x.requires_grad for x in call.tensors):
            raise EngineError(
                "an input of the model requires grad, and its gradient does not come out of "
                "microbatches or pipeline stages; detach the input, or use a mesh without an axis "
                "named pipe, and microbatches=1"
            )
        if layout.local and self.cluster.pipeline_ranks > 1:
            raise EngineError(
                "batch='local' with pipeline stages: the ranks of a pipeline work on the same "
                "samples; pass the whole batch on every rank (batch='global')"
            )

    def _in_slices(
        self, local: LocalProgram, called_with: Arguments, plan: ShardingPlan
    ) -> LocalProgram:
        """The program of a microbatch with its regions in slices."""
        split = partial(split_regions, local.gm, called_with.tensors, plan.time_splits)
        return replace(local, gm=self.place.ranks.together(split))

    # -- pipelines --------------------------------------------------------------------------------

    def _chosen(self, split: Microbatches, samples: int, fixed: FixedLayouts) -> StepPlan | None:
        """The plan of a batch in microbatches; None where each microbatch is planned by itself."""
        if self.planner is None:
            return None
        planner = self.planner(split, samples, fixed)
        return StepPlan.of_rank_zero(
            lambda: StepPlan(planner.plan(self.count).plan), self.place.ranks
        )

    def _decided(
        self, graph: ModelGraph, fixed: FixedLayouts, alike: CompiledStep | None,
        chosen: StepPlan | None, count: int, samples: int,
    ) -> StepPlan:  # fmt: skip
        """The plan of a microbatch, with its stages; on rank 0."""
        if chosen is not None and alike is None:
            return chosen
        decided = self.decide(
            graph, fixed, alike, microbatches=count, samples=samples,
            staged=self.pipeline is not None,
        )  # fmt: skip
        pipeline = decided.plan.pipeline if alike is None else alike.plan.pipeline
        return replace(decided, plan=replace(decided.plan, microbatches=count, pipeline=pipeline))

    # -- microbatches -----------------------------------------------------------------------------

    def _dims(self, layout: BatchLayout) -> tuple[int, dict[int, int]]:
        """Samples on this rank, and by number of the tensor input the dim that holds them."""
        if layout.local:
            dims = {k: x.dim for k, x in enumerate(layout.inputs) if x.dim is not None}
            return layout.samples or 0, dims
        return batch_dims(layout.inputs, self.batch_dim)

    def _split(
        self, call: Call, graph: ModelGraph, trainable: frozenset[str], dims: Mapping[int, int],
        samples: int, ranks: int,
    ) -> Microbatches:  # fmt: skip
        names = [n for n in graph.inputs if n is not None]
        if not self.independent:
            of_inputs = {names[k]: dim for k, dim in dims.items()}
            return self.place.ranks.together(
                lambda: exact_microbatches(graph, of_inputs, samples, trainable)
            )

        def trace(size: int) -> ModelGraph:
            tensors = iter(enumerate(call.tensors))

            def part(x: torch.Tensor) -> torch.Tensor:
                k, _ = next(tensors)
                return x.narrow(dims[k], 0, size // ranks) if k in dims else x

            args, kwargs = pytree.tree_map_only(torch.Tensor, part, call.inputs)
            return self.trace(Call.of(args, kwargs))

        if self.count is None:
            raise EngineError(
                "microbatch='independent' changes with the number of microbatches: give it, as "
                "microbatches=8"
            )
        return independent_microbatches(graph, -(-samples // self.count), trace)

    def _fixed(
        self, layout: BatchLayout, graph: ModelGraph, split: Microbatches,
        parameters: Mapping[str, ShardingSpec],
    ) -> FixedLayouts:  # fmt: skip
        """Layouts of a microbatch: with batches of each rank's own, slices stay with their rank."""
        own = layout.fixed_inputs()
        if own is None:
            return FixedLayouts(parameters=parameters)
        shapes = [shape_of(graph.placeholders[n].meta["val"]) for n in graph.inputs if n]
        whole = zip(shapes[len(own) :], split.whole_states, strict=True)
        inputs = (*own, *(layout.split_by_state(shape, state) for shape, state in whole))
        pairs = zip(graph.output.args[0], split.results, strict=True)  # type: ignore[arg-type]
        outputs = [
            layout.split_by_state(shape_of(value.meta["val"]), state)
            for value, state in list(pairs)[len(graph.mutations) :]
            if state is not None
        ]
        return FixedLayouts(parameters=parameters, inputs=inputs, outputs=tuple(outputs))


def _as_before(graph: ModelGraph, before: LocalProgram) -> tuple[ShardingSpec, ...]:
    """Layouts of the results of microbatches of another size: those of the first ones."""
    outputs: Any = graph.output.args[0]
    return tuple(
        before.result_specs[k]
        for k, x in enumerate(outputs)
        if k >= len(graph.mutations) and isinstance(x, fx.Node)
    )


def _numbers(graph: ModelGraph, plan: ShardingPlan) -> tuple[int, ...]:
    """Numbers of the operators at which stages begin, without the first stage's.

    Raises:
        PlanError: the graph lacks one, or the schedule has not as many stages.
    """
    if plan.pipeline is None:
        return ()
    number = {node.name: k for k, node in enumerate(graph.compute_nodes())}
    missing = [name for name in plan.pipeline.firsts if name not in number]
    if missing:
        raise PlanError(
            f"the plan's stages begin at operators {missing}, which this call of the model does "
            "not have; plan again, or name the stages by modules (stages=)"
        )
    firsts = tuple(number[name] for name in plan.pipeline.firsts)
    stages = schedule_of(plan.pipeline).stages
    if len(firsts) + 1 != stages or list(firsts) != sorted({*firsts} - {0}):
        raise PlanError(
            f"the plan's schedule on {plan.pipeline.ranks} ranks has {stages} stages, and "
            f"{', '.join(plan.pipeline.firsts)} cut the model into {len(firsts) + 1}; name "
            f"{stages - 1} operators, in the order of the model and without its first (stages=)"
        )
    return firsts


def _owners(
    graph: ModelGraph, programs: Sequence[StageProgram], pipeline: Pipeline
) -> dict[str, int | None]:
    """By name of a parameter, the rank of the first stage that uses it; None if none does, and of
    scalars: all ranks have these."""
    owners: dict[str, int | None] = dict.fromkeys(graph.parameters.values())
    parameters = list(graph.parameters.items())
    for stage in reversed(range(len(programs))):
        for k in programs[stage].parameters:
            placeholder, name = parameters[k]
            if shape_of(graph.placeholders[placeholder].meta["val"]):
                owners[name] = pipeline.schedule.rank_of_stage[stage]
    return owners
