"""What the ranks run on pipelines; every function returns plain data."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from autopar import auto_engine
from autopar.comm.owned_shards import Owned
from autopar.errors import AutoparError, InfeasibleError
from autopar.runtime.deferred_result import DeferredResult
from tests.clusters import eager_to_shard
from tests.models import OPTIMIZERS
from tests.pipelines import MODELS, gap, gradients_gap, loss_of, state_gap, train_beside, vectors

_AUTO = {"progress": False}


def train(
    name: str,
    mesh: str,
    microbatches: int,
    schedule: str,
    options: Mapping[str, Any] | None = None,
    how: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a model beside one device: the largest differences, the stages and the layouts.

    Args:
        options: of `auto_engine`.
        how: of `train_beside`.
    """
    engines: list[Any] = []

    def distribute(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        given = {**_AUTO, "microbatches": microbatches, "schedule": schedule, **(options or {})}
        made = auto_engine(model, optimizer, eager_to_shard(mesh), **given)
        engines.append(made[0])
        return made

    differences = train_beside(name, distribute, **{"steps": 3, **(how or {})})
    (engine,) = engines
    owners = {
        n: next((p.owner for p in x.placements if isinstance(p, Owned)), None)
        for n, x in engine.named_parameters()
    }
    split = [
        n
        for n, x in engine.named_parameters()
        if any(p.is_shard() and not isinstance(p, Owned) for p in x.placements)
    ]
    return {
        "differences": differences,
        "stages": 1 + len(engine.plan.pipeline.firsts),
        "owners": owners,
        "split": split,
        "steps": len(engine._autopar_runner.steps),
    }


def _pair(name: str, mesh: str, optimizer: str | None = None, **options: Any) -> Any:
    """An engine, and the same model alone; with optimizers if one is named."""
    alone = MODELS[name].build()
    model = copy.deepcopy(alone)
    made = [
        None if optimizer is None else OPTIMIZERS[optimizer](m.parameters())
        for m in (model, alone)
    ]  # fmt: skip
    given = {**_AUTO, "microbatches": 3, **options}
    engine, trained = auto_engine(model, made[0], eager_to_shard(mesh), **given)
    return engine, alone, trained, made[1]


LOSSES = {
    "loss": lambda o: o[0],
    "late alone": lambda o: o[1].logsumexp(-1).mean() * 2,
    "early alone": lambda o: o[2].square().mean(),
    "all": lambda o: o[0] + o[1].square().mean() + o[2][:, :5].sum(),
}


def late_results(mesh: str) -> dict[str, float]:
    """Logits of the last and of the first stage that are gathered when they are read."""
    engine, alone, *_ = _pair("logits", mesh)
    batch, found = MODELS["logits"].batch(0), {}
    for name, loss in LOSSES.items():
        engine.zero_grad()
        alone.zero_grad()
        mine, theirs = engine(**batch), alone(**batch)
        assert [isinstance(x, DeferredResult) for x in mine] == [False, True, True]
        loss(mine).backward()
        loss(theirs).backward()
        found[name] = max(gradients_gap(engine, alone), gap(mine, theirs))
    with torch.no_grad():
        found["evaluated"] = gap(engine(**batch), alone(**batch))
    return found


class Masks(nn.Module):
    """What two stages drop of ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.ones(64)) for _ in range(2))

    def forward(self, x):
        a = F.dropout(x * self.first, 0.5)
        b = F.dropout(x * self.second, 0.5)
        return a, b, (a * b).sum()


def dropout(mesh: str, schedule: str) -> dict[str, Any]:
    """Masks of two stages, and the gradients of one of them."""
    torch.manual_seed(0)
    engine, _ = auto_engine(
        Masks(), None, eager_to_shard(mesh), microbatches=4, schedule=schedule, **_AUTO
    )
    x = torch.ones(8, 64)
    engine(x)[2].backward()  # afterwards, slices run backward at once
    engine.zero_grad()
    a, b, product = engine(x)
    product.backward()
    found = {"a": a.detach(), "b": b.detach()}
    for name, p in engine.named_parameters():
        found[f"{name} at once"] = p.grad.full_tensor()
    engine.zero_grad()
    a, b, product = engine(x)
    (product + 0 * a.sum()).backward()  # slices run again
    found |= {"again a": a.detach(), "again b": b.detach()}
    for name, p in engine.named_parameters():
        found[f"{name} again"] = p.grad.full_tensor()
    return {name: value.numpy() for name, value in found.items()}


def losses_and_loops() -> dict[str, float]:
    """Several losses, loss scaling, accumulation, `retain_graph`, hooks and copies."""
    engine, alone, *_ = _pair("crossings", "pipe=2,data=2", schedule="zb-h1")
    batch, found = MODELS["crossings"].batch(0), {}
    seen: list[list[float]] = [[], []]
    for model, values in zip((engine, alone), seen, strict=True):
        model.third.weight.register_hook(
            lambda g, values=values: values.append(
                (g.full_tensor() if isinstance(g, DTensor) else g).sum().item()
            )
        )
    for name, factors in {
        "both": (1.0, 0.3), "one": (1.0, 0.0), "scaled": (65536.0, 0.0), "penalty": (0.0, 1.0),
    }.items():  # fmt: skip
        for model in (engine, alone):
            model.zero_grad()
            result = model(**batch)
            (result["loss"] * factors[0] + result["penalty"] * factors[1]).backward()
        found[name] = gradients_gap(engine, alone) / max(factors)
    for model in (engine, alone):
        model.zero_grad()
        for step in range(2):
            result = model(**MODELS["crossings"].batch(step))
            result["loss"].backward(retain_graph=True)
            result["loss"].backward(retain_graph=True)
            (result["hidden"].square().mean() / 2).backward()
    found["accumulated"] = gradients_gap(engine, alone)
    found["hooks"] = max(abs(a - b) / 65536 for a, b in zip(*seen, strict=True))
    twin = copy.deepcopy(engine)
    for model in (twin, alone):
        model.zero_grad()
        model(**batch)["loss"].backward()
    found["copy"] = max(gradients_gap(twin, alone), state_gap(twin, alone))
    return found


def resumed(folder: str, saved: str, loaded: str) -> dict[str, float]:
    """Train, save, load on another mesh and train on; differences from training on one device."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def step(model: nn.Module, optimizer: Any, number: int) -> float:
        loss = loss_of(model(**MODELS["tied"].batch(number)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
        return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))

    first, alone, optimizer, beside = _pair("tied", saved, "adamw")
    worst = max(abs(step(first, optimizer, k) - step(alone, beside, k)) for k in range(2))
    dcp.save(state(first, optimizer), checkpoint_id=folder)
    full = first.full_state_dict(rank0_only=False)
    found = {"before": worst, "full": gap(full, dict(alone.state_dict()))}

    torch.manual_seed(9)
    again = MODELS["tied"].make().double()
    restored = OPTIMIZERS["adamw"](again.parameters())
    example = MODELS["tied"].batch(0)
    given = {"microbatches": 3, "example_inputs": example, **_AUTO}
    again, restored = auto_engine(again, restored, eager_to_shard(loaded), **given)
    entries = state(again, restored)
    dcp.load(entries, checkpoint_id=folder)
    set_state_dict(
        again, restored, model_state_dict=entries["model"],
        optim_state_dict=entries["optimizer"],
    )  # fmt: skip
    found["loaded"] = state_gap(again, alone)
    found["after"] = max(abs(step(again, restored, k) - step(alone, beside, k)) for k in (2, 3))
    found["state"] = state_gap(again, alone)
    whole = MODELS["tied"].build(5)
    other, _ = auto_engine(whole, None, eager_to_shard(saved), **given)
    other.load_full_state_dict(again.full_state_dict(rank0_only=False))
    found["full state on stages"] = state_gap(other, alone)
    return found


def refusals() -> dict[str, str]:
    """What each rank is told."""

    def message(name: str, mesh: str = "pipe=2,data=2", batch: Any = None, **options: Any) -> str:
        try:
            engine, *_ = _pair(name, mesh, **options)
            loss_of(engine(**(MODELS[name].batch(0) if batch is None else batch))).backward()
        except AutoparError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    rank = dist.get_rank()
    batch = vectors(0)
    batch["x"] = batch["x"] + (rank == 2)
    return {
        "mixes": message("normed"),
        "buffer": message(
            "counted mean",
            mesh="pipe=4",
            microbatch="independent",
            schedule="1f1b",
            stages="layers.1,layers.2,layers.3",
        ),
        "schedule": message("frozen", schedule="zb"),
        "evaluates": message("frozen", schedule="forward-only"),
        "operators": message("frozen", stages="linear_9"),
        "local": _local_batches(),
        "differ": message("frozen", batch=batch),
    }


def within_named_memory(name: str, mesh: str, microbatches: int, schedule: str) -> dict[str, Any]:
    """Train within the memory that a refusal names: how many refusals, the largest difference."""
    memory: float | str = "1kB"
    for refusals in range(4):
        try:
            found = train(name, mesh, microbatches, schedule, {"memory": memory}, {"steps": 2})
        except InfeasibleError as refused:
            memory = refused.smallest_bytes
        else:
            return {"refusals": refusals, "difference": max(found["differences"].values())}
    return {"refusals": 4, "difference": math.nan}


def _local_batches() -> str:
    model, _ = auto_engine(
        MODELS["frozen"].build(), None, eager_to_shard("pipe=2,data=2"), microbatches=2,
        batch="local", **_AUTO,
    )  # fmt: skip
    try:
        model(**vectors(0))
    except AutoparError as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Fails(nn.Module):
    """Its forward raises an error on one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        if dist.get_rank() == 3:
            raise RuntimeError("no way here")
        return self.layers[1](self.layers[0](x)).sum()


def fails_on_one_rank() -> str:
    """What each rank is told if one cannot capture the model."""
    engine, _ = auto_engine(
        Fails().double(), None, eager_to_shard("pipe=2,data=2"), microbatches=2, **_AUTO
    )
    try:
        engine(vectors(0)["x"])
    except AutoparError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def one_rank_dies() -> None:
    model, _ = auto_engine(MODELS["frozen"].build(), None, "pipe=2", microbatches=4, progress=False)
    for step in range(3):
        if step == 1 and dist.get_rank() == 1:
            os._exit(7)
        model(**vectors(step)).backward()
