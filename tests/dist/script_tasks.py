"""What the ranks run to try what scripts do around the step."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
import weakref
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from autopar import auto_engine
from autopar.errors import AutoparError
from autopar.ir import deferred_results
from autopar.runtime.deferred_result import DeferredResult
from tests.clusters import eager_to_shard

SHARDED = {"0.weight": "S0R", "2.weight": "RS0"}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).double()


def data(step: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def whole(x: torch.Tensor) -> torch.Tensor:
    x = x.detach()
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def gap(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max((whole(p) - whole(q)).abs().max().item() for p, q in pairs)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def identity(mesh: str) -> dict[str, Any]:
    """Objects from before `auto_engine`, and from before the first batch, go on working."""
    reference = net()
    model = copy.deepcopy(reference)
    before = list(model.parameters())
    watched = weakref.ref(before[0])
    calls = []
    for p in (next(reference.parameters()), before[0]):
        p.register_hook(lambda g: 2 * g)
        p.no_decay = True
    before[0].register_post_accumulate_grad_hook(lambda p: calls.append(tuple(p.shape)))
    engine, _ = auto_engine(model, None, eager_to_shard(mesh), constraints=SHARDED)
    after = list(engine.parameters())
    optimizers = [torch.optim.Adam(reference.parameters()), torch.optim.Adam(before)]
    for step in range(3):
        for module, optimizer, clipped in zip(
            (reference, engine), optimizers, (reference.parameters(), before), strict=True
        ):
            optimizer.zero_grad()
            F.mse_loss(module(data(step, 8, 16)), data(9 + step, 8, 8)).backward()
            nn.utils.clip_grad_norm_(clipped, 0.1)
            optimizer.step()
    return {
        "gap": gap(engine, reference),
        "same objects": all(p is q for p, q in zip(after, engine.parameters(), strict=True)),
        "weak reference": watched() is before[0],
        "attribute": after[0].no_decay,
        "hook calls": calls,
        "class": isinstance(engine, nn.Sequential) and type(engine).__name__ == "Sequential",
        "signature": str(inspect.signature(engine.forward)),
        "indexed": engine[0] is model[0],
    }


def edits_of_gradients(mesh: str) -> dict[str, float]:
    """Parts of a gradient that the script changes."""
    edits: dict[str, Any] = {
        "slice set": lambda g: g.__setitem__(slice(0, 5), 0),
        "slice in place": lambda g: g[:5].zero_(),
        "slice of a slice": lambda g: g[:5][2:].mul_(3),
        "rows by number": lambda g: g.__setitem__(torch.arange(5), 1.5),
        "data": lambda g: g.data.__setitem__(0, 0),
        "whole": lambda g: g.mul_(torch.arange(32.0, dtype=torch.float64).unsqueeze(1)),
        "noise": lambda g: g.add_(torch.ones(32, 16, dtype=torch.float64)),
    }
    gaps = {}
    for name, edit in edits.items():
        reference = net()
        model = copy.deepcopy(reference)
        optimizers = [sgd(reference.parameters()), sgd(model.parameters())]
        engine, _ = auto_engine(model, optimizers[1], eager_to_shard(mesh), constraints=SHARDED)
        for module, optimizer in zip((reference, engine), optimizers, strict=True):
            F.mse_loss(module(data(0, 8, 16)), data(1, 8, 8)).backward()
            edit(module[0].weight.grad)
            optimizer.step()
        gaps[name] = gap(engine, reference)
    return gaps


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(torch.tanh(self.embed(ids)))
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten()), logits


def unread_results(mesh: str) -> dict[str, Any]:
    """Large results beside a loss are gathered when they are read, with their gradient."""
    with mock.patch.object(deferred_results, "MINIMUM_ELEMENTS", 64):
        return _unread_results(mesh)


def _unread_results(mesh: str) -> dict[str, Any]:
    torch.manual_seed(0)
    reference = Logits().double()
    model = copy.deepcopy(reference)
    optimizers = [sgd(reference.parameters()), sgd(model.parameters())]
    engine, _ = auto_engine(
        model, optimizers[1], eager_to_shard(mesh), constraints={"head.weight": "S0R"}
    )
    kinds, differences = [], []
    for step in range(3):
        ids = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(step))
        read = []
        for module, optimizer in zip((reference, engine), optimizers, strict=True):
            optimizer.zero_grad()
            loss, logits = module(ids)
            kinds.append(type(logits) is DeferredResult)
            if step == 1:
                loss = loss + logits.pow(2).mean()
            if step == 2:
                read.append(logits[:, -1].detach())
            loss.backward()
            optimizer.step()
        if read:
            differences.append((read[0] - read[1]).abs().max().item())
    return {"gap": gap(engine, reference), "deferred": kinds[1::2], "read": differences}


def refused(acts: Mapping[str, Callable[[], Any]]) -> dict[str, str]:
    """What each act is refused with."""
    messages = {}
    for name, act in acts.items():
        try:
            act()
            messages[name] = "nothing was refused"
        except AutoparError as error:
            messages[name] = str(error)
    return messages


def refusals(mesh: str) -> dict[str, str]:
    """Messages of what is refused, on every rank."""

    def engine(**options: Any) -> Any:
        return auto_engine(net(), None, eager_to_shard(mesh), **options)[0]

    first = dist.get_rank() == 0

    def lazy() -> None:
        model = nn.Linear(16, 4)
        model.aside = nn.LazyLinear(4)  # which no batch comes to
        auto_engine(model, None, eager_to_shard(mesh))[0](data(0, 8, 16).float())

    def other_batches() -> None:
        engine()(data(dist.get_rank(), 8, 16))

    def trained_optimizer() -> Any:
        model = net()
        optimizer = torch.optim.Adam(model.parameters())
        model, _ = auto_engine(model, optimizer, eager_to_shard(mesh), constraints=SHARDED)
        model(data(0, 8, 16)).sum().backward()
        optimizer.step()
        return optimizer

    def other_shapes() -> None:
        engine()(data(0, 8 if first else 4, 16))

    acts = {
        "lazy": lazy,
        "batches": other_batches,
        "shapes": other_shapes,
        "pickle": lambda: pickle.dumps(engine()),
        "optimizer state": lambda: pickle.dumps(trained_optimizer().state_dict()),
        "shards": lambda: pickle.dumps(engine().state_dict()),
        "half": lambda: engine().half(),
    }
    return refused(acts)


class Fits(nn.Module):
    """Trains itself, as some libraries' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.net(x), y)

    def fit(self, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
        losses = []
        for step in range(steps):
            batch = data(step, 8, 16), data(9 + step, 8, 8)
            with torch.no_grad():
                losses.append(self(*batch).item())
            optimizer.zero_grad()
            self(*batch).backward()
            optimizer.step()
            losses.append(self.net[0].weight.norm().item())
        return losses


def methods_that_train(mesh: str) -> dict[str, Any]:
    """A method of the model calls the model, with and without gradients, and an optimizer."""
    reference = Fits()
    model = copy.deepcopy(reference)
    optimizers = [sgd(reference.parameters()), sgd(model.parameters())]
    constraints = {f"net.{name}": spec for name, spec in SHARDED.items()}
    engine, _ = auto_engine(model, optimizers[1], eager_to_shard(mesh), constraints=constraints)
    expected = reference.fit(optimizers[0], 3)
    losses = engine.fit(optimizers[1], 3)
    pairs = zip(expected, losses, strict=True)
    state = copy.deepcopy(optimizers[1].state_dict())  # an early-stopping loop keeps the best
    optimizers[1].load_state_dict(state)
    optimizers[0].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    reference.fit(optimizers[0], 1)
    engine.fit(optimizers[1], 1)
    return {"losses": max(abs(a - b) for a, b in pairs), "gap": gap(engine, reference)}


def programs(mesh: str) -> dict[str, int]:
    """How many programs a run of calls compiles."""
    engine, _ = auto_engine(net(), None, eager_to_shard(mesh))
    counts = {}

    def count(name: str) -> None:
        engine(data(0, 8, 16))
        counts[name] = len(engine.steps)

    count("first")
    with torch.no_grad():
        count("no_grad")
    with torch.inference_mode():
        count("inference_mode")
    engine[0].requires_grad_(False)
    count("frozen")
    engine[0].requires_grad_(True)
    count("thawed")
    with torch.autocast("cpu", torch.bfloat16):
        count("autocast")
    count("back")
    engine.eval()
    count("eval")
    engine[2] = nn.Linear(32, 4).double()
    count("another head")
    return counts


class Annealed(nn.Module):
    """Its loop changes numbers at each step.

    Args:
        how: the forward uses `beta`.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(16, 8), nn.Linear(8, 16)
        self.how, self.beta, self.step, self.calls = how, 0.0, 0, 0
        self.config = SimpleNamespace(temperature=1.0)

    def forward(self, x: torch.Tensor, weight: float) -> torch.Tensor:
        z = self.encode(x) / self.config.temperature
        self.calls += 1
        if self.step >= 4:
            z = z * 1.5
        beta = {
            "tensor": lambda: self.beta * min(1.0, self.calls / 100),
            "value": lambda: math.exp(self.beta),
            "refused": lambda: json.loads(json.dumps(self.beta)),
        }[self.how]()
        return F.mse_loss(self.decode(z), x) + beta * z.pow(2).mean() + (1 - weight) * z.mean()


def annealed_numbers(mesh: str, batch: str) -> dict[str, Any]:
    """Values equal to one process, and how many programs they take; by the use of a number."""
    answer: dict[str, Any] = {}
    for how in ("tensor", "value", "refused"):
        torch.manual_seed(0)
        reference = Annealed(how).double()
        model = copy.deepcopy(reference)
        optimizers = [sgd(reference.parameters()), sgd(model.parameters())]
        engine, _ = auto_engine(
            model, optimizers[1], eager_to_shard(mesh), batch=batch,
            constraints={"encode.weight": "S0R"} if batch == "global" else None,
        )  # fmt: skip
        losses = []
        for step in range(6 if how == "tensor" else 4):
            x = data(step, 8, 16)
            own = x if batch == "global" else x.chunk(dist.get_world_size())[dist.get_rank()]
            for module, optimizer, mine in zip(
                (reference, engine), optimizers, (x, own), strict=True
            ):
                module.beta, module.step = step / 7, step
                module.config.temperature = 1 + step / 3
                optimizer.zero_grad()
                loss = module(mine, step / 5)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        pairs = zip(losses[::2], losses[1::2], strict=True)
        answer[how] = {
            "gap": gap(engine, reference),
            "losses": max(abs(a - b) for a, b in pairs),
            "programs": len(engine.steps),
            "calls": (model.calls, type(model.calls)) == (reference.calls, int),
            "types": type(model.beta) is float and type(model.config.temperature) is float,
        }
    return answer
