"""`auto_engine`: the model and optimizer a training loop uses, planned and distributed.

The engine takes the model's place. At the first batch (or from `example_inputs`) rank 0 plans, all
ranks take its plan, parameters and optimizer state are laid out by it, and the batch runs through
the rank's program (`step_runner.py`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from autopar.cluster.cluster import ClusterInfo
from autopar.cluster.local import as_cluster
from autopar.compiled_step import StepOptions
from autopar.errors import EngineError, MeshError
from autopar.plan import ShardingPlan
from autopar.planner.constraints import refuse_outputs
from autopar.planner.optimizer_state import optimizer_state_ratio
from autopar.runtime.adoption import check_optimizer
from autopar.runtime.batch import BatchDim
from autopar.runtime.bound_step import BoundStep
from autopar.runtime.call import Call
from autopar.runtime.optimizer_state import handle_later_optimizers
from autopar.runtime.step_compiler import EngineOptions, StepCompiler
from autopar.runtime.step_runner import StepRunner
from autopar.schedule.budget import MemoryPlan


def auto_engine(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    cluster_info: ClusterInfo | str | Path,
    *,
    example_inputs: Any = None,
    plan: ShardingPlan | str | Path | None = None,
    weights: str | Path | None = None,
    batch: str = "global",
    batch_dim: BatchDim = 0,
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
        model: any module that `ColoTracer` captures; an engine to distribute anew, and what
            `torch.compile` or DistributedDataParallel wrapped, is taken out of its wrapper.
        optimizer: any `torch.optim` optimizer over the model's parameters, or None to evaluate
            only or to make it from the engine's parameters. It is returned itself, with its
            parameters and state sharded once the plan is known, so schedulers that hold it keep
            working.
        cluster_info: a `ClusterInfo`, the path of its YAML, or a mesh string such as "2x2", of GPUs
            where this process sees one, else of CPUs.
        example_inputs: kwargs, args or (args, kwargs) to plan with now instead of at the first
            batch.
        plan: a plan or its file, instead of planning.
        weights: a safetensors file or folder, or one of torch.distributed.checkpoint, of the
            model's state dict; every rank reads the slices that it keeps (docs/checkpoints.md).
        batch: "global": every rank passes the same batch and the engine takes its part; "local":
            every rank passes its own samples, as with DDP and a DistributedSampler.
        batch_dim: which dim of the inputs holds the samples, with local batches: a number (of
            inputs with fewer dims, their last), or by names of arguments of `forward`, None for one
            that is the same on all ranks. An input whose size there is not that of the batch is
            taken to be the same on all ranks.
        memory: budget per device ("40GiB", bytes, or a share of the device). A step that does not
            fit recomputes, re-gathers or offloads what it cannot keep (docs/memory.md).
        lower: False runs the sharded graph eagerly, without AOTAutograd (debugging).
        compile: run forward and backward by Inductor; the plan stays in force.
        constraints: layouts by name, as in `autoplan`; those of results are for `batch` to say.
        time_limit: seconds for the solver.
        progress: called with a line per planning stage, on rank 0.
        dump_passes: folder for rank 0's graphs before and after each pass.

    Returns:
        the engine (an instance of the model's class that shares everything with the model) and the
        optimizer.

    Raises:
        MeshError: the mesh does not fit the world, or a batch does not divide.
        EngineError: the optimizer is not the model's, or values are missing or do not fit.
        PlanError: the plan is damaged or for something else.
        InfeasibleError: no plan fits the memory; it names the smallest budget.
        CaptureError: the model cannot be captured.
    """
    if batch not in ("global", "local"):
        raise ValueError(f"batch must be 'global' or 'local', got {batch!r}")
    if batch == "global" and batch_dim != 0:
        raise ValueError("batch_dim is for batch='local'; a global batch needs none")
    if compile and not lower:
        raise ValueError("compile=True compiles the lowered graphs; leave lower=False out")
    refuse_outputs(constraints)
    model = unwrapped(model)
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
        batch_dim=batch_dim,
        constraints=dict(constraints or {}),
        time_limit=time_limit,
        progress=progress,
        weights=None if weights is None else Path(weights),
    )
    engine = _engine_of(StepRunner(StepCompiler(model, optimizer, options)))
    handle_later_optimizers()
    if example_inputs is not None:
        args, kwargs = split_inputs(example_inputs)
        engine.plan_for(*args, **kwargs)
    return engine, optimizer


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The user's model, without an engine, `torch.compile` or DistributedDataParallel around."""
    while True:
        if isinstance(model, Engine):
            model = model._runner.model
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def split_inputs(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Normalize example inputs: kwargs, args, (args, kwargs) or one tensor to (args, kwargs)."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        if len(example) == 2 and isinstance(example[0], tuple) and isinstance(example[1], dict):
            return tuple(example[0]), dict(example[1])
        return tuple(example), {}
    return (example,), {}


class Engine(torch.nn.Module):
    """What the engine adds to the class of the model.

    An engine and its model are two objects with one `__dict__`: submodules, parameters, modes and
    attributes are the same, whichever of the two they are set on. Calling the engine runs the
    program; calling the model runs its own forward.
    """

    __slots__ = ("_runner",)
    _runner: StepRunner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)  # hooks of the model are in the program

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._runner(*args, **kwargs)

    @property
    def plan(self) -> ShardingPlan:
        """The plan in force: of the step that was compiled first.

        Raises:
            EngineError: no batch was seen yet.
        """
        steps = self.steps
        if not steps:
            raise EngineError(
                "no plan yet: it is made at the first batch, or pass example_inputs= to auto_engine"
            )
        return steps[0].compiled.plan

    @property
    def memory_plan(self) -> MemoryPlan | None:
        """What the step that was compiled last keeps, recomputes and offloads; None without a
        budget."""
        steps = self.steps
        return steps[-1].compiled.memory if steps else None

    @property
    def steps(self) -> list[BoundStep]:
        """The steps compiled so far, in their order."""
        return self._runner.steps

    @property
    def _programs(self) -> list[BoundStep]:
        return self.steps  # under the name that scripts have counted captures by

    def run_within(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        """Run every later call within a context, such as an autocast.

        Args:
            context: makes it, for each call.
        """
        self._runner.context = context

    def plan_for(self, *args: Any, **kwargs: Any) -> None:
        """Plan and distribute for inputs of these shapes, without running them."""
        self._runner.step_for(Call.of(args, kwargs))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's, with DTensors for `torch.distributed.checkpoint`; whole tensors within the
        model's own methods (`save_pretrained`)."""
        state = super().state_dict(*args, **kwargs)
        for name, value in state.items():
            if isinstance(value, DTensor):
                state[name] = self._runner.saved(value)
        return state

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        for p in self.parameters():
            probe = fn(torch.empty(0, dtype=p.dtype, device=p.device))
            if probe.dtype != p.dtype or probe.device.type != p.device.type:
                raise EngineError(
                    f"the engine's parameters are {p.dtype} on {p.device.type}, and its plan is "
                    f"for that; convert the model to {probe.dtype} on {probe.device.type} before "
                    "auto_engine"
                )
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """An engine of its own, without an optimizer, by the same plan."""
        model = copy.deepcopy(self._runner.model, memo)
        memo[id(self)] = twin = _engine_of(self._runner.for_copy(model))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise EngineError(
            f"an engine of {type(self).__name__} cannot be pickled: this rank has shards of the "
            "parameters only. Save its state_dict() with torch.distributed.checkpoint, or whole "
            "tensors with torch.distributed.checkpoint.state_dict.get_model_state_dict(engine, "
            "options=StateDictOptions(full_state_dict=True)) on all ranks"
        )


def _engine_of(runner: StepRunner) -> Engine:
    """The engine that shares everything with a runner's model."""
    cls = _engine_class(type(runner.model))  # type: ignore[arg-type]
    engine: Engine = cls.__new__(cls)
    object.__setattr__(engine, "__dict__", runner.model.__dict__)
    object.__setattr__(engine, "_runner", runner)
    return engine


@functools.cache
def _engine_class(model_class: type[torch.nn.Module]) -> type[Engine]:
    """A subclass of the model's class under the same name, whose forward is the engine's."""

    @torch.compiler.disable  # it runs compiled programs
    @functools.wraps(model_class.forward)
    def forward(self: Engine, *args: Any, **kwargs: Any) -> Any:
        return self._runner(*args, **kwargs)

    members: dict[str, Any] = {"__slots__": (), "forward": forward}
    for klass in model_class.__mro__:
        if klass in torch.nn.Module.__mro__:
            continue
        for name, member in vars(klass).items():
            if isinstance(member, FunctionType) and not name.startswith("_"):
                members.setdefault(name, _with_whole_parameters(name, member))
    members |= {"__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (Engine, model_class), members)


def _with_whole_parameters(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the model that the engine's caller calls: it finds whole parameters."""

    @functools.wraps(method)
    def call(self: Engine, *args: Any, **kwargs: Any) -> Any:
        with self._runner.whole_parameters():
            return method(self, *args, **kwargs)

    return call


__all__ = ["Engine", "MeshError", "auto_engine", "split_inputs", "unwrapped"]
