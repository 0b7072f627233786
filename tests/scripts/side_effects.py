"""Side effects of the forward happen: losses kept on modules, hooks, statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.scripts.case import Found, Wrap, case
from tests.scripts.helpers import Model, apart, data, fit, gap, of_both, pair, squares


class WithPenalty(nn.Module):
    """Keeps an auxiliary loss as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.aux = nn.Linear(32, 32), torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.lin(x)
        self.aux = h.pow(2).mean()
        return torch.tanh(h)


@case("MoE, VQ and KL layers: Mixture-of-Experts repositories, timm, torchdrug")
def loss_kept_on_module(wrap: Wrap) -> Found:
    """The loop adds the auxiliary losses that the layers keep, and they have gradients."""
    runs = pair(wrap, nn.Sequential(WithPenalty(), WithPenalty(), nn.Linear(32, 4)))

    def loss(q: Model, step: int) -> torch.Tensor:
        task = F.mse_loss(q(data(step, 16, 32)), data(step + 9, 16, 4))
        return task + 5 * (q[0].aux + q[1].aux)

    fit(runs, loss)
    return {
        "parameters": gap(runs[1].model, runs[0].model),
        "kept": of_both(runs, lambda q: q[0].aux),
    }


def relu_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


@case("pytorch#117758, pytorch#173452", when=("before", "after"), may_refuse=True)
def hook_that_keeps(wrap: Wrap, when: str) -> Found:
    """A hook that keeps a layer's activation, set before the first batch or after it, is called at
    each step with that step's values."""
    runs = pair(wrap, relu_net())
    kept: dict[int, torch.Tensor] = {}

    def register() -> None:
        for i, run in enumerate(runs):
            run.model[0].register_forward_hook(
                lambda module, args, result, i=i: kept.__setitem__(i, result)
            )

    if when == "before":
        register()
    for run in runs:
        run.model(data(5, 8, 16))
    if when == "after":
        register()
    found: Found = {}
    for step in range(2):
        kept.clear()
        for run in runs:
            run.model(data(step, 8, 16))
        found[f"called at step {step}"] = 0 in kept and 1 in kept
        if len(kept) == 2:
            found[f"kept at step {step}"] = apart(kept[1], kept[0])
            found[f"with gradient at step {step}"] = kept[1].requires_grad
    return found


@case("LoRA by hooks, activation steering", first=(0, 1))
def hook_that_changes(wrap: Wrap, first: int) -> Found:
    """A hook that returns another value, set before the first batch or after it."""
    runs = pair(wrap, relu_net())
    for step in range(3):
        if step == first:
            for run in runs:
                run.model[0].register_forward_hook(lambda module, args, result: result * 2 + 1)
        fit(runs, squares(8, 16, 4), range(step, step + 1))
    return {"parameters": gap(runs[1].model, runs[0].model)}


class Quantizer(nn.Module):
    """A VQ-VAE whose codebook is a moving average of what was assigned to each code."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = nn.Linear(16, 8), nn.Linear(8, 16)
        self.register_buffer("code", data(1, 12, 8))
        self.register_buffer("size", torch.ones(12))
        self.register_buffer("total", data(1, 12, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.enc(x)
        idx = torch.cdist(z, self.code).argmin(1)
        hot = F.one_hot(idx, 12).to(z.dtype)
        q = self.code[idx]
        if self.training:
            with torch.no_grad():
                self.size.mul_(0.9).add_(hot.sum(0), alpha=0.1)
                self.total.mul_(0.9).add_(hot.T @ z.detach(), alpha=0.1)
                self.code.copy_(self.total / (self.size.unsqueeze(1) + 1e-5))
        commitment = 0.25 * F.mse_loss(z, q.detach())
        return F.mse_loss(self.dec(z + (q - z).detach()), x) + commitment


@case("VQ-VAE")
def codebook_in_buffers(wrap: Wrap) -> Found:
    """Buffers that the forward writes, behind a straight-through estimator."""
    runs = pair(wrap, Quantizer(), lambda q: torch.optim.Adam(q.parameters(), lr=1e-2))
    fit(runs, lambda q, step: q(data(step, 16, 16)), 4)
    return {
        "parameters": gap(runs[1].model, runs[0].model),
        "code": of_both(runs, lambda q: q.code),
        "size": of_both(runs, lambda q: q.size),
    }
