"""The ranks of `benchmarks.regret`: all contestants in the same processes, measured in turn."""

from __future__ import annotations

import gc
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from autopar import ClusterInfo, ShardingPlan, auto_engine
from benchmarks import common
from benchmarks.regret_cases import Batch, Case, case

WARM_UP = 3
# Of a loss in float32 after two steps of Adam, whose first step takes the sign of every gradient.
AGREE = 2e-3


@dataclass
class Contestant:
    """A distributed model and its optimizer.

    Args:
        name: as printed.
        model: returns the loss of `batch`.
        optimizer: of its parameters.
        batch: what this rank passes.
        around: wraps forward and backward.
        mean: whether the loss is that of this rank's samples, to be averaged over the ranks.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Batch
    around: Callable[[], Any] = nullcontext
    mean: bool = False

    def step(self) -> torch.Tensor:
        """One step of training; the loss."""
        with self.around():
            loss = self.model(**self.batch)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def global_loss(self) -> float:
        """The loss of the global batch, before a step that it takes."""
        loss = self.step()
        loss = loss.full_tensor() if isinstance(loss, DTensor) else loss.clone()
        if self.mean:
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        return float(loss)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """One kernel for all parameters of a kind: DTensors and others do not go into one."""
    kinds: dict[bool, list[nn.Parameter]] = {}
    for p in model.parameters():
        kinds.setdefault(isinstance(p, DTensor), []).append(p)
    groups = [{"params": group} for group in kinds.values()]
    return torch.optim.AdamW(groups, lr=1e-4, fused=True)


def _samples(batch: Batch, mesh: DeviceMesh) -> Batch:
    """Those of this rank, of equal number on all."""
    return {k: x.chunk(mesh.size())[mesh.get_local_rank()] for k, x in batch.items()}


def contestants(
    of: Case, plans: Mapping[str, tuple[str, str]], batch: Batch
) -> Iterator[Contestant]:
    """Every way to train the case on this world, from the same weights.

    Args:
        plans: of autopar, by name: the `ClusterInfo` as YAML's file and the plan's.
    """

    def build() -> nn.Module:
        torch.manual_seed(0)
        return of.build()

    for name, (cluster, plan) in plans.items():
        model = build()
        model, optimizer = auto_engine(
            model, _optimizer(model), ClusterInfo.load(cluster), plan=ShardingPlan.load(plan)
        )
        yield Contestant(name, model, optimizer, batch)
    world = dist.get_world_size()
    flat = init_device_mesh("cpu", (world,), mesh_dim_names=("all",))
    model = DistributedDataParallel(build(), gradient_as_bucket_view=True)
    mine = _samples(batch, flat)
    yield Contestant("DDP", model, _optimizer(model), mine, mean=True)
    model = _fully_sharded(build(), of, flat)
    yield Contestant("FSDP2", model, _optimizer(model), mine, mean=True)
    around = loss_parallel if of.split_loss else nullcontext
    model = parallelize_module(build(), flat, of.tensor())
    yield Contestant("TP", model, _optimizer(model), batch, around)
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        model = parallelize_module(build(), mesh["tensor"], of.tensor())
        model = _fully_sharded(model, of, mesh["data"])
        part = _samples(batch, mesh["data"])
        yield Contestant("FSDP2 + TP", model, _optimizer(model), part, around, mean=True)


def _fully_sharded(model: nn.Module, of: Case, mesh: DeviceMesh) -> nn.Module:
    for name in of.blocks:
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _agreed(losses: Mapping[str, list[float]]) -> None:
    """Raises RuntimeError if contestants train differently."""
    reference = losses["DDP"]
    for name, own in losses.items():
        off = max(abs(a / b - 1) for a, b in zip(own, reference, strict=True))
        if not off < AGREE:
            raise RuntimeError(f"{name} has losses {own}, DDP {reference}: not the same training")


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measure(job: Mapping[str, Any]) -> dict[str, Any] | None:
    """Seconds of the slowest rank, per contestant and round; on rank 0."""
    of = case(job["case"])
    torch.manual_seed(1)
    batch = of.batch()
    racing = list(contestants(of, job["plans"], batch))
    losses = {c.name: [c.global_loss() for _ in range(WARM_UP)] for c in racing}
    _agreed(losses)
    times = torch.zeros(job["rounds"], len(racing))
    processor = torch.zeros(job["rounds"], len(racing))
    with _no_collection():
        for k, order in enumerate(common.turns(len(racing), job["rounds"])):
            for who in order:
                dist.barrier()
                begin, used = time.perf_counter(), time.process_time()
                racing[who].step()
                times[k, who] = time.perf_counter() - begin
                processor[k, who] = time.process_time() - used
            gc.collect()
    dist.all_reduce(times, dist.ReduceOp.MAX)
    dist.all_reduce(processor)
    if dist.get_rank():
        return None
    return {
        "names": [c.name for c in racing],
        "seconds": times.tolist(),
        "processor": processor.tolist(),
        "losses": losses,
    }


def run(file: str) -> None:
    """One rank: the job is read from `file`, and rank 0 answers."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        measured = measure(json.loads(Path(file).read_text()))
        if measured is not None:
            common.answer(measured)
    finally:
        dist.destroy_process_group()
