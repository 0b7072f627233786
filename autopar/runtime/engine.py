"""`auto_engine`: the model and optimizer a training loop uses, planned and distributed.

The engine stands in for the model. At the first batch (or from `example_inputs`) rank 0 plans, all
ranks take its plan, parameters and optimizer state become DTensors, and the batch runs through the
rank's program. A batch of new shapes, or a switch between train and eval, makes another program
with the parameters' layouts kept.
"""

from __future__ import annotations

import logging
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
from autopar.comm import async_result as late
from autopar.comm import world as environment
from autopar.comm.offloaded_parameters import at_home, may_leave
from autopar.errors import EngineError, MeshError
from autopar.passes.apply_sharding import LocalProgram, apply_sharding
from autopar.passes.verify import collective_signature
from autopar.plan import ShardingPlan
from autopar.planner.constraints import refuse_outputs
from autopar.planner.decisions import FixedLayouts
from autopar.planner.joint import plan_jointly
from autopar.planner.optimizer_state import optimizer_state_ratio
from autopar.planner.planner import build_problem, trainable_inputs
from autopar.runtime.agree import Scheduler, check_agreement, from_rank_zero
from autopar.runtime.batch import BatchLayout
from autopar.runtime.buffers import copies_of, copy_all
from autopar.runtime.distribute import check_optimizer, distribute, shards
from autopar.runtime.lower import LoweredStep, lower
from autopar.runtime.state_on_host import StateOnHost
from autopar.runtime.step_on_shards import StepOnShards
from autopar.schedule.budget import MemoryPlan, StepBudget
from autopar.schedule.program import Program
from autopar.schedule.transfers import large_parameters
from autopar.tracer import ColoTracer, Guard, ModelGraph

log = logging.getLogger(__name__)

_UNBOUNDED = 2.0**60  # bytes

# numbers of captures for the same shapes at which the engine says so
_WORTH_SAYING = (1, 2, 4, 8, 16, 32, 64, 128, 256)


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
            fit computes again, and gathers again, what it cannot keep (docs/memory.md).
        lower: False runs the sharded graph eagerly, without AOTAutograd (debugging).
        compile: run forward and backward by Inductor; the plan stays in force.
        constraints: layouts by name, as in `autoplan`; those of results are for `batch` to say.
        time_limit: seconds for the solver.
        progress: called with a line per planning stage, on rank 0.

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
    given = ShardingPlan.load(plan) if isinstance(plan, str | Path) else plan
    engine = Engine(
        model, optimizer, cluster, given, batch=batch, lowered=lower, compiled=compile,
        constraints=constraints, time_limit=time_limit, progress=progress,
    )  # fmt: skip
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
class _Specialization:
    """The program for one shape of inputs, one mode, and the values that its guards allow."""

    graph: ModelGraph
    plan: ShardingPlan
    program: LocalProgram
    run: Callable[..., Any]
    layout: BatchLayout
    parameters: Sequence[tuple[torch.nn.Module, str]]  # as their modules hold them
    late: tuple[int, ...] = ()  # see `LoweredStep`


class Engine(torch.nn.Module):
    """Stands in for the model: same parameter names, `state_dict`, modes and attributes."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        cluster: ClusterInfo,
        plan: ShardingPlan | None,
        *,
        batch: str,
        lowered: bool,
        compiled: bool,
        constraints: Mapping[str, str] | None,
        time_limit: float,
        progress: Callable[[str], None] | None,
    ) -> None:
        super().__init__()
        # share the registries, so that names carry no prefix and training mode reaches submodules
        self._modules, self._parameters = model._modules, model._parameters
        self._buffers = model._buffers
        self.training = model.training
        hide = object.__setattr__
        hide(self, "_model", model)
        hide(self, "_optimizer", optimizer)
        self._cluster, self._given, self._batch, self._lowered = cluster, plan, batch, lowered
        self._compiled = compiled
        self._constraints, self._time_limit, self._progress = constraints, time_limit, progress
        self._programs: dict[Any, list[_Specialization]] = {}
        self._plan: ShardingPlan | None = None
        self._memory: MemoryPlan | None = None
        self._scheduled: tuple[Program, MemoryPlan] | None = None  # with the plan, on rank 0
        self._away: StateOnHost | None = None
        self._parameters_leave = False
        self._steps = 0
        self._draws = 0
        self._device = environment.device_for(cluster)
        self._mesh = environment.start(cluster, self._device)
        self._coords = cluster.coords(dist.get_rank())
        self._groups = environment.process_groups(self._mesh)
        self._seed = int(from_rank_zero(lambda: torch.initial_seed() % 2**62))

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
        """The plan in force.

        Raises:
            EngineError: no batch was seen yet.
        """
        if self._plan is None:
            raise EngineError(
                "no plan yet: it is made at the first batch, or pass example_inputs= to auto_engine"
            )
        return self._plan

    @property
    def memory_plan(self) -> MemoryPlan | None:
        """What the step that was compiled last keeps and computes again; None without a budget."""
        return self._memory

    def plan_for(self, *args: Any, **kwargs: Any) -> None:
        """Plan and distribute for inputs of these shapes, without running them."""
        self._specialization(args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        late.finish_all()
        special = self._specialization(args, kwargs)
        if self._away is not None and torch.is_grad_enabled():
            self._away.leave()
        graph, program = special.graph, special.program
        flat, written = self._flat(special, args, kwargs)
        lowered = torch.is_grad_enabled()
        with self._common_draws(graph):
            results = list(special.run(*flat) if lowered else program.gm(*shards(flat)))
        count = len(written)
        if written:
            with torch.no_grad():
                copy_all(written, results[:count])
        given = [*results[:count], *special.layout.give(results[count:])]
        for k in special.late if lowered else ():
            given[k] = late.hand_out(given[k])
        return pytree.tree_unflatten(given[count:], graph.out_spec)

    def _flat(
        self, special: _Specialization, args: Any, kwargs: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the program is called with, and the buffers that its first results are for."""
        graph, program = special.graph, special.program
        if graph.updates:
            found = dict(self._model.named_parameters())
            with torch.no_grad():
                for name, update in graph.updates.items():
                    shard = found[name].to_local()
                    shard.copy_(update(shard))
        flat: list[Any] = [owner._parameters[name] for owner, name in special.parameters]
        written: list[torch.Tensor] = []
        if graph.buffers:
            buffers = dict(self._model.named_buffers())
            written = [buffers[n] for n in graph.mutations]
            # copies: backward may keep what the step is about to overwrite
            buffers |= zip(graph.mutations, copies_of(written), strict=True)
            flat += [buffers[n] for n in graph.buffers.values()]
        flat += [t.to(self._device) for t in graph.constants.values()]
        tensors = [x for x in _leaves(args, kwargs)[0] if isinstance(x, torch.Tensor)]
        flat += special.layout.take(tensors, program.input_specs, self._coords, self._device)
        if program.takes_seed:
            self._steps += 1
            flat.append(torch.tensor((self._seed + self._steps) % 2**62))
        return flat, written

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

    # -- planning -------------------------------------------------------------------------------

    def _key(self, args: Any, kwargs: Any) -> Any:
        leaves, spec = _leaves(args, kwargs)
        described = tuple(
            (tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in leaves
        )
        return self.training, spec, described

    def _specialization(self, args: Any, kwargs: Any) -> _Specialization:
        """The program for inputs of these shapes, and of values that its guards allow."""
        if self._parameters_leave:
            self._at_home()
        programs = self._programs.setdefault(self._key(args, kwargs), [])
        failed = None
        for special in programs:
            failed = self._failed_guard(special, args, kwargs)
            if failed is None:
                return special
        if failed is not None and len(programs) in _WORTH_SAYING:
            log.warning(
                "capturing the model again: this batch takes another branch than %d before it.\n"
                "%s\nMove the decision out of the model, or make the batches alike in it.",
                len(programs), failed,
            )  # fmt: skip
        programs.append(self._specialize(args, kwargs))
        return programs[-1]

    def _failed_guard(self, special: _Specialization, args: Any, kwargs: Any) -> Guard | None:
        """The first guard of a program that a batch violates; the same on every rank."""
        guards = [g for g in special.graph.guards if g.program is not None]
        if not guards:
            return None
        leaves = pytree.tree_leaves((args, kwargs))
        used = {k for g in guards for what, k in g.sources if what == "input"}
        whole = {k: special.layout.gather(leaves[k]) for k in used}
        buffers = dict(self._model.named_buffers(remove_duplicate=False))
        return next((g for g in guards if not g.holds(whole, buffers)), None)

    def _specialize(self, args: Any, kwargs: Any) -> _Specialization:
        layout = BatchLayout.of(self._batch, self._cluster, (args, kwargs))
        whole_args, whole_kwargs = layout.whole(args, kwargs)
        tracer = ColoTracer(self._device.type)
        graph = tracer.trace(self._model, whole_args, whole_kwargs)
        fixed = FixedLayouts(
            parameters=self._fixed_parameters(),
            inputs=layout.fixed_inputs(),
            outputs=layout.fixed_outputs(graph),
        )
        plan = self._agree_on_plan(graph, fixed)
        output_specs = fixed.outputs
        trainable = trainable_inputs(graph, self._model)
        program = apply_sharding(
            graph, plan, coords=self._coords, groups=self._groups,
            output_specs=output_specs, trainable=trainable,
        )  # fmt: skip
        what = "sequence of collectives"
        check_agreement(what, collective_signature(program.gm, self._groups))
        if self._plan is None:
            distribute(
                self._model, self._optimizer, plan.parameter_specs(), self._mesh, self._coords,
                self._device,
            )  # fmt: skip
            if self._optimizer is not None:
                StepOnShards(self._optimizer)
            self._plan = plan
        held = [_holder(self._model, name) for name in graph.parameters.values()]
        if not self._lowered:
            eager = LoweredStep(lambda *flat: program.gm(*shards(flat)))
            return _Specialization(graph, plan, program, eager, layout, held)
        example = self._example(graph, program, layout)
        scheduler = self._scheduler(graph, plan, example)
        names = list(graph.parameters.values())
        step = lower(
            program.gm, example, reshard_after_forward=[names.index(n) for n in plan.reshard_after_forward if n in names],
            device_type=self._device.type, choose=scheduler, cluster=self._cluster,
            compile=self._compiled, parameters=self._may_leave(graph),
            at_once=len(graph.mutations),
        )  # fmt: skip
        ran = [collective_signature(g, self._groups) for g in (step.forward, step.backward) if g]
        check_agreement(what, " ".join(ran))
        self._memory = None if scheduler is None else scheduler.found
        if self._memory is not None and self._memory.state_on_host and self._away is None:
            assert self._optimizer is not None
            self._away = StateOnHost(self._optimizer)
        if self._memory is not None and self._memory.parameters_on_host:
            self._parameters_leave = True
            self._at_home()
        return _Specialization(graph, plan, program, step, layout, held, step.late)

    def _example(
        self, graph: ModelGraph, program: LocalProgram, layout: BatchLayout
    ) -> list[torch.Tensor]:
        """Tensors as the program will be called with."""
        found = dict(self._model.named_parameters())
        buffers = dict(self._model.named_buffers())
        example = [
            found[n].to_local().detach().requires_grad_(found[n].requires_grad)
            for n in graph.parameters.values()
        ]
        example += [buffers[n] for n in graph.buffers.values()]
        example += [t.to(self._device) for t in graph.constants.values()]
        example += layout.example_shards(graph, program.input_specs, self._coords, self._device)
        if program.takes_seed:
            example.append(torch.zeros((), dtype=torch.int64))
        return example

    def _at_home(self) -> None:
        at_home(dict(self._model.named_parameters()), self._model.buffers())

    def _may_leave(self, graph: ModelGraph) -> dict[int, str]:
        """Parameters that a schedule may have on the host, by their position."""
        found = may_leave(dict(self._model.named_parameters()), self._model.buffers())
        return {k: name for k, name in large_parameters(graph).items() if name in found}

    def _scheduler(
        self, graph: ModelGraph, plan: ShardingPlan, example: Sequence[torch.Tensor]
    ) -> Scheduler | None:
        """What chooses between keeping and computing again, where there is a budget: of this run,
        or of the plan that was given, if its step was scheduled."""
        memory = self._cluster.memory_bytes
        if memory is None and plan.step is not None:
            memory = plan.budget_bytes
        if memory is None:
            return None
        buffers = dict(self._model.named_buffers())
        copied = sum(buffers[n].nbytes for n in graph.mutations)
        state = optimizer_state_ratio(self._optimizer)
        host = self._cluster.host_link
        budget = StepBudget.of(example, memory, state, copied, host)
        return Scheduler(budget, self._scheduled)

    def _fixed_parameters(self) -> dict[str, Any]:
        return {} if self._plan is None else self._plan.parameter_specs()

    def _agree_on_plan(self, graph: ModelGraph, fixed: FixedLayouts) -> ShardingPlan:
        """Rank 0 plans; all ranks take its plan, or raise its error."""
        name = type(self._model).__name__

        def decide() -> str:
            if self._given is not None and self._plan is None:
                self._given.check(
                    fingerprint=graph.fingerprint, mesh=self._cluster.mesh, model=name
                )
                return self._given.to_json()
            return self._plan_graph(graph, fixed).to_json()

        return ShardingPlan.from_json(from_rank_zero(decide))

    def _plan_graph(self, graph: ModelGraph, fixed: FixedLayouts) -> ShardingPlan:
        cluster = self._cluster
        scheduled = cluster.memory_bytes is not None and self._lowered
        if scheduled and cluster.world_size == 1:  # nothing to shard, and the schedule comes later
            cluster = replace(cluster, memory_bytes=_UNBOUNDED)
        problem = build_problem(
            self._model,
            graph=graph,
            cluster=cluster,
            optimizer_state=optimizer_state_ratio(self._optimizer),
            fixed=fixed,
            constraints=self._constraints,
            time_limit=self._time_limit,
            progress=self._progress,
        )
        if not scheduled:
            return problem.planned(problem.decide()).plan
        pair = plan_jointly(problem, output_specs=fixed.outputs)
        if pair.memory is not None and pair.step is not None:
            self._scheduled = pair.step.program, pair.memory
        return pair.planned.plan


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sequence[Any], Any]:
    """A batch's leaves, and what tells its structure; at once where nothing is nested."""
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
