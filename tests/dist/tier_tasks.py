"""What the ranks run: training with states on the host and on a drive, beside a single device."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from autopar import auto_engine
from autopar.cluster.tiers import NVME, Tier
from autopar.runtime import chunks, speculative_step
from autopar.runtime.step_on_shards import StepOnShards
from autopar.schedule import host_step
from autopar.testing.live_memory import LiveMemory
from tests.clusters import eager_to_shard
from tests.models import Classifier, words


def trained(mesh: str, overlaps: bool, directory: str | None, steps: int = 4) -> dict[str, Any]:
    """Train within a memory that is too small for the states: the largest differences to a single
    device, and the peaks.

    Args:
        overlaps: copies and collectives run beside compute; else shards are uneven.
        directory: of a drive; None for the host.
    """
    chunks.CHUNK_BYTES = host_step.CHUNK_BYTES = 20_000
    host_step.BOOKKEEPING_US, host_step.chunk_bytes = 0.0, lambda _: 20_000
    speculative_step.chunk_bytes = host_step.chunk_bytes
    host = Tier(
        "host", 1e15, 1e-9, capacity=None if directory is None else 4.2e5, memory_bandwidth=1e15
    )
    drive = [] if directory is None else [Tier(NVME, 1e15, directory=directory)]
    cluster = replace(eager_to_shard(mesh, overlaps=overlaps), tiers=(host, *drive))

    def built() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = (Classifier(68, 404) if overlaps else Classifier()).double()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)

    memory = 5.5e5 if overlaps else 4.5e5
    model, optimizer = auto_engine(*built(), cluster, memory=memory, microbatches=1)
    alone, beside = built()
    parameters = gradients = 0.0
    for step in range(steps):
        data = words(step)
        live = LiveMemory()
        with live if step else nullcontext():  # the first step compiles
            model(**data).backward()
        alone(**data).backward()
        if step % 2:  # else nothing is read before the step
            for p, q in zip(model.parameters(), alone.parameters(), strict=True):
                gradients = max(gradients, (p.grad.full_tensor() - q.grad).abs().max().item())
        speculative = StepOnShards.of(optimizer)._speculative
        for chunk in speculative._trial.chunks if speculative and speculative._trial else ():
            chunk.future.exception()  # it is stepped
        for each in (optimizer, beside):
            each.step()
            each.zero_grad()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            parameters = max(parameters, (p.full_tensor() - q).abs().max().item())
    with torch.no_grad():
        loss = abs(model(**words(9)) - alone(**words(9))).item()
    moments = max(
        (optimizer.state[p][key].full_tensor() - beside.state[q][key]).abs().max().item()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True)
        for key in ("exp_avg", "exp_avg_sq")
    )
    ahead = [m for m in model.memory_plan.timeline.events if "finish_reload" in m.name]
    return {
        "errors": [parameters, gradients, loss, moments],
        "states_on": model.plan.states_on,
        "layouts": sorted(model.plan.parameters.values()),
        "peak": model.memory_plan.peak_bytes,
        "measured": live.peak,
        "parameters": sum(p.to_local().nbytes for p in model.parameters()),
        "ahead": len(ahead),
        "stored": model.stored_steps,
        "beside": speculative.taken_over if speculative else 0,
    }
