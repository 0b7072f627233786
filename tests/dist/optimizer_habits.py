"""What people's own optimizers do in a step, one habit each, on any parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

Body = Callable[[Any, torch.Tensor, torch.Tensor, dict[str, Any]], None]

HABITS: dict[str, Body] = {}


def habit(body: Body) -> Body:
    HABITS[body.__name__] = body
    return body


class Own(torch.optim.Optimizer):
    """Steps by a habit."""

    def __init__(self, params: Any, name: str, **options: Any) -> None:
        super().__init__(params, {"lr": 0.05, **options})
        self.name = name

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.lr = group["lr"]
            for p in group["params"]:
                if p.grad is not None:
                    HABITS[self.name](self, p, p.grad, self.state[p])
        return loss


@habit
def number_read_before_its_tensor_changes(self, p, g, state):
    norm = g.norm()
    before = norm.item()
    norm.mul_(3)
    after = norm.item()
    p.mul_(1 - 0.01 * before)
    p.sub_(g * norm * 0.01)
    p.add_(g, alpha=0.001 * after)
    norm.zero_()
    p.add_(g, alpha=0.001 * before)


@habit
def numbers_as_text(self, p, g, state):
    length = g.norm().item()
    p.sub_(g, alpha=0.01 * len(f"{length:.3f}") * isinstance(length, float))


@habit
def number_kept_for_the_next_step(self, p, g, state):
    p.add_(g, alpha=-0.1 * state.get("length", 1.0))
    state["length"] = float(g.norm())
    state["lazy"] = min(g.norm().item(), 2.0) / 3
    p.mul_(1 - 0.01 * state["lazy"])


@habit
def writes_through_views(self, p, g, state):
    p.t().mul_(0.9) if p.ndim == 2 else p.mul_(0.9)
    p.view(-1).sub_(g.reshape(-1), alpha=0.1)
    p.unsqueeze(0).add_(0.01)


@habit
def writes_rows(self, p, g, state):
    p[0].add_(g[0], alpha=-0.1)
    p.narrow(0, 1, 2).mul_(0.5)
    p.sub_(g, alpha=0.01)


@habit
def data_of_parameters(self, p, g, state):
    p.data.mul_(0.99)
    p.data.add_(p.grad.data, alpha=-self.lr)
    p.data = p.data - 0.01 * p.grad.data.sign()
    p.data.mul_(0.99)


@habit
def gradients_of_others(self, p, g, state):
    every = [q.grad for group in self.param_groups for q in group["params"]]
    flat = torch.cat([x.flatten() for x in every])
    p.sub_(g / flat.norm() + flat.mean())
    p.add_(0.01 * flat.abs().max())


@habit
def writes_the_gradient(self, p, g, state):
    g.mul_(0.5)
    p.grad = p.grad + 0.1 * p
    p.sub_(p.grad, alpha=0.1)
    p.grad.zero_()


@habit
def state_of_all_kinds(self, p, g, state):
    if not state:
        state["step"] = torch.tensor(0.0)
        state["count"] = 0
        state["history"] = [torch.zeros_like(p)]
        state["rows"] = torch.zeros(p.shape[0], dtype=p.dtype)
        state["same"] = p.grad
        state["half"] = g.float()
        state["mask"] = g > 0
    state["step"] += 1
    state["count"] += 1
    state["history"].append(g.clone())
    state["history"] = state["history"][-2:]
    state["rows"].lerp_(g.flatten(1).norm(dim=1) if g.ndim > 1 else g.abs(), 0.3)
    state["half"].lerp_(g.float(), 0.5)
    scale = 1 / math.sqrt(state["count"]) / (1 + state["step"])
    p.sub_(scale * sum(state["history"]) * state["mask"])
    p.sub_(state["half"], alpha=0.01)
    p.sub_(0.01 * state["rows"].view(-1, *[1] * (p.ndim - 1)))


@habit
def branches_on_values(self, p, g, state):
    if g.norm() > 3:
        p.sub_(g, alpha=0.1)
    if (g.mean() > 0).item() and bool(torch.isfinite(g).all()):
        p.mul_(0.9)
    if math.sqrt(g.norm().item()) > 2 and int(p.sum()) % 2 == 0:
        p.add_(0.1)
    p.mul_(max(0.5, 1 - 0.01 * g.norm().item(), 0.7))


@habit
def masks_and_indices(self, p, g, state):
    p[g > 1] = 0.5
    p.masked_fill_(g < -1, -0.5)
    best = g.flatten().topk(3).values
    p.sub_(best.mean() * 0.1)
    p.sub_(torch.where(p.abs() > g.abs().amax() * 0.9, g, 0.0) * 0.1)
    p.clamp_(g.min(), g.max())
    p.add_(g.std() * 0.01)


@habit
def matrices(self, p, g, state):
    """Shampoo's, with a root by eigenvalues."""
    g2 = g.flatten(1) if g.ndim > 1 else g.view(-1, 1)
    if not state:
        state["left"] = torch.eye(g2.shape[0], dtype=p.dtype) * 1e-3
    state["left"] += g2 @ g2.T
    values, vectors = torch.linalg.eigh(state["left"])
    root = vectors @ (values.clamp(min=1e-6) ** -0.25).diag() @ vectors.T
    update = (root @ g2).view(p.shape)
    p.sub_(update, alpha=self.lr)


@habit
def decompositions(self, p, g, state):
    if p.ndim == 2:
        q, r = torch.linalg.qr(g)
        p.sub_(q @ r.sign().abs() * 0.01)
        u, s, vh = torch.linalg.svd(g, full_matrices=False)
        p.sub_((u * s) @ vh, alpha=0.1)
    else:
        p.sub_(g, alpha=0.1)


@habit
def dtensors_by_name(self, p, g, state):
    """Some optimizers know DTensors."""
    p.mul_(0.9)
    whole = p.full_tensor() if isinstance(p, DTensor) else p
    norm = whole.norm()
    p.sub_(g / norm)
    if isinstance(p, DTensor):
        p.to_local().mul_(0.9)
        p._local_tensor.add_(0.01)
    else:
        p.mul_(0.9).add_(0.01)
    p.sub_(g, alpha=0.01)


@habit
def lists(self, p, g, state):
    ps = [q for group in self.param_groups for q in group["params"] if q.grad is not None]
    gs = [q.grad for q in ps]
    norms = torch._foreach_norm(gs)
    torch._foreach_div_(gs, torch._foreach_add(norms, 1.0))
    torch._foreach_add_(ps, gs, alpha=-0.1)
    torch._foreach_mul_(ps, [0.9 + 0.01 * i for i in range(len(ps))])
    torch._foreach_mul_(ps, torch.tensor(0.99, dtype=ps[0].dtype))
    torch._foreach_addcdiv_(ps, gs, torch._foreach_add(torch._foreach_abs(gs), 1.0), 0.1)
    torch._foreach_clamp_max_(ps, 2.0)


@habit
def broadcasts(self, p, g, state):
    columns = g.pow(2).mean(dim=-1, keepdim=True)
    rows = g.pow(2).mean(dim=0, keepdim=True)
    p.sub_(0.1 * g / (columns * rows / rows.mean(-1, keepdim=True) + 1e-3).sqrt())
    p.sub_(0.01 * g.sum(0))
    p.sub_(0.01 * g.mean())
    p.div_(1 + p.norm(dim=0, keepdim=True, p=1))
    p.add_(torch.linalg.vector_norm(g, float("inf")) * 0.01)


@habit
def dtypes(self, p, g, state):
    half = g.bfloat16()
    p.sub_(half.float().to(p.dtype), alpha=0.1)
    p.add_(half.float().norm().double(), alpha=0.001)
    counts = (g > 0).sum()
    p.mul_(1 - 0.001 * counts / g.numel())
    p.sub_(counts.item() * 1e-4)


@habit
def views_that_outlive_a_number(self, p, g, state):
    flat, part = p.view(-1), p.unsqueeze(0)[:, 1:3]
    turned = p.transpose(0, -1)
    if g.norm() > 0:  # runs what came before
        p.mul_(0.9)
    p.sub_(g * flat.norm() * 0.01)
    if g.sum() < 100:
        flat.mul_(0.9)
        part.add_(0.1)
    turned.sub_(flat.mean() * 0.1)
    state["view"] = p.detach()


@habit
def flat_views_of_results(self, p, g, state):
    """Top-k with error feedback."""
    error = state.setdefault("error", torch.zeros_like(p))
    total = g + error
    flat = total.flatten()
    largest = flat.abs().topk(max(1, flat.numel() // 3)).indices
    sent = torch.zeros_like(flat).scatter(0, largest, flat[largest]).view_as(total)
    error.copy_(total - sent)
    p.sub_(sent, alpha=0.1)


@habit
def inverses_and_solutions(self, p, g, state):
    if p.ndim != 2:
        return
    if "gram" not in state:
        state["gram"] = torch.eye(p.shape[0], dtype=p.dtype)
    state["gram"].lerp_(g @ g.t(), 0.1)
    p.sub_(torch.linalg.inv(state["gram"]) @ g, alpha=0.01)
    p.sub_(torch.linalg.solve(state["gram"], g), alpha=0.01)
