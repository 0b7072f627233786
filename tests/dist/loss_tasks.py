"""What the ranks run to try losses as training loops use them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from autopar import auto_engine
from tests.clusters import eager_to_shard


@dataclass
class Answer:
    loss: torch.Tensor
    logits: torch.Tensor


torch.utils._pytree.register_dataclass(Answer)


class Net(nn.Module):
    """Returns its loss as callers want it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 8)

    def forward(self, x, y):
        logits = self.down(torch.tanh(self.up(x)))
        if self.form == "squares":
            return F.mse_loss(logits, y)
        loss = F.cross_entropy(logits, y, ignore_index=0)
        forms = {"loss": loss, "tuple": (loss, logits), "dict": {"logits": logits, "loss": loss}}
        return forms[self.form] if self.form in forms else Answer(loss, logits)


def batch(step: int, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    if form == "squares":
        return x, torch.randn(8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 8, (8,), generator=generator)


def loss_of(returned: Any) -> torch.Tensor:
    if isinstance(returned, Answer):
        return returned.loss
    if isinstance(returned, dict):
        return returned["loss"]
    return returned[0] if isinstance(returned, tuple) else returned


def engine_of(
    alone: nn.Module, optimizer: Any, mesh: str, options: dict[str, Any]
) -> tuple[nn.Module, Any]:
    """Data parallel, over all axes."""
    everything = "".join(map(str, range(mesh.count("x") + 1)))
    constraints = {"inputs.x": f"S{everything}R"}
    constraints |= {f"{layer}.weight": "RR" for layer in ("up", "down")}
    constraints |= {f"{layer}.bias": "R" for layer in ("up", "down")}
    return auto_engine(alone, optimizer, eager_to_shard(mesh), constraints=constraints, **options)


def train(mesh: str, form: str, loop: str, options: dict[str, Any]) -> float:
    """Train three steps: how far losses and parameters are from a single device's."""
    torch.manual_seed(0)
    alone = Net(form).double()
    model = copy.deepcopy(alone)
    beside = torch.optim.SGD(alone.parameters(), lr=0.1)
    engine, optimizer = engine_of(model, torch.optim.SGD(model.parameters(), lr=0.1), mesh, options)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    worst, running = 0.0, torch.zeros((), dtype=torch.float64)
    total = 0.0
    for step in range(3):
        x, y = batch(step, form)
        loss, expected = loss_of(engine(x, y)), loss_of(alone(x, y))
        assert type(loss) is torch.Tensor
        if loop == "read first" and dist.get_rank() == 1:  # others do not
            worst = max(worst, abs(loss.item() - expected.item()))
        if loop == "running":
            running += loss.detach()
        if loop == "scaler":
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            (loss / 2 if loop == "accumulated" else loss).backward()
            optimizer.step()
        (expected / 2 if loop == "accumulated" else expected).backward()
        beside.step()
        worst = max(worst, abs(loss.item() - expected.item()))
        total += expected.item()
        optimizer.zero_grad()
        beside.zero_grad()
    if loop == "running":
        worst = max(worst, abs(running.item() - total))
    forgotten = loss_of(engine(x, y))  # by all but one, and no backward
    if dist.get_rank() == 1:
        worst = max(worst, abs(forgotten.item() - loss_of(alone(x, y)).item()))
    with torch.no_grad():
        assert type(loss_of(engine(x, y))) is torch.Tensor
    for p, q in zip(engine.parameters(), alone.parameters(), strict=True):
        worst = max(worst, (p.full_tensor() - q).abs().max().item())
    return worst
