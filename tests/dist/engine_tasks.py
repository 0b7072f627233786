"""What the ranks run to try the engine as users do; every function returns plain data."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from autopar import ShardingPlan, auto_engine
from autopar.errors import AutoparError
from tests.clusters import eager_to_shard
from tests.models import CASES, MLP, LanguageModel


def batch(step: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 12, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 8, (size,), generator=generator)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return MLP().double()


def difference(engine: nn.Module, alone: nn.Module) -> float:
    pairs = zip(engine.parameters(), alone.parameters(), strict=True)
    return max((p.full_tensor() - q).abs().max().item() for p, q in pairs)


def train(mesh: str, kind: str, how: str = "global") -> float:
    """Train four steps in one of the ways people do; the difference from a single device."""
    alone = mlp()
    model = copy.deepcopy(alone)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    beside = torch.optim.AdamW(alone.parameters(), lr=1e-2, eps=1e-3)
    if kind == "resumed":  # both optimizers carry state from before
        for m, o in ((model, optimizer), (alone, beside)):
            x, y = batch(99)
            m(x, y).backward()
            o.step()
            o.zero_grad()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    wanted = {"up.weight": "S1R", "inputs.x": "RS0", "down": "S1R"} if kind == "constrained" else {}
    model, optimizer = auto_engine(
        model, optimizer, eager_to_shard(mesh), batch=how, constraints=wanted
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    other = torch.optim.lr_scheduler.StepLR(beside, 2, 0.5)
    repeats = 2 if kind == "accumulated" else 1
    for step in range(4):
        for part in range(repeats):
            # the last step has a batch of another shape
            x, y = batch(10 * step + part, 16 if kind == "reshaped" and step == 3 else 8)
            mine = (x.chunk(world)[rank], y.chunk(world)[rank]) if how == "local" else (x, y)
            outside = kind == "outside"
            loss = F.cross_entropy(model(mine[0]), mine[1]) if outside else model(*mine)
            (loss / repeats).backward()
            (alone(x, y) / repeats).backward()
        for m, o, s in ((model, optimizer, scheduler), (alone, beside, other)):
            if kind == "clipped":
                torch.nn.utils.clip_grad_norm_(m.parameters(), 0.05)
            o.step()
            s.step()
            o.zero_grad()
        if kind == "evaluated":
            model.eval()
            with torch.no_grad():
                gap = (model(mine[0]) - alone(mine[0])).abs().max().item()
            assert gap < 1e-9, gap
            model.train()
    assert all(isinstance(v, DTensor) for v in model.state_dict().values())
    if wanted:
        assert model.plan.constraints == wanted
        assert model.get_parameter("up.weight").placements == (Replicate(), Shard(0))
    assert list(model.state_dict()) == list(alone.state_dict())
    return difference(model, alone)


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x):
        return F.dropout(x * self.scale, 0.5, self.training)


def dropout(mesh: str) -> dict[str, Any]:
    """Two draws of a dropped-out ones matrix, and its gradient."""
    model = Dropped()
    model, _ = auto_engine(model, None, eager_to_shard(mesh))
    first, second = model(torch.ones(64, 64)), model(torch.ones(64, 64))
    second.sum().backward()
    assert isinstance(model.scale.grad, DTensor)
    model.eval()
    with torch.no_grad():
        same = model(torch.ones(64, 64))
    return {
        "first": first.detach().numpy(),
        "second": second.detach().numpy(),
        "grad": model.scale.grad.full_tensor().numpy(),
        "eval": same.numpy(),
        "choices": dict(model.plan.choices),
    }


def language_model_dropout(mesh: str) -> list[float]:
    """Losses of GPT-2 with dropout everywhere; the ranks must agree on them."""
    torch.manual_seed(0)
    model = LanguageModel(layers=1, dropout=0.2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = auto_engine(model, optimizer, eager_to_shard(mesh))
    ids = torch.randint(0, 101, (8, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def refused(kind: str, plan: str | None = None) -> dict[str, Any]:
    """Bad input: the message, and whether the model and optimizer stayed as they were."""
    model = mlp()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters())
    mesh, options = "2x2", {}
    if kind == "optimizer":
        optimizer = torch.optim.AdamW(mlp().parameters())
    elif kind == "mesh":
        mesh = "2x4"
    elif kind == "budget":
        options["memory"] = "4KiB"
    elif kind in ("plan", "plan mesh"):
        assert plan is not None
        options["plan"] = ShardingPlan.from_json(plan)
    before = [(n, id(p), p.detach().clone()) for n, p in model.named_parameters()]
    groups = [id(p) for g in optimizer.param_groups for p in g["params"]]
    message = ""
    try:
        engine, _ = auto_engine(model, optimizer, eager_to_shard(mesh), **options)
        rank = torch.distributed.get_rank()
        size = 8 + rank if kind == "local sizes" else 8
        engine(*batch(0, size))
    except AutoparError as error:
        message = f"{type(error).__name__}: {error}"
    after = [(n, id(p), p.detach().clone()) for n, p in model.named_parameters()]
    same = all(a[:2] == b[:2] and a[2].equal(b[2]) for a, b in zip(before, after, strict=True))
    same = same and groups == [id(p) for g in optimizer.param_groups for p in g["params"]]
    return {"message": message, "untouched": same}


def local_sizes() -> str:
    """Local batches of different sizes on different ranks."""
    model, _ = auto_engine(mlp(), None, eager_to_shard("4"), batch="local")
    try:
        model(*batch(0, 2 + torch.distributed.get_rank() % 2))
    except AutoparError as error:
        return str(error)
    return ""


class Branching(nn.Module):
    """Branches on labels, picks the rows that count, and reverses a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 16)
        self.head = nn.Linear(16, 8)

    def forward(self, x, y):
        h = torch.tanh(self.up(x))
        if y.max() > 6:  # another head for batches with rare classes
            h = Halved.apply(h)
        logits = self.head(h)
        chosen = y > 1
        return F.cross_entropy(logits[chosen], y[chosen])


class Halved(torch.autograd.Function):
    """Identity with half of the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


def branches(mesh: str, how: str) -> dict[str, Any]:
    """Train on batches that take different branches; difference from one device, captures."""
    torch.manual_seed(0)
    alone = Branching().double()
    model = copy.deepcopy(alone)
    engine, _ = auto_engine(model, None, eager_to_shard(mesh), batch=how)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    worst, seen = 0.0, []
    for step in (0, 1, 2, 0, 1):
        x, y = batch(step)
        y = torch.arange(8) if step == 1 else y.clamp(max=6 - step)
        mine = (x.chunk(world)[rank], y.chunk(world)[rank]) if how == "local" else (x, y)
        engine.zero_grad()
        alone.zero_grad()
        loss, expected = engine(*mine), alone(x, y)
        loss.backward()
        expected.backward()
        worst = max(worst, abs(loss.item() - expected.item()))
        for p, q in zip(engine.parameters(), alone.parameters(), strict=True):
            worst = max(worst, (p.grad.full_tensor() - q.grad).abs().max().item())
        seen.append(len(engine.steps))
    return {"error": worst, "captures": seen}


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x):
        return x * self.weight + torch.randn_like(x) + torch.rand(16)


def draws(mesh: str) -> list[Any]:
    """Two results of a model that draws, on ranks whose own generators differ."""
    torch.manual_seed(7)
    engine, _ = auto_engine(Noisy(), None, eager_to_shard(mesh))
    torch.manual_seed(torch.distributed.get_rank())
    before = torch.get_rng_state()
    results = [engine(torch.zeros(8, 16)).detach().numpy() for _ in range(2)]
    assert torch.get_rng_state().equal(before)
    return results


def precision_error(mesh: str, autocast: bool) -> float:
    """How far one step in bfloat16 is from a single device's, relative to the largest value of each
    gradient."""
    case, dtype = CASES["mlp"], torch.float32 if autocast else torch.bfloat16

    def step(build: Any) -> tuple[nn.Module, torch.Tensor]:
        model = build(case.build().to(dtype))
        batch = {k: x.to(dtype) if x.is_floating_point() else x for k, x in case.batch(0).items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch)
        loss.backward()
        return model, loss.detach()

    alone, expected = step(lambda model: model)
    engine, loss = step(lambda model: auto_engine(model, None, eager_to_shard(mesh))[0])
    worst = abs(loss.item() - expected.item()) / abs(expected.item())
    for p, q in zip(engine.parameters(), alone.parameters(), strict=True):
        assert p.grad.dtype is q.grad.dtype is dtype
        error = (p.grad.full_tensor() - q.grad).abs().max() / q.grad.abs().max()
        worst = max(worst, error.item())
    return worst


def copied_on_rank_zero() -> float:
    """Rank 0 keeps a copy for itself, and later all ranks copy and compare the copy's results."""
    x, y = batch(0)
    engine, _ = auto_engine(mlp(), None, eager_to_shard("2x2"), example_inputs=(x, y))
    if torch.distributed.get_rank() == 0:
        kept = copy.deepcopy(engine)
        with torch.no_grad():
            for mine, p in zip(kept.parameters(), engine.parameters(), strict=True):
                mine.lerp_(p, 0.1)
    twin = copy.deepcopy(engine)
    return abs(twin(x, y).item() - engine(x, y).item())


def resumed_from_asynchronous_save(folder: str) -> float:
    """Largest difference of losses after a state that was saved while training went on."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return auto_engine(model, optimizer, eager_to_shard("2x2"), example_inputs=batch(0))

    def step(engine: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
        loss = engine(*batch(number))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def state(engine: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return dict(zip(("model", "optimizer"), get_state_dict(engine, optimizer), strict=True))

    beside = torch.distributed.new_group(backend="gloo")
    engine, optimizer = made()
    for number in range(3):
        step(engine, optimizer, number)
    saving = dcp.async_save(state(engine, optimizer), checkpoint_id=folder, process_group=beside)
    expected = [step(engine, optimizer, number) for number in range(3, 6)]
    saving.result()
    again, beside_it = made()
    loaded = state(again, beside_it)
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(
        again, beside_it, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
    )
    losses = [step(again, beside_it, number) for number in range(3, 6)]
    return max(abs(a - b) for a, b in zip(expected, losses, strict=True))


def one_rank_dies() -> None:
    rank = torch.distributed.get_rank()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, optimizer = auto_engine(model, optimizer, eager_to_shard("2"))
    for step in range(3):
        if step == 1 and rank == 1:
            os._exit(7)
        engine(*batch(step)).backward()
        optimizer.step()
