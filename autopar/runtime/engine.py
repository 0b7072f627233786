"""`auto_engine`: the model and optimizer a training loop uses, planned and distributed.

The engine takes the model's place. At the first batch (or from `example_inputs`) rank 0 plans, all
ranks take its plan, parameters and optimizer state become DTensors, and the batch runs through the
rank's program. A batch of new shapes, or a switch between train and eval, compiles another step,
with the parameters' layouts fixed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.cluster.cluster import ClusterInfo
from autopar.cluster.local import as_cluster
from autopar.comm import world
from autopar.comm.offloaded_parameters import offloadable, reload_all
from autopar.comm.ranks import WorldRanks
from autopar.compile import autoplan, compile_step, plan_step
from autopar.compiled_step import Arguments, CompiledStep, Place, StepOptions, StepPlan
from autopar.errors import EngineError, MeshError
from autopar.ir.graph import ModelGraph
from autopar.ir.guards import Guard
from autopar.passes.apply_sharding import LocalProgram
from autopar.plan import ShardingPlan
from autopar.planner.constraints import refuse_outputs
from autopar.planner.decisions import FixedLayouts
from autopar.planner.optimizer_state import optimizer_state_ratio
from autopar.planner.planner import trainable_inputs
from autopar.runtime.batch import BatchLayout
from autopar.runtime.buffers import copies_of, copy_all
from autopar.runtime.distribute import check_optimizer, distribute, shards, stored_specs
from autopar.runtime.program import bind
from autopar.runtime.state_on_host import StateOnHost
from autopar.runtime.step_on_shards import StepOnShards
from autopar.schedule.budget import MemoryPlan
from autopar.tracer import ColoTracer

log = logging.getLogger(__name__)

# numbers of captures for the same shapes at which the engine warns
_WARN_AT = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def auto_engine(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    cluster_info: ClusterInfo | str | Path,
    *,
    example_inputs: Any = None,
    plan: ShardingPlan | str | Path | None = None,
    batch: str = "global",
    memory: str | float | None = None,
    lower: bool = True,
    compile: bool = False,
    constraints: Mapping[str, str] | None = None,
    time_limit: float = 60.0,
    progress: Callable[[str], None] | None = None,
    dump_passes: str | Path | None = None,
) -> tuple[torch.nn.Module, Any]:
    """Distribute a model and its optimizer over a mesh; the training loop stays as it was.

    Args:
        model: any module that `ColoTracer` captures.
        optimizer: any `torch.optim` optimizer over the model's parameters, or None to evaluate
            only. It is returned itself, with its parameters and state sharded once the plan is
            known, so schedulers that hold it keep working.
        cluster_info: a `ClusterInfo`, the path of its YAML, or a mesh string such as "2x2", of GPUs
            where this process sees one, else of CPUs.
        example_inputs: kwargs, args or (args, kwargs) to plan with now instead of at the first
            batch.
        plan: a plan or its file, instead of planning.
        batch: "global": every rank passes the same batch and the engine takes its part; "local":
            every rank passes its own samples, as with DDP and a DistributedSampler.
        memory: budget per device ("40GiB", bytes, or a share of the device). A step that does not
            fit recomputes, re-gathers or offloads what it cannot keep (docs/memory.md).
        lower: False runs the sharded graph eagerly, without AOTAutograd (debugging).
        compile: run forward and backward by Inductor; the plan stays in force.
        constraints: layouts by name, as in `autoplan`; those of results are for `batch` to say.
        time_limit: seconds for the solver.
        progress: called with a line per planning stage, on rank 0.
        dump_passes: folder for rank 0's graphs before and after each pass.

    Returns:
        the engine (a module with the model's parameter names) and the optimizer.

    Raises:
        MeshError: the mesh does not fit the world, or a batch does not divide.
        EngineError: the optimizer is not the model's.
        PlanError: the plan is damaged or for something else.
        InfeasibleError: no plan fits the memory; it names the smallest budget.
        CaptureError: the model cannot be captured.
    """
    if batch not in ("global", "local"):
        raise ValueError(f"batch must be 'global' or 'local', got {batch!r}")
    if compile and not lower:
        raise ValueError("compile=True compiles the lowered graphs; leave lower=False out")
    refuse_outputs(constraints)
    cluster = as_cluster(cluster_info).with_memory(memory)
    check_optimizer(model, optimizer)
    options = EngineOptions(
        step=StepOptions(
            cluster=cluster,
            lowered=lower,
            compile=compile,
            optimizer_state=optimizer_state_ratio(optimizer),
            dump_passes=None if dump_passes is None else Path(dump_passes),
        ),
        plan=ShardingPlan.load(plan) if isinstance(plan, str | Path) else plan,
        batch=batch,
        constraints=dict(constraints or {}),
        time_limit=time_limit,
        progress=progress,
    )
    engine = Engine(model, optimizer, options)
    if example_inputs is not None:
        args, kwargs = split_inputs(example_inputs)
        engine.plan_for(*args, **kwargs)
    return engine, optimizer


def split_inputs(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Normalize example inputs: kwargs, args, (args, kwargs) or one tensor to (args, kwargs)."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        if len(example) == 2 and isinstance(example[0], tuple) and isinstance(example[1], dict):
            return tuple(example[0]), dict(example[1])
        return tuple(example), {}
    return (example,), {}


@dataclass(frozen=True)
class EngineOptions:
    """The options of `auto_engine`, under its names; `step` says how steps are compiled."""

    step: StepOptions
    plan: ShardingPlan | None = None
    batch: str = "global"
    constraints: Mapping[str, str] | None = None
    time_limit: float = 60.0
    progress: Callable[[str], None] | None = None


@dataclass(frozen=True)
class BoundStep:
    """A compiled step with what it needs to run.

    Args:
        number: of steps compiled before it.
        compiled: for one shape of inputs, one mode, and the values that its guards allow.
        train: runs it, with gradients.
        layout: of its batches.
        parameters: in the order of the program, as their modules hold them.
    """

    number: int
    compiled: CompiledStep
    train: Callable[..., Any]
    layout: BatchLayout
    parameters: Sequence[tuple[torch.nn.Module, str]]

    @property
    def offloads_parameters(self) -> bool:
        memory = self.compiled.memory
        return memory is not None and bool(memory.parameters_on_host)

    @property
    def offloads_state(self) -> bool:
        memory = self.compiled.memory
        return memory is not None and memory.state_on_host


class Engine(torch.nn.Module):
    """Takes the model's place: same parameter names, `state_dict`, modes and attributes."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        options: EngineOptions,
    ) -> None:
        super().__init__()
        # share the registries, so that names carry no prefix and training mode reaches submodules
        self._modules, self._parameters = model._modules, model._parameters
        self._buffers = model._buffers
        self.training = model.training
        hide = object.__setattr__
        hide(self, "_model", model)
        hide(self, "_optimizer", optimizer)
        self._options = options
        self._programs: dict[Any, list[BoundStep]] = {}
        self._offloaded_state = None if optimizer is None else StateOnHost(optimizer)
        self._seeds_used = self._draws = 0
        cluster = options.step.cluster
        self._device = world.device_for(cluster)
        self._mesh = world.start(cluster, self._device)
        ranks = WorldRanks()
        self._place = Place(
            cluster.coords(dist.get_rank()),
            world.process_groups(self._mesh),
            self._device.type,
            ranks,
        )
        self._seed = int(ranks.from_rank_zero(lambda: torch.initial_seed() % 2**62))

    # -- as a module ----------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_model"), name)

    def train(self, mode: bool = True) -> Engine:
        self._model.train(mode)
        self.training = mode
        return self

    @property
    def plan(self) -> ShardingPlan:
        """The plan in force: of the step that was compiled first.

        Raises:
            EngineError: no batch was seen yet.
        """
        steps = self._compiled_steps()
        if not steps:
            raise EngineError(
                "no plan yet: it is made at the first batch, or pass example_inputs= to auto_engine"
            )
        return steps[0].compiled.plan

    @property
    def memory_plan(self) -> MemoryPlan | None:
        """What the step that was compiled last keeps, recomputes and offloads; None without a
        budget."""
        steps = self._compiled_steps()
        return steps[-1].compiled.memory if steps else None

    def _compiled_steps(self) -> list[BoundStep]:
        steps = (step for same_shape in self._programs.values() for step in same_shape)
        return sorted(steps, key=lambda step: step.number)

    def plan_for(self, *args: Any, **kwargs: Any) -> None:
        """Plan and distribute for inputs of these shapes, without running them."""
        self._step(args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        step = self._step(args, kwargs)
        graph, program = step.compiled.graph, step.compiled.local
        trains = torch.is_grad_enabled()
        if step.offloads_state and trains and self._offloaded_state is not None:
            self._offloaded_state.leave()
        flat, mutated = self._flat(step, args, kwargs)
        with self._common_draws(graph):
            results = list(step.train(*flat) if trains else program.gm(*shards(flat)))
        count = len(mutated)
        if mutated:
            with torch.no_grad():
                copy_all(mutated, results[:count])
        return graph.carry_out(self._model, step.layout.give(results[count:]))

    def _flat(
        self, step: BoundStep, args: Any, kwargs: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the program is called with, and the buffers that its first results are for."""
        graph, program = step.compiled.graph, step.compiled.local
        if graph.updates:
            parameters = dict(self._model.named_parameters())
            with torch.no_grad():
                for name, update in graph.updates.items():
                    shard = parameters[name].to_local()
                    shard.copy_(update(shard))
        flat: list[Any] = [owner._parameters[name] for owner, name in step.parameters]
        mutated: list[torch.Tensor] = []
        if graph.buffers:
            buffers = dict(self._model.named_buffers())
            mutated = [buffers[n] for n in graph.mutations]
            # copies: backward may keep what the step is about to overwrite
            buffers |= zip(graph.mutations, copies_of(mutated), strict=True)
            flat += [buffers[n] for n in graph.buffers.values()]
        flat += [t.to(self._device) for t in graph.constants.values()]
        tensors = [x for x in _leaves(args, kwargs)[0] if isinstance(x, torch.Tensor)]
        flat += step.layout.take(tensors, program.input_specs, self._place.coords, self._device)
        if program.takes_seed:
            self._seeds_used += 1
            flat.append(torch.tensor((self._seed + self._seeds_used) % 2**62))
        return flat, mutated

    @contextmanager
    def _common_draws(self, graph: ModelGraph) -> Iterator[None]:
        """Random operators that run replicated draw the same on every rank, anew at each step."""
        if not graph.random:
            yield
            return
        self._draws += 1
        cuda = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed((self._seed + self._draws) % 2**62)
            yield

    # -- compiling ------------------------------------------------------------------------------

    def _step(self, args: Any, kwargs: Any) -> BoundStep:
        """The step for inputs of these shapes, and of values that its guards allow."""
        if any(s.offloads_parameters for steps in self._programs.values() for s in steps):
            self._reload_parameters()
        steps = self._programs.setdefault(self._key(args, kwargs), [])
        failed = None
        for step in steps:
            failed = self._failed_guard(step, args, kwargs)
            if failed is None:
                return step
        if failed is not None and len(steps) in _WARN_AT:
            log.warning(
                "capturing the model again: this batch takes another branch than %d before it.\n"
                "%s\nMove the decision out of the model, or make all batches agree in it.",
                len(steps), failed,
            )  # fmt: skip
        steps.append(self._compile(args, kwargs))
        if steps[-1].offloads_parameters:
            self._reload_parameters()
        return steps[-1]

    def _key(self, args: Any, kwargs: Any) -> Any:
        leaves, spec = _leaves(args, kwargs)
        described = tuple(
            (tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in leaves
        )
        return self.training, spec, described

    def _failed_guard(self, step: BoundStep, args: Any, kwargs: Any) -> Guard | None:
        """The first guard of a step that a batch violates; the same on every rank."""
        guards = [g for g in step.compiled.graph.guards if g.program is not None]
        if not guards:
            return None
        leaves = pytree.tree_leaves((args, kwargs))
        used = {k for g in guards for source, k in g.sources if source == "input"}
        inputs = {k: step.layout.gather(leaves[k]) for k in used}
        buffers = dict(self._model.named_buffers(remove_duplicate=False))
        return next((g for g in guards if not g.holds(inputs, buffers)), None)

    def _compile(self, args: Any, kwargs: Any) -> BoundStep:
        options = self._options
        layout = BatchLayout.of(options.batch, options.step.cluster, (args, kwargs))
        graph = ColoTracer(self._device.type).trace(
            self._model, *layout.global_inputs(args, kwargs)
        )
        fixed = FixedLayouts(
            parameters=stored_specs(self._model),
            inputs=layout.fixed_inputs(),
            outputs=layout.fixed_outputs(graph),
        )

        def arguments(plan: ShardingPlan, local: LocalProgram) -> Arguments:
            self._distribute(plan)
            parameters = dict(self._model.named_parameters())
            return Arguments(
                self._example(graph, local, layout), offloadable(parameters, self._model.buffers())
            )

        compiled = compile_step(
            graph,
            lambda: self._decide(graph, fixed),
            self._place,
            arguments,
            replace(
                options.step, dump_passes=options.step.dump_passes if not dist.get_rank() else None
            ),
            trainable=trainable_inputs(graph, self._model),
            output_specs=fixed.outputs,
        )
        train = _eager(compiled.local) if compiled.lowered is None else bind(compiled.lowered)
        parameters = [_holder(self._model, name) for name in graph.parameters.values()]
        number = len(self._compiled_steps())
        return BoundStep(number, compiled, train, layout, parameters)

    def _decide(self, graph: ModelGraph, fixed: FixedLayouts) -> StepPlan:
        """The plan that was given, or a new one; on rank 0."""
        options, cluster = self._options, self._options.step.cluster
        if options.plan is not None and not fixed.parameters:
            name = type(self._model).__name__
            options.plan.check(fingerprint=graph.fingerprint, mesh=cluster.mesh, model=name)
            return StepPlan(options.plan)
        planning: dict[str, Any] = {
            "graph": graph,
            "cluster": cluster,
            "optimizer_state": options.step.optimizer_state,
            "fixed": fixed,
            "constraints": options.constraints,
            "time_limit": options.time_limit,
            "progress": options.progress,
        }
        scheduled = cluster.memory_bytes is not None and options.step.lowered
        if not scheduled or cluster.world_size == 1:  # the schedule of one device comes later
            unlimited = math.inf if scheduled else None
            return StepPlan(autoplan(self._model, budget_bytes=unlimited, **planning).plan)
        joint = plan_step(self._model, output_specs=fixed.outputs, **planning)
        program = None if joint.step is None else joint.step.program
        return StepPlan(joint.planned.plan, program, joint.memory)

    def _distribute(self, plan: ShardingPlan) -> None:
        """Shard parameters and optimizer state by the first plan."""
        if stored_specs(self._model):
            return
        distribute(
            self._model, self._optimizer, plan.parameter_specs(), self._mesh, self._place.coords,
            self._device,
        )  # fmt: skip
        if self._optimizer is not None:
            StepOnShards(self._optimizer)

    def _example(
        self, graph: ModelGraph, program: LocalProgram, layout: BatchLayout
    ) -> list[torch.Tensor]:
        """Tensors as the program will be called with."""
        parameters = dict(self._model.named_parameters())
        buffers = dict(self._model.named_buffers())
        example = [
            parameters[n].to_local().detach().requires_grad_(parameters[n].requires_grad)
            for n in graph.parameters.values()
        ]
        example += [buffers[n] for n in graph.buffers.values()]
        example += [t.to(self._device) for t in graph.constants.values()]
        example += layout.example_shards(
            graph, program.input_specs, self._place.coords, self._device
        )
        if program.takes_seed:
            example.append(torch.zeros((), dtype=torch.int64))
        return example

    def _reload_parameters(self) -> None:
        reload_all(dict(self._model.named_parameters()), self._model.buffers())


def _eager(local: LocalProgram) -> Callable[..., Any]:
    return lambda *flat: local.gm(*shards(flat))


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sequence[Any], Any]:
    """A batch's leaves, and a key for its structure; quickly where nothing is nested."""
    leaves = (*args, *kwargs.values())
    if all(isinstance(x, torch.Tensor) for x in leaves):
        return leaves, (len(args), *kwargs)
    return pytree.tree_flatten((args, kwargs))


def _holder(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """The module that holds a parameter, and under which name."""
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own


def local_parameters(model: torch.nn.Module) -> Sequence[torch.Tensor]:
    """This rank's shards of the parameters."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]


__all__ = ["Engine", "MeshError", "auto_engine", "local_parameters", "split_inputs"]
