"""Compiles the steps of a model: captures a call, plans, and lays parameters out at the first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from autopar.comm import world
from autopar.comm.offloaded_parameters import offloadable
from autopar.comm.ranks import GroupRanks, Ranks, WorldRanks
from autopar.comm.stored_layout import StoredLayout
from autopar.compile import compile_step
from autopar.compiled_step import Arguments, CompiledStep, Place, StepOptions
from autopar.errors import EngineError
from autopar.ir.bound_reads import bind as bind_reads
from autopar.ir.graph import ModelGraph, shape_of
from autopar.ir.numbers import Origin
from autopar.ir.precision import without_autocast
from autopar.ir.size_formulas import input_shapes
from autopar.optim.elementwise import ELEMENTWISE
from autopar.passes.apply_sharding import LocalProgram
from autopar.passes.compile_mode import CompileMode
from autopar.plan import ShardingPlan
from autopar.plan_records import PipelinePlan
from autopar.planner.decisions import FixedLayouts
from autopar.planner.planner import captured, trainable_inputs
from autopar.planner.stages import schedule_of
from autopar.runtime.adoption import adopt, check_state, restore
from autopar.runtime.assumptions import Assumptions
from autopar.runtime.batch import BatchLayout
from autopar.runtime.bound_step import BoundStep, whole_results
from autopar.runtime.call import Call
from autopar.runtime.capture_call import capture_call
from autopar.runtime.compiled_graphs import NotBuiltError, usable
from autopar.runtime.deferred_parameters import refuse_without_values
from autopar.runtime.distribute import distribute, shards, stored_layouts, stored_specs
from autopar.runtime.donated_inputs import (
    donated_inputs,
    held_layouts,
    lay_out_donated,
)
from autopar.runtime.engine_options import EngineOptions
from autopar.runtime.example_arguments import example_arguments
from autopar.runtime.initial_values import InitialValues, initial_values
from autopar.runtime.lazy_modules import initialize_lazy_modules
from autopar.runtime.optimizer_state import handle_state_dicts
from autopar.runtime.pipeline_runtime import Pipeline
from autopar.runtime.placed_states import looked_at, place_states, resumed_steps
from autopar.runtime.program import Program, bind
from autopar.runtime.result_gradients import ResultGradients
from autopar.runtime.split_compiler import SplitCompiler
from autopar.runtime.split_function import evaluate, train
from autopar.runtime.step_on_shards import StepOnShards
from autopar.runtime.step_planner import StepPlanner
from autopar.sharding.node_rules import results

log = logging.getLogger(__name__)


class StepCompiler:
    """Compiles a model's calls.

    Args:
        model: its parameters become DTensors, replicated until a plan is known.
        optimizer: of its parameters, or None.
        laid_out: the parameters of the model have their final layouts, as those of a copy.
        initial: where values come from; None to find out, on all ranks together.

    Attributes:
        mesh, device, place: where this rank's programs run.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        options: EngineOptions,
        *,
        laid_out: bool = False,
        initial: InitialValues | None = None,
    ) -> None:
        self.model, self.optimizer, self.options = model, optimizer, options
        self.laid_out, self.resumed_steps = laid_out, 0
        cluster = options.step.cluster
        self.device = world.device_for(cluster)
        self.mesh = world.start(cluster, self.device)
        self.place = Place(
            cluster.coords(dist.get_rank()),
            world.process_groups(self.mesh),
            self.device.type,
            WorldRanks(),
        )
        if optimizer is not None:
            cluster = looked_at(cluster, dist.get_rank(), self.place.ranks, resume=options.resume)
            options = replace(options, step=replace(options.step, cluster=cluster))
            self.options = options
            if options.resume:
                self.resumed_steps = resumed_steps(cluster, dist.get_rank(), self.place.ranks)
                optimizer.register_state_dict_pre_hook(lambda _: self.refuse_unread_states())
        self.stage_place = self.place.of_a_stage(cluster)
        self._planner = StepPlanner(model, options, self.stage_place)
        self._count = 0
        self._names: list[str] | None = None  # of positional arguments
        if initial is None:
            self.place.ranks.together(lambda: check_state(optimizer))
            initial = self._initial_values()
            self._refuse_other_options()
            self._set_compile(usable(options.step.compile, self.device.type, self.place.ranks))
        self._initial = initial
        self._moved = adopt(model, optimizer, self.mesh, options.precision)

    def refuse_unread_states(self) -> None:
        """
        Raises:
            EngineError: the run goes on from stored states, and no plan has read them. The first
                one does, as it says which part of them is this rank's.
        """
        if self.resumed_steps and not self.laid_out:
            raise EngineError(
                "resume=True: parameters and the optimizer's state are those after step "
                f"{self.resumed_steps} from the first batch on; run a batch first, or pass "
                "example_inputs= to auto_engine"
            )

    def _set_compile(self, mode: CompileMode) -> None:
        step = replace(self.options.step, compile=mode)
        self.options = self._planner.options = replace(self.options, step=step)

    def _refuse_other_options(self) -> None:
        """Refuse ranks that ask for different microbatches or stages.

        Raises:
            EngineError: on all ranks, naming the option and its values.
        """
        options = self.options
        schedule = options.schedule
        if schedule is not None and schedule.endswith(".csv") and Path(schedule).exists():
            schedule = Path(schedule).read_text()
        mine = {
            "microbatches": options.microbatches, "microbatch": options.microbatch,
            "schedule": schedule, "stages": options.stages, "compile": options.step.compile.option,
        }  # fmt: skip
        for rank, theirs in enumerate(self.place.ranks.of_all(mine)):
            for name, value in theirs.items():
                if value != mine[name]:
                    raise EngineError(
                        f"ranks ask for different {name}=: rank {dist.get_rank()} for "
                        f"{mine[name]!r}, rank {rank} for {value!r}; pass the same on all ranks"
                    )

    def _initial_values(self, *, again: bool = False) -> InitialValues:
        precision = self.options.precision
        return initial_values(
            self.model, self.place.ranks, self.device, self.options.weights, again=again,
            converts=precision is not None and precision.parameters is not None,
        )  # fmt: skip

    def compile(
        self, call: Call, varying: Collection[Origin] = (), alike: BoundStep | None = None
    ) -> BoundStep:
        """Compile the step of a call; the first one lays the parameters out.

        Args:
            varying: origins of numbers that are inputs of the program.
            alike: a step for inputs of other sizes, whose plan serves this one if it can.

        Raises:
            AutoparError: on all ranks. A first step that fails leaves parameters as they were.
        """
        forward = self.runs_forward(call)
        # whatever mode the caller is in, the graph is that of training
        with torch.inference_mode(False), torch.enable_grad():
            self.place.ranks.together(
                lambda: initialize_lazy_modules(self.model, call.args, call.kwargs)
            )
            with self._untouched_if_it_fails():
                step = self._compile(call, varying, alike, forward)
        self._count += 1
        return step

    def runs_forward(self, call: Call) -> bool:
        """Whether the step of a call is planned and lowered as a forward: without gradients, where
        nothing is trained or a cache is written."""
        if torch.is_grad_enabled() or self._planner.pipeline is not None:
            return False
        untrained = self.optimizer is None and (self.options.microbatches or 1) == 1
        return untrained or bool(donated_inputs(call.leaves))

    @contextmanager
    def _untouched_if_it_fails(self) -> Iterator[None]:
        """Adopt the model's parameters; give them back if its first step cannot be compiled."""
        if not self.laid_out:
            self._initial = self._initial_values(again=True)
        else:
            self.place.ranks.together(lambda: refuse_without_values(self.model))
        # of replaced modules too
        self._moved += adopt(self.model, self.optimizer, self.mesh, self.options.precision)
        try:
            yield
        except BaseException:
            if not self.laid_out:
                restore(self.model, self.optimizer, self._moved)
                self._moved = []
            raise
        self._moved = []

    def _compile(
        self, call: Call, varying: Collection[Origin], alike: BoundStep | None, forward: bool
    ) -> BoundStep:
        options = self.options
        layout = self.layout_of(call)
        with options.step.progress.stage("trace") as stage:
            graph = self.place.ranks.together(lambda: self._captured(call, layout, varying))
            stage.done = captured(self.model, graph)
        fixed = FixedLayouts(
            parameters=stored_specs(self.model) if self.laid_out else {},
            inputs=layout.fixed_inputs() or held_layouts(call.tensors),
            outputs=layout.fixed_outputs(graph),
            whole_sizes=_varying_sizes(graph, alike, options.step.cluster.world_size),
        )
        differentiated = frozenset(
            name
            for name, x in zip(graph.inputs, call.leaves, strict=True)
            if name is not None and x.requires_grad
        )

        def arguments(plan: ShardingPlan, local: LocalProgram) -> Arguments:
            self._lay_out(plan)
            parameters = dict(self.model.named_parameters())
            return Arguments(
                self._example(
                    graph, local, layout, differentiated=differentiated, trains=not forward
                ),
                offloadable(parameters, self.model.buffers()),
            )

        trainable = trainable_inputs(graph, self.model) | differentiated
        if forward:
            trainable = frozenset()
        split = partial(self._compile_split, call, varying, layout, graph, trainable)
        if (options.microbatches or 1) > 1 or self._planner.pipeline is not None:
            return split(options.microbatches)
        decide = cache(
            lambda: self._planner.decide(
                graph, fixed, None if alike is None else alike.compiled, forward=forward
            )
        )
        open_ = options.microbatches is None and options.step.lowered and not layout.local
        open_ = open_ and not options.step.states_on
        open_ &= not forward
        if open_:
            count = self.place.ranks.from_rank_zero(
                lambda: self._planner.fastest_count(call, graph, fixed.parameters, decide)
            )
            if count > 1:
                return split(count)
        gradients = ResultGradients.of(graph, trainable)
        compiling = partial(
            compile_step, graph, decide, self.place, arguments,
            trainable=trainable, output_specs=fixed.outputs, whole_sizes=fixed.whole_sizes,
        )  # fmt: skip
        compiled, program = self._bound(compiling, gradients)
        memory = compiled.memory
        self._keep_states(compiled.plan.states_on, 0.0 if memory is None else memory.room_bytes)
        evaluate = _eager(compiled.local)
        train = program or evaluate
        if forward or (compiled.memory is not None and not trainable):
            evaluate = train  # lowered as a forward
        lay_out_donated(call.tensors, compiled.local.input_specs)
        parameters = [_holder(self.model, name) for name in graph.parameters.values()]
        return BoundStep(
            self._count, compiled, train, evaluate, layout, parameters,
            Assumptions.of(self.model), bind_reads(self.model, graph.reads), gradients.feeding,
            whole_results(compiled),
        )  # fmt: skip

    def _bound(
        self, compiling: Callable[[StepOptions], CompiledStep], gradients: ResultGradients
    ) -> tuple[CompiledStep, Program | None]:
        """A compiled step and what runs it: without Inductor, if that may be and it fails."""
        step = self.options.step
        if dist.get_rank():
            step = replace(step, dump_passes=None)
        compiled = compiling(step)
        if compiled.lowered is None:
            return compiled, None
        beside = None
        if compiled.plan.states_on and type(self.optimizer) in ELEMENTWISE:
            assert self.optimizer is not None
            beside = StepOnShards.of(self.optimizer).beside
        bound = partial(
            bind, gradients=gradients, beside=beside, ranks=self.place.ranks, progress=step.progress
        )
        try:
            return compiled, bound(compiled.lowered)
        except NotBuiltError as error:
            log.warning("a step runs uncompiled: %s", error)
        compiled = compiling(replace(step, compile=CompileMode()))
        assert compiled.lowered is not None
        return compiled, bound(compiled.lowered)

    def _compile_split(
        self, call: Call, varying: Collection[Origin], layout: BatchLayout, graph: ModelGraph,
        trainable: frozenset[str], count: int | None,
    ) -> BoundStep:  # fmt: skip
        """The step in microbatches; their number is chosen if None."""
        options = self.options
        cluster = options.step.cluster
        if options.step.compile.verified:  # ranks of a pipeline run different programs
            options = replace(options, step=replace(options.step, compile=CompileMode()))

        def example(
            plan: ShardingPlan, owners: Mapping[str, int | None], graph: ModelGraph,
            local: LocalProgram,
        ) -> Arguments:  # fmt: skip
            self._lay_out(plan, owners)
            return Arguments(self._example(graph, local, layout))

        # a plan that is given serves the first call
        plans = self._planner.pipeline is not None and (options.plan is None or self.laid_out)
        compiler = SplitCompiler(
            count=count,
            independent=options.microbatch == "independent",
            batch_dim=options.batch_dim,
            pipeline=self._planner.pipeline,
            place=self.place,
            stage_place=self.stage_place,
            mesh=self.mesh,
            device=self.device,
            cluster=cluster,
            options=replace(options.step, cluster=cluster.of_a_stage()),
            decide=self._planner.decide,
            planner=self._planner.of_batch if plans else None,
            example=example,
            trace=lambda part: self._captured(part, self.layout_of(part), varying),
            pipeline_of=self._pipeline_of,
        )
        stored = stored_layouts(self.model) if self.laid_out else {}
        compiled, step, whole = compiler.compile(call, layout, graph, trainable, stored)
        self._keep_states("")
        self._planner.keep_stages(compiled.plan.pipeline)
        parameters = [_holder(self.model, name) for name in graph.parameters.values()]
        return BoundStep(
            self._count, compiled, partial(train, step), partial(evaluate, step), layout,
            parameters, Assumptions.of(self.model), bind_reads(self.model, graph.reads),
            step.result_gradients.feeding, whole, split=True,
        )  # fmt: skip

    def _keep_states(self, states_on: str, room_bytes: float = 0.0) -> None:
        """Let later steps find the states where the first one has them.

        Args:
            room_bytes: of the host, for second versions of chunks.
        """
        first = self.options.step.states_on is None
        step = replace(self.options.step, states_on=states_on)
        self.options = self._planner.options = replace(self.options, step=step)
        if first and self.optimizer is not None:
            place_states(
                self.model, self.optimizer, states_on, step.cluster, dist.get_rank(),
                self.place.ranks, resume=self.options.resume, room_bytes=room_bytes,
            )  # fmt: skip

    def _pipeline_of(self, plan: PipelinePlan) -> Pipeline:
        """This rank's place in the pipeline of a plan."""
        alike = Ranks()
        if self.options.step.cluster.of_a_stage().world_size > 1:
            alike = GroupRanks(world.stage_group(self.mesh, plan.axis))
        rank, group = self.place.coords[plan.axis], self.mesh.get_group(plan.axis)
        return Pipeline(schedule_of(plan), rank, group, alike)

    def layout_of(self, call: Call) -> BatchLayout:
        """How a call's batch enters; on all ranks.

        Raises:
            EngineError, MeshError: see `BatchLayout.of`.
        """
        names = self._names
        if names is None:
            kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
            parameters = signature(self.model.forward).parameters.values()
            names = self._names = [p.name for p in parameters if p.kind in kinds]
        options = self.options
        return BatchLayout.of(options.batch, options.step.cluster, call, names, options.batch_dim)

    def trace_sizes(
        self,
        call: Call,
        layout: BatchLayout,
        dynamic: Mapping[int, Collection[int]],
        varying: Collection[Origin],
    ) -> ModelGraph:
        """Capture the model with symbols for sizes of inputs.

        Args:
            dynamic: dims, by the position of an input among the flattened ones.
            varying: origins of numbers that are inputs of the program.

        Raises:
            CaptureError: on all ranks.
        """
        with torch.inference_mode(False), torch.enable_grad():
            return self.place.ranks.together(lambda: self._captured(call, layout, varying, dynamic))

    def _captured(
        self,
        call: Call,
        layout: BatchLayout,
        varying: Collection[Origin],
        dynamic: bool | Mapping[int, Collection[int]] = False,
    ) -> ModelGraph:
        options, kind = self.options, self.device.type
        return capture_call(self.model, call, layout, options, kind, varying, dynamic)

    def _example(
        self, graph: ModelGraph, program: LocalProgram, layout: BatchLayout, **options: Any
    ) -> list[torch.Tensor]:
        coords, device = self.place.coords, self.device
        return example_arguments(self.model, graph, program, layout, coords, device, **options)

    def _lay_out(self, plan: ShardingPlan, owners: Mapping[str, int | None] | None = None) -> None:
        """Lay parameters and optimizer state out by the first plan.

        Args:
            owners: by name of a parameter, the rank of the pipeline that has it.
        """
        if self.laid_out:
            return
        layouts = {
            name: StoredLayout(spec, (owners or {}).get(name) if spec.ndim else None)
            for name, spec in plan.parameter_specs().items()
        }
        distribute(
            self.model, self.optimizer, layouts, self.mesh, self.place.coords,
            self.device, self._initial.names, self._initial.fill,
        )  # fmt: skip
        self.laid_out = True
        if self.optimizer is not None:
            StepOnShards.attach(self.optimizer)
            handle_state_dicts(self.optimizer)


def _varying_sizes(graph: ModelGraph, alike: BoundStep | None, ranks: int) -> frozenset[int]:
    """Sizes in a graph that another graph of the model has otherwise, and that are no multiples of
    the number of ranks: split unevenly, each would make another program.

    Sizes of batches and of parameters may be split all the same.
    """
    if alike is None or alike.compiled.memory is not None:
        return frozenset()
    pairs = zip(graph.compute_nodes(), alike.compiled.graph.compute_nodes(), strict=False)
    values = ((a, b) for n, m in pairs for a, b in zip(results(n), results(m), strict=False))
    dims = (d for a, b in values for d in zip(shape_of(a)[1:], shape_of(b)[1:], strict=False))
    varying = {a for a, b in dims if a != b and a % ranks}
    held = [shape_of(graph.placeholders[name].meta["val"]) for name in graph.parameters]
    batches = {shape[0] for shape in input_shapes(graph) if shape}
    return frozenset(varying.difference(batches, *held))


def _eager(local: LocalProgram) -> Callable[..., Any]:
    def run(*flat: torch.Tensor) -> Any:
        with without_autocast():
            return local.gm(*shards(flat))

    return run


def _holder(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """The module that holds a parameter, and under which name."""
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own
