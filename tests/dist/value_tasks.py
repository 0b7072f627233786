"""What the ranks run to try what scripts do with the values of parameters, gradients and state.

Each script of `SCRIPTS` takes a model and its optimizer, and may return tensors; it runs on one
process and on an engine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from autopar import auto_engine
from tests.clusters import eager_to_shard
from tests.dist.script_tasks import SHARDED, data, gap, net, refused, sgd, whole


class Scaled(nn.Sequential):
    """A buffer, a tensor attribute and an argument beside the input; a method that writes."""

    def __init__(self) -> None:
        super().__init__(*net())
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.shift = torch.zeros(8, dtype=torch.float64)

    def forward(self, x: torch.Tensor, more: torch.Tensor | None = None) -> torch.Tensor:
        y = super().forward(x) * self.scale + self.shift
        return y if more is None else y + more

    @torch.no_grad()
    def normalize(self) -> None:
        self[0].weight.div_(self[0].weight.norm(dim=1, keepdim=True))
        self.scale.mul_(0.5)


def loss(model: nn.Module, step: int, *more: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(model(data(step, 8, 16), *more), data(9 + step, 8, 8))


def train(model: nn.Module, optimizer: Any, step: int = 0, *more: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss(model, step, *more).backward()
    optimizer.step()


SCRIPTS: dict[str, Callable[[Any, Any], Any]] = {}


def script(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    SCRIPTS[function.__name__] = function
    return function


@torch.enable_grad()
def another() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A plain model and its optimizer, trained for a step."""
    torch.manual_seed(1)
    model = Scaled()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 5)
    return model, optimizer


@script
def data_of_parameters(model: Any, optimizer: Any) -> None:
    kept = [p.data.clone() for p in model.parameters()]
    train(model, optimizer)
    for p, values in zip(model.parameters(), kept, strict=True):
        p.data = values
    train(model, optimizer)
    vector_to_parameters(parameters_to_vector(model.parameters()) * 0.5, model.parameters())


@script
@torch.no_grad()
def parts_of_parameters(model: Any, optimizer: Any) -> None:
    w = model[0].weight
    with torch.enable_grad():
        train(model, optimizer)
    w[3] = 0
    w[:4].mul_(3)
    w[w.abs() < 0.1] = 1


@script
def views_of_parameters(model: Any, optimizer: Any) -> None:
    train(model, optimizer)
    w = model[0].weight
    w.data.chunk(4)[1].fill_(1.0)
    w.grad.narrow(1, 2, 3).mul_(2)
    with torch.no_grad():
        w.view(-1)[:7] = 2
        w.t()[3].add_(1)
        w.diagonal().zero_()
        for part in w.split(8, dim=1):
            part.mul_(0.5)
        torch.chunk(w, 4)[2].add_(3)
        torch.narrow(w, 1, 0, 2).zero_()
        torch.select(w, 0, 5).fill_(0.25)
        torch.flatten(w)[9:12] = 1
        w.detach()[6].mul_(3)
    torch.split(model[2].weight.grad, 3)[1].zero_()
    optimizer.step()


@script
def objects_from_before(model: Any, optimizer: Any) -> None:
    """`kept` holds the parameters from before `auto_engine`."""
    weight, bias, head, _ = optimizer.kept
    train(model, optimizer)
    weight.data = weight.data * 0.5
    head.data.chunk(4)[1].fill_(1.0)
    with torch.no_grad():
        weight[3] = 0
        head[:2].mul_(3)
        weight.view(-1)[:7].add_(1)
    bias.grad[:4].zero_()
    optimizer.step()
    bias.requires_grad_(False)
    train(model, optimizer, 1)
    bias.requires_grad = True
    train(model, optimizer, 2)


@script
def data_taken_and_given_back(model: Any, optimizer: Any) -> list[torch.Tensor]:
    shadow = [p.data.clone() * 0.5 for p in model.parameters()]
    results = []
    for step in range(2):
        train(model, optimizer, step)
        backup = [p.data for p in model.parameters()]
        for p, values in zip(model.parameters(), shadow, strict=True):
            p.data = values
        results.append(loss(model, step).detach())
        for p, values in zip(model.parameters(), backup, strict=True):
            p.data = values
    return results


@script
@torch.no_grad()
def rows_written_by_index(model: Any, optimizer: Any) -> None:
    with torch.enable_grad():
        train(model, optimizer)
    for x in (model[0].weight, model[0].weight.grad):
        ids, rows = torch.tensor([0, 2]), torch.ones(2, x.shape[1], dtype=x.dtype)
        x.index_copy_(0, ids, rows)
        x.index_add_(1, torch.tensor([1, 1, 3]), torch.ones(x.shape[0], 3, dtype=x.dtype))
        x.scatter_add_(0, torch.tensor([[0] * x.shape[1]]), rows[:1])
    torch.nn.init.eye_(model[2].weight)
    optimizer.step()


@script
def rprop_made_later(model: Any, optimizer: Any) -> None:
    later = torch.optim.Rprop(model.parameters(), lr=0.01)
    for step in range(3):
        train(model, later, step)


@script
def plain_gradients(model: Any, optimizer: Any) -> None:
    for p in model.parameters():
        p.grad = data(1, *p.shape)
    optimizer.step()
    loss(model, 0).backward()
    for p in model.parameters():
        p.grad.data = p.grad.data * 0.5
    optimizer.step()


@script
def state_of_a_later_optimizer(model: Any, optimizer: Any) -> None:
    plain, trained = another()
    train(model, optimizer)
    for stepped in (False, True):
        later = torch.optim.AdamW(model.parameters(), lr=0.01)
        if stepped:
            train(model, later, 2)
        model.load_state_dict(plain.state_dict())
        later.load_state_dict(copy.deepcopy(trained.state_dict()))
        train(model, later, 3)


@script
def views_that_are_kept(model: Any, optimizer: Any) -> None:
    """From before the first batch, and views of views."""
    with torch.no_grad():
        row, some = model[0].weight.data[3], model[2].weight.view(-1)[5:20]
        upper, _ = model[0].weight.data[8:12].chunk(2)
    whole, detached = model[0].bias.data, model[2].bias.detach()
    saved = model.state_dict()["2.weight"]
    for step in range(3):
        train(model, optimizer, step)
        with torch.no_grad():
            row.zero_()
            some *= 0.5
            upper.add_(0.01)
            whole.mul_(0.5)
            detached.add_(0.01)
            saved[5:7] = 0.25


@script
def slices_written_in_other_ways(model: Any, optimizer: Any) -> None:
    train(model, optimizer)
    w = model[0].weight
    w.detach()[2:4].clamp_(-0.01, 0.01)
    torch.mul(w.detach()[2:4], 2, out=w.data[4:6])
    torch._foreach_mul_([w.data[:3], model[2].weight.data.t()[1]], 0.9)
    w.data[w.detach().norm(dim=1).argmin()].copy_(w.data[9])
    model.state_dict()["0.weight"][6:8] = 0
    model.state_dict()["2.weight"][1].fill_(3.0)


@script
def slices_of_state(model: Any, optimizer: Any) -> None:
    train(model, optimizer.beside)
    state = optimizer.beside.state[model[0].weight]
    state["exp_avg"][2:4].zero_()
    state["exp_avg_sq"].t()[1].mul_(2)
    train(model, optimizer.beside, 1)
    state = optimizer.beside.state[model[2].weight]
    state["exp_avg"] = torch.full((8, 32), 0.01, dtype=torch.float64)
    train(model, optimizer.beside, 2)


@script
def loaded_by_assignment(model: Any, optimizer: Any) -> None:
    train(model, optimizer)
    model.load_state_dict(another()[0].state_dict(), assign=True)
    later = sgd(model.parameters())
    for step in range(3):
        train(model, later, step)


@script
def optimizer_from_before(model: Any, optimizer: Any) -> None:
    """`beside` is from before `auto_engine`, which was not given it, and its state is loaded."""
    _, trained = another()
    optimizer.beside.load_state_dict(copy.deepcopy(trained.state_dict()))
    for step in range(2):
        train(model, optimizer.beside, step)


@script
def adafactor(model: Any, optimizer: Any) -> None:
    later = torch.optim.Adafactor(model.parameters())  # asks for numbers of parts
    for step in range(3):
        train(model, later, step)


@script
@torch.no_grad()
def averages_into_plain_tensors(model: Any, optimizer: Any) -> list[torch.Tensor]:
    plain, _ = another()
    averaged = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    running = AveragedModel(plain)
    for step in range(3):
        with torch.enable_grad():
            train(model, optimizer, step)
        averaged.update_parameters(model)
        running.update_parameters(model)
        pairs = list(zip(plain.parameters(), model.parameters(), strict=True))
        for e, p in pairs:
            e.mul_(0.9).add_(p, alpha=0.1)
            e.lerp_(p.detach(), 0.1)
            e.data.addcmul_(p.data, p.grad)
            e[0].copy_(p[0])
            torch.mul(p, 2, out=e) if step == 0 else None
        torch._foreach_mul_([e for e, _ in pairs], [p for _, p in pairs])
        torch._foreach_lerp_([e for e, _ in pairs], [p for _, p in pairs], 0.1)
    found = [*plain.parameters(), *averaged.module.parameters(), *running.module.parameters()]
    plain.load_state_dict(model.state_dict())
    assert all(type(e) is nn.Parameter for e in (*found, *plain.parameters()))
    return [*found, *plain.parameters()]


@script
def penalties_added_in_place(model: Any, optimizer: Any) -> torch.Tensor:
    total, norms = loss(model, 0), torch.zeros(32, dtype=torch.float64)
    for p in model.parameters():
        total += 0.1 * p.pow(2).sum()
    norms += model[0].weight.abs().sum(1)
    (total + norms.pow(2).sum()).backward()
    optimizer.step()
    return total


@script
def pruning(model: Any, optimizer: Any) -> None:
    train(model, optimizer)
    prune.l1_unstructured(model[0], "weight", 0.3)
    train(model, optimizer)
    prune.remove(model[0], "weight")
    prune.ln_structured(model[2], "weight", 0.3, n=2, dim=0)
    train(model, optimizer)


@script
def operators_without_a_rule(model: Any, optimizer: Any) -> list[torch.Tensor]:
    train(model, optimizer)
    w = model[0].weight.detach()
    torch._foreach_copy_([w], [w * 2])
    (loss(model, 1) + torch.linalg.matrix_norm(model[0].weight, "nuc")).backward()
    optimizer.step()
    nn.init.orthogonal_(model[2].weight)  # draws other numbers than one process
    square = model[2].weight.detach() @ model[2].weight.detach().T
    nn.init.zeros_(model[2].weight)
    return [square, torch.linalg.svdvals(w), w.sort(0)[0], w.quantile(0.3), w[w > 0]]


@script
def computed_from_parameters(model: Any, optimizer: Any) -> None:
    train(model, optimizer)
    model.scale = model[0].weight.detach().abs().sum()
    model.shift = model[2].weight.detach().sum(1)
    train(model, optimizer, 1)
    model.scale = model[0].weight.detach().abs().mean()
    train(model, optimizer, 2, model[2].weight.sum(1))


@script
def attribute_through_data(model: Any, optimizer: Any) -> None:
    train(model, optimizer)
    model.shift.data.add_(0.25)
    train(model, optimizer, 1)


@script
def methods_that_write(model: Any, optimizer: Any) -> list[torch.Tensor]:
    train(model, optimizer)
    model.normalize()
    train(model, optimizer, 1)
    return [model.scale]


def compare(mesh: str) -> dict[str, Any]:
    """The largest difference of parameters and of what the script returns, or its error."""
    gaps: dict[str, Any] = {}
    for name, run in SCRIPTS.items():
        torch.manual_seed(0)
        reference = Scaled()
        model = copy.deepcopy(reference)
        optimizers: list[Any] = [sgd(reference.parameters()), sgd(model.parameters())]
        for optimizer, owner in zip(optimizers, (reference, model), strict=True):
            optimizer.kept = list(owner.parameters())
            optimizer.beside = torch.optim.AdamW(owner.parameters(), lr=0.01)
        renames = run is pruning
        constraints = None if renames else SHARDED
        engine, _ = auto_engine(model, optimizers[1], eager_to_shard(mesh), constraints=constraints)
        expected = run(reference, optimizers[0])
        try:
            found = run(engine, optimizers[1])
        except Exception as error:
            gaps[name] = f"{type(error).__name__}: {error}"
            continue
        if torch.is_tensor(expected):
            expected, found = [expected], [found]
        differences = [gap(reference, engine)]
        for x, y in zip(expected or (), found or (), strict=True):
            differences.append((whole(x) - whole(y)).abs().max().item())
        gaps[name] = max(differences)
    return gaps


def averages_of_local_batches(mesh: str) -> dict[str, float]:
    """Plain tensors take whole sources also where each rank has samples of its own."""
    torch.manual_seed(0)
    plain = net()
    averaged = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    engine, _ = auto_engine(
        copy.deepcopy(plain), None, eager_to_shard(mesh), batch="local", constraints=SHARDED
    )
    expected = [p.detach().clone() for p in plain.parameters()]
    optimizer = sgd(engine.parameters())
    for step in range(2):
        optimizer.zero_grad()
        engine(data(dist.get_rank() + 10 * step, 4, 16)).pow(2).mean().backward()
        optimizer.step()
        averaged.update_parameters(engine)
        for k, (e, p) in enumerate(zip(plain.parameters(), engine.parameters(), strict=True)):
            e.data.mul_(0.9).add_(p, alpha=0.1)
            values = whole(p)
            expected[k] = expected[k] * 0.9 + 0.1 * values
    pairs = zip(plain.parameters(), expected, strict=True)
    return {"gap": max((e.detach() - x).abs().max().item() for e, x in pairs)}


def random_values(mesh: str) -> dict[str, bool]:
    """Noise on a sharded gradient: its shards differ, and ranks agree on the whole."""
    engine, _ = auto_engine(net(), None, eager_to_shard(mesh), constraints=SHARDED)
    engine(data(0, 8, 16)).sum().backward()
    grad = engine[0].weight.grad
    noise = whole(torch.randn_like(grad))
    exponential = whole(torch.empty_like(grad).exponential_())
    before = whole(grad).clone()
    grad.add_(torch.randn_like(grad))
    added = whole(grad) - before
    everyone = [torch.empty_like(noise) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, noise)
    return {
        "differs by shard": not torch.equal(noise[:16], noise[16:]),
        "exponential": not torch.equal(exponential[:16], exponential[16:]),
        "anew": not torch.allclose(noise, added),
        "same on ranks": all(torch.equal(x, noise) for x in everyone),
    }


def refusals(mesh: str) -> dict[str, str]:
    """Messages of what is refused, on every rank."""
    engine, _ = auto_engine(net(), None, eager_to_shard(mesh), constraints=SHARDED)
    engine(data(0, 8, 16)).sum().backward()
    w = engine[0].weight.detach()
    acts: dict[str, Callable[[], Any]] = {
        "number of a part": lambda: w.norm().item(),
        "random without a rule": lambda: torch.poisson(w.abs()),
        "data of another shape": lambda: setattr(engine[0].weight, "data", w[:4]),
    }
    return refused(acts)
