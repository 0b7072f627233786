"""The ranks of `benchmarks.pipeline`: all contestants in the same processes, measured in turn."""

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
from torch.distributed.pipelining import PipelineStage, schedules
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from autopar import ClusterInfo, auto_engine
from benchmarks import common
from benchmarks.pipeline_cases import Batch, Case, Stage, case
from benchmarks.slow_network import SlowLink, network, sleep_until

WARM_UP = 3
# Of a loss in float32 after two steps of Adam, whose first step takes the sign of every gradient.
AGREE = 2e-3

# By autopar's name: torch's class, and how many stages a rank has.
TORCH = {
    "gpipe": (schedules.ScheduleGPipe, 1),
    "1f1b": (schedules.Schedule1F1B, 1),
    "interleaved": (schedules.ScheduleInterleaved1F1B, 2),
    "zbv": (schedules.ScheduleZBVZeroBubble, 2),
}


@dataclass
class Contestant:
    """A way to train.

    Args:
        name: as printed.
        forward_backward: of the global batch; returns the loss, which may be that of one rank.
        optimizer: of the parameters on this rank.
        loss: on all ranks, from what forward_backward returns.
        engine: of autopar.
    """

    name: str
    forward_backward: Callable[[], Any]
    optimizer: torch.optim.Optimizer
    loss: Callable[[Any], float]
    engine: Any = None

    def step(self) -> Any:
        """One step of training."""
        loss = self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def _optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def _autopar(
    name: str, of: Case, batch: Batch, cluster: ClusterInfo, **options: Any
) -> Contestant:  # fmt: skip
    model = _built(of)
    engine, optimizer = auto_engine(
        model, _optimizer(model.parameters()), cluster, progress=None, **options
    )

    def forward_backward() -> torch.Tensor:
        loss = engine(**batch)
        loss.backward()
        return loss.detach()

    return Contestant(name, forward_backward, optimizer, float, engine)


def _built(of: Case) -> Any:
    torch.manual_seed(0)
    return of.build()


def _by_hand(name: str, of: Case, batch: Batch, schedule: str, microbatches: int) -> Contestant:
    """Torch's pipeline of `Stage`s.

    The loss has the share of a microbatch, which saves a pass over the gradients behind the
    schedule (`scale_grads`). Outputs are not kept.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    kind, per_rank = TORCH[schedule]
    count = ranks * per_rank
    own = [rank, count - 1 - rank] if schedule == "zbv" else [*range(rank, count, ranks)]
    firsts = [*of.firsts(count), of.blocks]
    model = _built(of)
    stages = [
        PipelineStage(Stage(model, firsts[s], firsts[s + 1]), s, count, torch.device("cpu"))
        for s in own
    ]

    def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) / microbatches

    runs: Any = kind(
        stages[0] if per_rank == 1 else stages, microbatches, loss_fn=loss_of, scale_grads=False
    )
    inputs = [batch["ids"]] if 0 in own else []
    last = count - 1 in own

    def forward_backward() -> Any:
        losses: list[torch.Tensor] = []
        runs.step(
            *inputs, target=batch["labels"] if last else None,
            losses=losses if last else None, return_outputs=False,
        )  # fmt: skip
        return losses

    def loss(losses: list[torch.Tensor]) -> float:
        total = torch.stack(losses).sum() if losses else torch.zeros(())
        dist.all_reduce(total)
        return float(total)

    modules = nn.ModuleList(stage.submod for stage in stages)
    return Contestant(name, forward_backward, _optimizer(modules.parameters()), loss)


def _data_parallel(name: str, of: Case, batch: Batch, link: SlowLink | None) -> Contestant:
    """DistributedDataParallel, whose buckets are summed while the backward runs on."""
    model = DistributedDataParallel(_built(of), gradient_as_bucket_view=True)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = {k: x.chunk(ranks)[rank] for k, x in batch.items()}

    def summed(bucket: Any) -> Any:
        assert link is not None
        gradients = bucket.buffer().div_(ranks)
        due = link.send(2 * (ranks - 1) / ranks * gradients.nbytes)
        future = dist.all_reduce(gradients, async_op=True).get_future()

        def arrived(done: Any) -> torch.Tensor:
            sleep_until(due)
            result: torch.Tensor = done.value()[0]
            return result

        return future.then(arrived)

    if link is not None:
        model.register_comm_hook(None, lambda _, bucket: summed(bucket))

    def forward_backward() -> torch.Tensor:
        loss = model(**mine)
        loss.backward()
        return loss.detach()

    def mean(loss: torch.Tensor) -> float:
        total = loss.clone()
        dist.all_reduce(total)
        return float(total) / ranks

    return Contestant(name, forward_backward, _optimizer(model.parameters()), mean)


def contestants(job: Mapping[str, Any], of: Case, batch: Batch, link: Any) -> Iterator[Contestant]:
    """Every way to train the case on this world, from the same weights."""
    stages = ClusterInfo.load(job["clusters"]["stages"])
    count = job["microbatches"]
    for schedule in job["schedules"]:
        per_rank = TORCH[schedule][1]
        firsts = of.firsts(dist.get_world_size() * per_rank)
        cuts = ",".join(f"blocks.{k}" for k in firsts[1:])
        yield _autopar(
            f"{schedule}, autopar", of, batch, stages,
            microbatches=count, schedule=schedule, stages=cuts,
        )  # fmt: skip
        yield _by_hand(f"{schedule}, torch", of, batch, schedule, count)
    yield _autopar("as autopar chooses", of, batch, stages)
    if link is not None:
        flat = ClusterInfo.load(job["clusters"]["flat"])
        yield _autopar("autopar, no pipeline", of, batch, flat)
        yield _data_parallel("DDP", of, batch, link)


def _agreed(losses: Mapping[str, list[float]]) -> None:
    """Raises RuntimeError if contestants train differently."""
    first, reference = next(iter(losses.items()))
    for name, own in losses.items():
        off = max(abs(a / b - 1) for a, b in zip(own, reference, strict=True))
        if not off < AGREE:
            raise RuntimeError(f"{name} has losses {own}, {first} {reference}")


def measure(job: Mapping[str, Any]) -> dict[str, Any] | None:
    """Seconds of the slowest rank, per contestant and round; on rank 0."""
    of = case(job["case"])
    torch.manual_seed(1)
    batch = of.batch()
    rounds = job["rounds"]
    with network(job["bytes_per_s"]) as link:
        racing = list(contestants(job, of, batch, link))
        losses = {c.name: [c.loss(c.step()) for _ in range(WARM_UP)] for c in racing}
        _agreed(losses)
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
    if dist.get_rank():
        return None
    return {
        "names": [c.name for c in racing],
        "seconds": times.tolist(),
        "processor": processor.tolist(),
        "losses": losses,
        "plans": {c.name: _described(c.engine.plan) for c in racing if c.engine is not None},
    }


def _described(plan: Any) -> dict[str, Any]:
    pipeline = plan.pipeline
    words = f"{plan.microbatches} microbatches"
    if pipeline is not None:
        firsts = ", ".join(stage.first for stage in pipeline.stages[1:])
        words += f", {pipeline.schedule.splitlines()[0]}, stages at {firsts}"
    else:
        words += "; " + "; ".join(f"{m.name or 'model'} {m.words}" for m in plan.modules if m.words)
    return {"seconds": 1e-6 * plan.time.step_us, "words": words}


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
