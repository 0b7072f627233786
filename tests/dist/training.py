"""What the ranks run: train through `auto_engine` and beside it on a single device, and compare."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from autopar import ColoTracer, ShardingPlan, auto_engine
from autopar.ir.spec import ShardingSpec
from autopar.runtime.distribute import shard_of
from tests.clusters import eager_to_shard
from tests.models import CASES, OPTIMIZERS, reference


def _shard_error(sharded: DTensor, whole: torch.Tensor) -> float:
    """Largest difference between this rank's shard and the same part of the whole tensor."""
    mesh = sharded.device_mesh
    spec = ShardingSpec.from_placements(sharded.placements, whole.ndim)
    coords = tuple(mesh.get_coordinate())
    expected = shard_of(whole.detach(), spec, tuple(mesh.shape), coords)
    local = sharded.to_local().detach()
    assert local.shape == expected.shape
    return (local - expected).abs().max().item()


def largest_error(
    name: str, mesh: str, optimizer: str, plan: str | None, lower: bool, steps: int = 3
) -> float:
    """Largest absolute difference from single-device training: loss, gradients, parameters and
    buffers, over `steps` steps."""
    case = CASES[name]
    losses, grads, parameters, buffers = reference(name, optimizer, steps)
    model = case.build()
    opt = OPTIMIZERS[optimizer](list(model.parameters()))
    loaded = ShardingPlan.from_json(plan) if plan else None
    model, opt = auto_engine(model, opt, eager_to_shard(mesh), plan=loaded, lower=lower)
    worst = 0.0
    for step in range(steps):
        loss = model(**case.batch(step))
        opt.zero_grad()
        loss.backward()
        worst = max(worst, abs(loss.item() - losses[step]))
        for n, p in model.named_parameters():
            worst = max(worst, _shard_error(p.grad, grads[step][n]))
        opt.step()
    for n, p in model.named_parameters():
        worst = max(worst, _shard_error(p, parameters[n]))
    for n, b in model.named_buffers():
        if n in buffers:
            worst = max(worst, (b - buffers[n]).abs().max().item())
    return worst


def errors_of_plans(
    name: str, mesh: str, plans: list[tuple[str, str]], lower: bool = False
) -> list[float]:
    """`largest_error` for several (plan, optimizer)."""
    return [largest_error(name, mesh, optimizer, plan, lower) for plan, optimizer in plans]


def family_error(name: str, mesh: str) -> tuple[float, float]:
    """Largest error of one step of a family of the zoo, relative to max(1, |reference|), and what
    is allowed: float32's rounding for models that compute in it whatever their type."""
    from tests.zoo import check, hf, timm_rows

    family = next(f for f in (*hf.FAMILIES, *timm_rows.FAMILIES) if f.name == name)
    alone, model = family.build(), family.build()
    batch = family.batch(model, 0)
    expected = check.step(alone, alone, batch)
    graph = ColoTracer().trace(model, (), batch)
    single = any(
        isinstance(v := node.meta.get("val"), torch.Tensor) and v.dtype is torch.float32
        for node in graph.nodes
    )
    engine, _ = auto_engine(model, None, eager_to_shard(mesh), time_limit=2.0)
    loss = check.loss_of(engine(**batch))
    loss.backward()
    worst = check.error(loss.detach(), expected.loss)
    for n, p in engine.named_parameters():
        whole = expected.gradients[n]
        if p.grad is not None and whole is not None:
            worst = max(worst, _shard_error(p.grad, whole) / max(1.0, whole.abs().max().item()))
    return worst, 1e-6 if single else 1e-9
