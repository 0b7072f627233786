"""`auto_engine`: the model and optimizer a training loop uses, planned and distributed.

The engine takes the model's place. At the first batch (or from `example_inputs`) rank 0 plans, all
ranks take its plan, parameters and optimizer state are laid out by it, and the batch runs through
the rank's program (`step_runner.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from autopar.cluster.cluster import ClusterInfo
from autopar.cluster.local import as_cluster
from autopar.compiled_step import StepOptions
from autopar.errors import PlanError
from autopar.ir.precision import Precision
from autopar.passes.compile_mode import CompileMode
from autopar.plan import ShardingPlan
from autopar.planner.constraints import refuse_outputs
from autopar.planner.optimizer_state import optimizer_state_ratio, step_tiers
from autopar.planner.tensor_schemes import check_scheme
from autopar.progress import TIME_LIMIT, Progress, Tell, silent_if_false
from autopar.runtime.adoption import check_optimizer
from autopar.runtime.batch import BatchDim
from autopar.runtime.call import Call
from autopar.runtime.engine import Engine, engine_of
from autopar.runtime.engine_options import EngineOptions
from autopar.runtime.optimizer_state import handle_later_optimizers
from autopar.runtime.recorded_step import record_steps
from autopar.runtime.step_compiler import StepCompiler
from autopar.runtime.step_runner import StepRunner
from autopar.versions import warn_if_torch_is_untested


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
    precision: Precision | str | torch.dtype | None = None,
    lower: bool = True,
    compile: bool | str = False,
    constraints: Mapping[str, str] | str | None = None,
    microbatches: int | None = None,
    microbatch: str = "exact",
    schedule: str | None = None,
    stages: str | None = None,
    loss_fn: Callable[..., Any] | None = None,
    resume: bool = False,
    time_limit: float = TIME_LIMIT,
    progress: Callable[[str], None] | bool | None = True,
    dump_passes: str | Path | None = None,
) -> tuple[torch.nn.Module, Any]:
    """Distribute a model and its optimizer over a mesh; the training loop stays as it was.

    Args:
        model: any module that `ColoTracer` captures; an engine to distribute anew, and what
            `torch.compile` or DistributedDataParallel wrapped, is taken out of its wrapper.
        optimizer: any `torch.optim` optimizer over the model's parameters, or None for inference,
            or to make it from the engine's parameters. With None, what is called without gradients
            is planned as a forward, and so is `example_inputs` if the model is in evaluation mode
            (docs/inference.md). An optimizer is returned itself, with its
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
        precision: dtypes of parameters, of compute and gathers, and of the sums of gradients:
            "bf16", "fp16", or a `Precision` (docs/precision.md). If None, those of the plan that
            is given, else those of the model's tensors and of an autocast around its calls.
        lower: False runs the sharded graph eagerly (debugging).
        compile: True runs forward and backward by Inductor; the plan stays in force. "auto" does so
            on GPUs, with ATen's operators for what cannot be built or differs at the first step.
            "cudagraphs" is refused as yet (docs/memory.md).
        constraints: layouts by name, or the name of a preset, as in `autoplan`; those of results
            are for `batch` to say.
        microbatches: slices of the batch that the step processes one after another, with the
            gradients of the whole batch (docs/pipelines.md).
        microbatch: "exact" refuses a model that mixes samples (BatchNorm in training);
            "independent" takes each microbatch as a batch of its own, as a loop that accumulates
            gradients does.
        schedule: order in which pipeline stages run ("1f1b", "zbv", ... or a CSV file); the fastest
            if None. The axis of stages is that named pipe (docs/pipelines.md).
        stages: modules at which the second and later stages begin ("h.4,h.8"); the fastest if None.
        loss_fn: a loss outside of the model, as a part of its program: `engine(x, target=y)` gives
            `loss_fn(model(x), y)`. It has no parameters of its own.
        resume: go on from the last states that a run has left on the drive of the cluster's tier
            "nvme" (docs/memory.md); begin anew if there are none.
        time_limit: seconds of processor time for all runs of the solver and all schedules of a plan
            together. The best plan known then is taken, and its line says how far it may be from
            the optimum.
        progress: how rank 0 tells of the stages of planning, in a line each with its time: True
            writes them to stderr, a function gets them, False or None is silent. `logging` has
            them and more, under the name "autopar".
        dump_passes: folder for rank 0's graphs before and after each pass.

    Returns:
        the engine (an instance of the model's class that shares everything with the model) and the
        optimizer.

    Raises:
        MeshError: the mesh does not fit the world, or a batch does not divide.
        EngineError: the optimizer is not the model's, values are missing or do not fit, or Python
            allows no subclass of the model's class.
        PlanError: the plan is damaged or for something else.
        InfeasibleError: no plan fits the memory; it names the smallest budget.
        CaptureError: the model cannot be captured.
    """
    if batch not in ("global", "local"):
        raise ValueError(f"batch must be 'global' or 'local', got {batch!r}")
    if microbatch not in ("exact", "independent"):
        raise ValueError(f"microbatch must be 'exact' or 'independent', got {microbatch!r}")
    if microbatches is not None and (type(microbatches) is not int or microbatches < 1):
        raise ValueError(f"microbatches must be a positive number, got {microbatches!r}")
    policy = Precision.of(precision)
    if isinstance(plan, str | Path):
        plan = ShardingPlan.load(plan)
    if policy is None and plan is not None:
        policy = plan.precision
    if policy is not None and not lower:
        raise ValueError("precision= is put in force as the step is lowered; leave lower=False out")
    tell = silent_if_false(progress, _write_to_stderr)
    warn_if_torch_is_untested(torch.__version__)
    if isinstance(constraints, str):
        check_scheme(constraints)
    else:
        refuse_outputs(constraints)
    model = unwrapped(model)
    cluster = as_cluster(cluster_info).with_memory(memory)
    compiled = CompileMode.of(compile, cluster.device.kind, lowered=lower)
    if plan is not None:
        if microbatches not in (None, plan.microbatches):
            raise PlanError(
                f"the plan is for {plan.microbatches} microbatches, and microbatches="
                f"{microbatches} was asked for; leave that out, or plan again"
            )
        microbatches = plan.microbatches
    for name, value in (("schedule", schedule), ("stages", stages)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} must be text, got {value!r}")
    if loss_fn is not None and not callable(loss_fn):
        raise ValueError(f"loss_fn must be callable as loss_fn(results, target), got {loss_fn!r}")
    splits = (microbatches or 1) > 1 or cluster.pipeline_ranks > 1
    if splits and not lower:
        raise ValueError("microbatches and stages run lowered graphs; leave lower=False out")
    if batch == "global" and batch_dim != 0 and not splits:
        raise ValueError("batch_dim is for batch='local', microbatches and stages")
    check_optimizer(model, optimizer)
    if policy is not None:
        policy.check(model)
    options = EngineOptions(
        step=StepOptions(
            cluster=cluster,
            lowered=lower,
            compile=compiled,
            optimizer_state=optimizer_state_ratio(optimizer),
            steps_on=step_tiers(optimizer),
            time_limit=time_limit,
            dump_passes=None if dump_passes is None else Path(dump_passes),
            progress=Progress(None if tell is None else _on_rank_zero(tell)),
        ),
        plan=plan,
        batch=batch,
        batch_dim=batch_dim,
        constraints=constraints if isinstance(constraints, str) else dict(constraints or {}),
        weights=None if weights is None else Path(weights),
        precision=policy,
        microbatches=microbatches,
        microbatch=microbatch,
        schedule=schedule,
        stages=stages,
        loss_fn=loss_fn,
        resume=resume,
    )
    engine = engine_of(StepRunner(StepCompiler(model, optimizer, options)))
    handle_later_optimizers()
    if optimizer is not None:
        record_steps(optimizer)
    if example_inputs is not None:
        args, kwargs = split_inputs(example_inputs)
        evaluates = optimizer is None and not model.training
        with torch.no_grad() if evaluates else nullcontext():
            engine._autopar_runner.step_for(Call.of(args, kwargs))
    return engine, optimizer


def _write_to_stderr(line: str) -> None:
    print(f"autopar: {line}", file=sys.stderr, flush=True)


def _on_rank_zero(tell: Tell) -> Tell:
    def on_rank_zero(line: str) -> None:
        if not dist.is_initialized() or dist.get_rank() == 0:
            tell(line)

    return on_rank_zero


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The user's model, without an engine, `torch.compile` or DistributedDataParallel around."""
    while True:
        if isinstance(model, Engine):
            model = model._autopar_runner.model
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
