"""The ranks of `benchmarks.sequence`: all contestants in the same processes, measured in turn."""

from __future__ import annotations

import gc
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from autopar import ClusterInfo, ShardingPlan, auto_engine
from autopar.testing.live_memory import LiveMemory, training_state_bytes
from benchmarks import common, sequence_by_hand
from benchmarks.sequence_cases import Attend, Batch, Case

WARM_UP = 3
# Of a loss in float32 after two steps of Adam, whose first step takes the sign of every gradient.
AGREE = 2e-3

# By name: which positions a rank has, and its attention.
BY_HAND: Mapping[str, tuple[Callable[[int, int, int], torch.Tensor], Attend]] = {
    "torch's ring": (sequence_by_hand.zigzag, sequence_by_hand.ring("alltoall")),
    "torch's ring, gathered": (sequence_by_hand.zigzag, sequence_by_hand.ring("allgather")),
    "Ulysses by hand": (sequence_by_hand.contiguous, sequence_by_hand.ulysses),
}


@dataclass
class Contestant:
    """A way to train.

    Args:
        name: as printed.
        model: returns the loss of `batch`, on the tokens of this rank or on all.
        optimizer: of its parameters.
        batch: what this rank passes.
        mean: whether the loss is that of this rank's tokens, to be averaged over the ranks.
        buckets_bytes: that are held between steps beside parameters and optimizer.
        predicted_bytes: on the fullest rank.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Batch
    mean: bool
    buckets_bytes: int = 0
    predicted_bytes: float | None = None

    def forward_backward(self) -> torch.Tensor:
        """The loss."""
        loss = self.model(**self.batch)
        loss.backward()
        result: torch.Tensor = loss.detach()
        return result

    def step(self) -> torch.Tensor:
        """One step of training; the loss."""
        loss = self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def global_loss(self) -> float:
        """The loss of all tokens, before a step that it takes."""
        loss = self.step().clone()
        if self.mean:
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        return float(loss)

    def peak_bytes(self) -> int:
        """The most that is alive during a step: what is held between steps, and what it makes."""
        held = sum(training_state_bytes(self.model, self.optimizer).values()) + self.buckets_bytes
        gc.collect()
        with LiveMemory() as live:
            self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return held + live.peak

    def predicted_peak_bytes(self) -> float:
        """The same, by the program that runs on this rank."""
        engine: Any = self.model
        held = sum(training_state_bytes(self.model, self.optimizer).values())
        return float(held + engine.memory_plan.peak_bytes)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """The same for all."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def by_autopar(name: str, of: Case, cluster: ClusterInfo, **options: Any) -> Contestant:
    """A contestant whose strategy is autopar's plan."""
    model: nn.Module = of.build()
    model, optimizer = auto_engine(model, optimizer_of(model), cluster, progress=None, **options)
    return Contestant(name, model, optimizer, of.batch(), mean=False)


def by_hand(name: str, of: Case, recompute: bool = False) -> Contestant:
    """A contestant whose ranks have parts of the sequence. Each has all parameters; gradients are
    averaged while the backward runs on.

    Args:
        recompute: blocks keep their inputs alone.
    """
    part, attend = BY_HAND[name]
    positions = part(of.tokens, dist.get_rank(), dist.get_world_size())
    model = of.build(positions, attend, recompute)
    batch = {k: x[:, positions] for k, x in of.batch().items()}
    # each rank has the rotation of its own positions
    averaged = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    buckets = sum(p.nbytes for p in model.parameters())
    return Contestant(name, averaged, optimizer_of(model), batch, mean=True, buckets_bytes=buckets)


def contestants(of: Case, plans: Mapping[str, tuple[str, str]]) -> Iterator[Contestant]:
    """Every way to train the case on this world, from the same weights.

    Args:
        plans: of autopar, by name: files of the cluster and of the plan.
    """
    for name, (cluster, file) in plans.items():
        plan = ShardingPlan.load(file)
        contestant = by_autopar(name, of, ClusterInfo.load(cluster), plan=plan)
        contestant.predicted_bytes = plan.memory.total_bytes
        yield contestant
    for name in BY_HAND:
        yield by_hand(name, of)


def agreed(losses: Mapping[str, list[float]]) -> None:
    """Raises RuntimeError if contestants train differently."""
    first, reference = next(iter(losses.items()))
    for name, own in losses.items():
        off = max(abs(a / b - 1) for a, b in zip(own, reference, strict=True))
        if not off < AGREE:
            raise RuntimeError(f"{name} has losses {own}, {first} {reference}")


def largest(value: float) -> float:
    """Of all ranks."""
    x = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return float(x)


def measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of the slowest rank per contestant and round, and peaks of the fullest."""
    of = Case(**job["case"])
    rounds = job["rounds"]
    racing = list(contestants(of, job["plans"]))
    losses = {c.name: [c.global_loss() for _ in range(WARM_UP)] for c in racing}
    agreed(losses)
    times, processor = torch.zeros(2, rounds, len(racing)).unbind()
    gc.collect()
    gc.disable()
    for k, order in enumerate(common.turns(len(racing), rounds)):
        for who in order:
            dist.barrier()
            begin, used = time.perf_counter(), time.process_time()
            racing[who].step()
            times[k, who] = time.perf_counter() - begin
            processor[k, who] = time.process_time() - used
        gc.collect()
    gc.enable()
    dist.all_reduce(times, dist.ReduceOp.MAX)
    dist.all_reduce(processor)
    return {
        "names": [c.name for c in racing],
        "seconds": times.tolist(),
        "processor": processor.tolist(),
        "losses": losses,
        "peaks": {c.name: largest(c.peak_bytes()) for c in racing},
        "predicted_bytes": {c.name: c.predicted_bytes for c in racing if c.predicted_bytes},
    }


def run(file: str) -> None:
    """One rank: the job is read from `file`, and rank 0 answers."""
    from benchmarks import sequence_memory

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        job = json.loads(Path(file).read_text())
        measured = {"race": measure, "memory": sequence_memory.measure}[job["kind"]](job)
        if dist.get_rank() == 0:
            common.answer(measured)
    finally:
        dist.destroy_process_group()
