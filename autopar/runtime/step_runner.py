"""Finds or compiles the step of a call, and runs it.

A batch of new shapes, a switch between train and eval, and whatever else a program depends on and
finds changed (`assumptions.py`) compile another step, with the parameters' layouts fixed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.comm import world
from autopar.comm.offloaded_parameters import offloadable, reload_all
from autopar.comm.ranks import WorldRanks
from autopar.compile import autoplan, compile_step, plan_step
from autopar.compiled_step import Arguments, CompiledStep, Place, StepOptions, StepPlan
from autopar.errors import CaptureError, MeshError
from autopar.ir.bound_reads import bind as bind_reads
from autopar.ir.graph import ModelGraph
from autopar.ir.guards import Guard
from autopar.ir.reads import first_change
from autopar.ir.spec import ShardingSpec
from autopar.passes.apply_sharding import LocalProgram
from autopar.plan import ShardingPlan
from autopar.planner.decisions import FixedLayouts
from autopar.planner.planner import trainable_inputs
from autopar.runtime.agreement import Agreement
from autopar.runtime.assumptions import Assumptions, precision_modes
from autopar.runtime.batch import BatchLayout
from autopar.runtime.buffers import copies_of, copy_all
from autopar.runtime.distribute import adopt, distribute, restore, shards, stored_specs
from autopar.runtime.program import bind
from autopar.runtime.sharded_values import DeferredResult, SavedShard
from autopar.runtime.state_on_host import StateOnHost
from autopar.runtime.step_on_shards import StepOnShards
from autopar.runtime.varying_numbers import VaryingNumbers
from autopar.runtime.whole_parameters import whole_parameters
from autopar.tracer import ColoTracer

log = logging.getLogger(__name__)

# numbers of captures for the same shapes at which the engine warns, and how many it keeps
_WARN_AT = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_KEPT = 32


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
        assumptions: about the model, under which it may run.
        reads_hold: whether what the forward read of the model is as it was.
    """

    number: int
    compiled: CompiledStep
    train: Callable[..., Any]
    layout: BatchLayout
    parameters: Sequence[tuple[torch.nn.Module, str]]
    assumptions: Assumptions
    reads_hold: Callable[[], bool]

    @property
    def offloads_parameters(self) -> bool:
        memory = self.compiled.memory
        return memory is not None and bool(memory.parameters_on_host)

    @property
    def offloads_state(self) -> bool:
        memory = self.compiled.memory
        return memory is not None and memory.state_on_host


class StepRunner:
    """Runs a model's calls as compiled steps.

    Args:
        model: its parameters become DTensors.
        optimizer: of its parameters, or None.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        options: EngineOptions,
    ) -> None:
        self.model = model
        self._optimizer = optimizer
        self._options = options
        self._programs: dict[Any, list[BoundStep]] = {}
        self._laid_out = self._whole = False
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
        self._numbers = VaryingNumbers()
        self._agreement = Agreement(same_batches=options.batch == "global")
        self._moved = adopt(model, optimizer, self._mesh)
        if options.batch == "global":  # what the caller computes with parameters is replicated
            world.replicate_plain_tensors()

    def for_copy(self, model: torch.nn.Module) -> StepRunner:
        """A runner of a copy of the model, whose parameters stay laid out as they are."""
        runner = StepRunner(model, None, self._options)
        runner._laid_out = self._laid_out
        return runner

    @property
    def steps(self) -> list[BoundStep]:
        """In the order in which they were compiled."""
        steps = (step for same_shape in self._programs.values() for step in same_shape)
        return sorted(steps, key=lambda step: step.number)

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """The model's modules find whole parameters, gathered as they are read. Without gradients
        the model's own forward runs."""
        if self._whole:
            yield
            return
        self._whole = True
        try:
            with whole_parameters(self.model):
                yield
        finally:
            self._whole = False

    def saved(self, value: DTensor) -> torch.Tensor:
        """A parameter as an entry of a state dict."""
        if self._whole:
            return value.full_tensor()
        return SavedShard.of(value._local_tensor, value._spec)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trains = torch.is_grad_enabled()
        if self._whole and not trains:
            return self.model(*args, **kwargs)
        with world.explained_failures():
            step, args, kwargs = self._with_numbers(args, kwargs)
        graph, program = step.compiled.graph, step.compiled.local
        if step.offloads_state and trains and self._offloaded_state is not None:
            self._offloaded_state.leave()
        flat, mutated = self._flat(step, args, kwargs)
        with self._common_draws(graph):
            results = list(step.train(*flat) if trains else program.gm(*shards(flat)))
        count = len(mutated)
        if mutated:
            with torch.no_grad():
                copy_all(mutated, results[:count])
        for position, spec in program.deferred.items():
            results[position] = self._deferred(graph, results[position], position, spec)
        return graph.carry_out(self.model, step.layout.give(results[count:]))

    def _deferred(
        self, graph: ModelGraph, local: torch.Tensor, position: int, spec: ShardingSpec
    ) -> torch.Tensor:
        """A result that is gathered when the caller reads it."""
        if not any(spec.dims):
            return local
        fake = graph.output.args[0][position].meta["val"]  # type: ignore[index,union-attr]
        sharded = DTensor.from_local(
            local, self._mesh, spec.to_placements(self._mesh.ndim), run_check=False,
            shape=fake.shape, stride=fake.stride(),
        )  # fmt: skip

        def gather() -> torch.Tensor:
            self._agreement.meet(f"reads result {position - len(graph.mutations)} of the model")
            return sharded.full_tensor()

        return DeferredResult.of(sharded, gather)

    def _flat(
        self, step: BoundStep, args: Any, kwargs: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the program is called with, and the buffers that its first results are for."""
        graph, program = step.compiled.graph, step.compiled.local
        if graph.updates:
            parameters: dict[str, Any] = dict(self.model.named_parameters())
            with torch.no_grad():
                for name, update in graph.updates.items():
                    shard = parameters[name].to_local()
                    shard.copy_(update(shard))
        flat: list[Any] = [owner._parameters[name] for owner, name in step.parameters]
        mutated: list[torch.Tensor] = []
        if graph.buffers:
            buffers = dict(self.model.named_buffers())
            mutated = [buffers[n] for n in graph.mutations]
            # copies: backward may keep what the step is about to overwrite
            buffers |= zip(graph.mutations, copies_of(mutated), strict=True)
            flat += [buffers[n] for n in graph.buffers.values()]
        flat += [t.to(self._device) for t in graph.constants.values()]
        tensors = [x for x in _leaves(args, kwargs)[0] if isinstance(x, torch.Tensor)]
        flat += step.layout.take(
            tensors, program.input_specs, self._mesh, self._place.coords, self._device
        )
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

    def _with_numbers(self, args: Any, kwargs: Any) -> tuple[BoundStep, Any, Any]:
        """The step of a call, and its arguments with tensors for numbers that vary."""
        lifted_args, lifted_kwargs = self._numbers.lift(self.model, args, kwargs)
        if lifted_args is not args:
            try:
                step = self.step_for(lifted_args, lifted_kwargs)
                return step, lifted_args, lifted_kwargs
            except CaptureError as error:
                log.info("a number stays a constant of the program: %s", error)
                self._numbers.keep_constant(args, kwargs)
        return self.step_for(args, kwargs), args, kwargs

    # -- compiling ------------------------------------------------------------------------------

    def step_for(self, args: Any, kwargs: Any) -> BoundStep:
        """The step for inputs of these shapes, and for what its guards and assumptions allow.

        Raises:
            EngineError: ranks disagree, or some of them do not call the engine.
        """
        if any(s.offloads_parameters for steps in self._programs.values() for s in steps):
            self._reload_parameters()
        key = self._key(args, kwargs)
        steps = self._programs.setdefault(key, [])
        self._agreement.check_call(key, self._tensors(args, kwargs))
        failed: Guard | str | None = None
        for step in steps:
            failed = self._change(step) or self._failed_guard(step, args, kwargs)
            if failed is None:
                return step
        if failed is not None and len(steps) in _WARN_AT:
            log.warning(
                "capturing the model again: %s\nIt was captured %d times for these shapes; each "
                "capture costs seconds.", _reason(failed), len(steps),
            )  # fmt: skip
        # whatever mode the caller is in, the step is that of training
        with torch.inference_mode(False), torch.enable_grad(), self._untouched_if_it_fails():
            steps.append(self._compile(args, kwargs))
        if len(steps) > _KEPT:
            del steps[1]  # the first has the plan in force
        if steps[-1].offloads_parameters:
            self._reload_parameters()
        return steps[-1]

    @contextmanager
    def _untouched_if_it_fails(self) -> Iterator[None]:
        """Adopt the model's parameters; give them back if its first step cannot be compiled."""
        self._moved += adopt(self.model, self._optimizer, self._mesh)  # of replaced modules too
        try:
            yield
        except BaseException:
            if not self._laid_out:
                restore(self.model, self._optimizer, self._moved)
                self._moved = []
            raise
        self._moved = []

    def _key(self, args: Any, kwargs: Any) -> Any:
        leaves, spec = _leaves(args, kwargs)
        grads = torch.is_grad_enabled()
        described = tuple(
            (tuple(x.shape), x.dtype, grads and x.requires_grad)
            if isinstance(x, torch.Tensor)
            else repr(x)
            for x in leaves
        )
        return self.model.training, precision_modes(self._device.type), spec, described

    def _tensors(self, args: Any, kwargs: Any) -> list[torch.Tensor]:
        return [x for x in _leaves(args, kwargs)[0] if isinstance(x, torch.Tensor)]

    def _change(self, step: BoundStep) -> str | None:
        """What of the model is not as the step found it; None if nothing."""
        changed = step.assumptions.changed()
        if changed or step.reads_hold():
            return changed
        return str(first_change(self.model, step.compiled.graph.reads))

    def _failed_guard(self, step: BoundStep, args: Any, kwargs: Any) -> Guard | None:
        """The first guard of a step that a batch violates; the same on every rank."""
        guards = [g for g in step.compiled.graph.guards if g.program is not None]
        if not guards:
            return None
        leaves = pytree.tree_leaves((args, kwargs))
        used = {k for g in guards for source, k in g.sources if source == "input"}
        inputs = {k: step.layout.gather(leaves[k]) for k in used}
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        return next((g for g in guards if not g.holds(inputs, buffers)), None)

    def _compile(self, args: Any, kwargs: Any) -> BoundStep:
        options = self._options
        layout = BatchLayout.of(options.batch, options.step.cluster, (args, kwargs))
        graph = self._place.ranks.together(lambda: self._trace(layout, args, kwargs))
        fixed = FixedLayouts(
            parameters=stored_specs(self.model) if self._laid_out else {},
            inputs=layout.fixed_inputs(),
            outputs=layout.fixed_outputs(graph),
        )
        differentiated = self._differentiated(graph, args, kwargs)

        def arguments(plan: ShardingPlan, local: LocalProgram) -> Arguments:
            self._lay_out(plan)
            parameters = dict(self.model.named_parameters())
            return Arguments(
                self._example(graph, local, layout, differentiated),
                offloadable(parameters, self.model.buffers()),
            )

        compiled = compile_step(
            graph,
            lambda: self._decide(graph, fixed),
            self._place,
            arguments,
            replace(
                options.step, dump_passes=options.step.dump_passes if not dist.get_rank() else None
            ),
            trainable=trainable_inputs(graph, self.model) | differentiated,
            output_specs=fixed.outputs,
        )
        train = _eager(compiled.local) if compiled.lowered is None else bind(compiled.lowered)
        parameters = [_holder(self.model, name) for name in graph.parameters.values()]
        return BoundStep(
            len(self.steps), compiled, train, layout, parameters, Assumptions.of(self.model),
            bind_reads(self.model, graph.reads),
        )  # fmt: skip

    def _trace(self, layout: BatchLayout, args: Any, kwargs: Any) -> ModelGraph:
        """Capture the model for the global inputs."""
        inputs = layout.global_inputs(args, kwargs)
        try:
            return ColoTracer(self._device.type).trace(self.model, *inputs)
        except CaptureError as error:
            joined = layout.joined
            if len(joined) < 2:
                raise
            raise MeshError(
                f"the model cannot be captured for all ranks' samples. With batch='local', inputs "
                f"{joined} count as samples, because their first size is {layout.samples}, and are "
                "joined over the ranks. If one of them is not per sample (weights of classes, a "
                "mask of positions), keep it as a buffer of the model; else the cause is: "
                f"{str(error).splitlines()[-1].strip()}"
            ) from error

    def _differentiated(self, graph: ModelGraph, args: Any, kwargs: Any) -> frozenset[str]:
        """Placeholder names of the inputs whose gradients the caller wants."""
        if not self._key(args, kwargs)[-1]:
            return frozenset()
        leaves = pytree.tree_leaves((args, kwargs))
        return frozenset(
            name
            for name, x in zip(graph.inputs, leaves, strict=True)
            if name is not None and x.requires_grad
        )

    def _decide(self, graph: ModelGraph, fixed: FixedLayouts) -> StepPlan:
        """The plan that was given, or a new one; on rank 0."""
        options, cluster = self._options, self._options.step.cluster
        if options.plan is not None and not fixed.parameters:
            name = type(self.model).__name__
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
            plan = autoplan(self.model, budget_bytes=unlimited, **planning).plan
            return StepPlan(replace(plan, budget_bytes=cluster.budget_bytes))
        joint = plan_step(self.model, output_specs=fixed.outputs, **planning)
        program = None if joint.step is None else joint.step.program
        return StepPlan(joint.planned.plan, program, joint.memory)

    def _lay_out(self, plan: ShardingPlan) -> None:
        """Lay parameters and optimizer state out by the first plan."""
        if self._laid_out:
            return
        distribute(
            self.model, self._optimizer, plan.parameter_specs(), self._mesh, self._place.coords,
            self._device,
        )  # fmt: skip
        self._laid_out = True
        if self._optimizer is not None:
            StepOnShards.attach(self._optimizer)

    def _example(
        self,
        graph: ModelGraph,
        program: LocalProgram,
        layout: BatchLayout,
        differentiated: frozenset[str],
    ) -> list[torch.Tensor]:
        """Tensors as the program will be called with."""
        parameters: dict[str, Any] = dict(self.model.named_parameters())
        buffers = dict(self.model.named_buffers())
        example = [
            parameters[n].to_local().detach().requires_grad_(parameters[n].requires_grad)
            for n in graph.parameters.values()
        ]
        example += [buffers[n] for n in graph.buffers.values()]
        example += [t.to(self._device) for t in graph.constants.values()]
        inputs = layout.example_shards(graph, program.input_specs, self._place.coords, self._device)
        names = (n for n in graph.inputs if n is not None)
        example += [
            x.requires_grad_(name in differentiated) for name, x in zip(names, inputs, strict=True)
        ]
        if program.takes_seed:
            example.append(torch.zeros((), dtype=torch.int64))
        return example

    def _reload_parameters(self) -> None:
        reload_all(dict(self.model.named_parameters()), self.model.buffers())


def _reason(failed: Guard | str) -> str:
    """Why a step does not apply."""
    if isinstance(failed, str):
        return failed
    return f"{failed}\nMove the decision out of the model, or make all batches agree in it."


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
