"""A training whose optimizer steps beside the backward, and one of plain tensors beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from autopar import ClusterInfo, auto_engine
from autopar.cluster.tiers import HOST, Tier
from autopar.comm import world as environment
from autopar.runtime import chunks, speculative_step
from autopar.runtime.second_version import Part
from autopar.runtime.speculative_step import SpeculativeStep
from autopar.runtime.step_on_shards import StepOnShards
from autopar.schedule import host_step

CHUNK_BYTES = 3000
ACCEPTED: list[Part] = []  # by the last step
EVERY = 5  # parameters that are trained


@dataclass
class Training:
    """An engine, and an optimizer on plain tensors that gets the same gradients."""

    engine: nn.Module
    optimizer: torch.optim.Optimizer
    alone: list[torch.Tensor]
    beside: torch.optim.Optimizer
    speculative: SpeculativeStep | None
    number: int = 0

    @staticmethod
    def of(
        kind: type[torch.optim.Optimizer] = torch.optim.AdamW,
        tiers: tuple[Tier, ...] = (Tier(HOST, 1e15, 1e-9),),
        resume: bool = False,
        **options,
    ) -> Training:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 4)
        ).double()
        model[2].bias.requires_grad_(False)
        groups = [
            {"params": [p for p in model.parameters() if p.ndim == n], **more}
            for n, more in ((2, {"weight_decay": 0.1}), (1, {"lr": 3e-3}))
        ]
        values = [[p.detach().clone() for p in group["params"]] for group in groups]
        twins = [{**g, "params": v} for g, v in zip(groups, values, strict=True)]
        fused = {"fused": True} if kind in chunks._FUSED_ON_HOST else {}
        optimizer = kind(groups, lr=1e-2, **options)
        beside = kind(twins, lr=1e-2, **options, **fused)
        tiers = replace(tiers[0], memory_bandwidth=1e13), *tiers[1:]
        cluster = ClusterInfo.of("1")
        device = replace(cluster.device, overlaps=True)
        cluster = replace(cluster, device=device, tiers=tiers)
        engine, optimizer = auto_engine(
            model, optimizer, cluster, memory=40e3, progress=False, microbatches=1, resume=resume
        )
        made = Training(engine, optimizer, [p for v in values for p in v], beside, None)
        engine.plan_for(made.batch())
        made.speculative = StepOnShards.of(optimizer)._speculative
        return made

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def batch(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.number)
        return torch.randn(8, 16, dtype=torch.float64, generator=generator)

    def backward(self) -> None:
        """Gradients of another batch, of both; all chunks are stepped, so that none reads what is
        written to later."""
        self.number += 1
        self.engine(self.batch()).square().mean().backward()
        trial = self.speculative and self.speculative._trial
        for chunk in trial.chunks if trial else ():
            if chunk.future is not None:
                chunk.future.exception()
        for p, q in zip(self.parameters, self.alone, strict=True):
            q.grad = None if p.grad is None else p.grad._local_tensor.clone()

    def both(self, change: Callable[[list[torch.Tensor], torch.optim.Optimizer], None]) -> None:
        change(self.parameters, self.optimizer)
        change(self.alone, self.beside)

    def step(self) -> int:
        """Step both, which are equal then; how many parameters were stepped beside the backward."""
        ACCEPTED.clear()
        for optimizer in (self.optimizer, self.beside):
            optimizer.step()
            optimizer.zero_grad()
        for p, q in zip(self.parameters, self.alone, strict=True):
            assert torch.equal(p._local_tensor, q)
            state = self.optimizer.state.get(p, {})
            for key, value in self.beside.state.get(q, {}).items():
                assert torch.equal(getattr(state[key], "_local_tensor", state[key]), value), key
        return len(ACCEPTED)


@pytest.fixture(scope="module", autouse=True)
def whole_chunks() -> Iterator[None]:
    """In modules that import it, all chunks of a step are beside the backward."""
    with pytest.MonkeyPatch.context() as patch:
        speculate_on_all(patch)
        yield
    environment.stop()


def speculate_on_all(patch: pytest.MonkeyPatch) -> None:
    """Small chunks, and notes of those that are accepted."""
    patch.setattr(chunks, "CHUNK_BYTES", CHUNK_BYTES)
    patch.setattr(speculative_step, "chunk_bytes", lambda _: CHUNK_BYTES)
    patch.setattr(host_step, "chunk_bytes", lambda _: CHUNK_BYTES)
    patch.setattr(host_step, "CHUNK_BYTES", CHUNK_BYTES)
    patch.setattr(host_step, "BOOKKEEPING_US", 0.0)
    patch.setattr(speculative_step, "_TIMED", 0)
    accept = Part.accept

    def noted(part, state):
        ACCEPTED.append(part)
        accept(part, state)

    patch.setattr(Part, "accept", noted)
