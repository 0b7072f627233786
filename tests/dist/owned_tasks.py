"""What the ranks run on parameters that one pipeline stage owns.

There is no engine here: a model is laid out by hand, gradients are set by hand, and each script of
`SCRIPTS` runs on it and on the same model of one process, in float64. It takes a model and its
optimizer, and may return tensors.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import (
    clip_grad_norm_,
    clip_grad_value_,
    parameters_to_vector,
    vector_to_parameters,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from autopar.cluster.cluster import ClusterInfo
from autopar.comm import dtensor_rules, world
from autopar.comm.stored_layout import StoredLayout
from autopar.runtime.adoption import adopt
from autopar.runtime.distribute import distribute, laid_out_like
from autopar.runtime.optimizer_state import handle_later_optimizers, handle_state_dicts
from autopar.runtime.sharded_values import view, views
from autopar.runtime.step_on_shards import StepOnShards
from autopar.runtime.whole_parameters import whole_parameters
from tests.dist.script_tasks import whole

SHAPES = {
    "first": (8, 6), "bias": (8,), "odd": (5, 4), "token": (1, 1, 6), "last": (4, 8),
    "twin": (8, 6), "scale": (),
}  # fmt: skip


class Net(nn.Module):
    """Matrices, rows that no number of ranks divides, a single row, a vector, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        for i, (name, shape) in enumerate(SHAPES.items()):
            generator = torch.Generator().manual_seed(i)
            values = torch.randn(shape, dtype=torch.float64, generator=generator)
            self.register_parameter(name, nn.Parameter(values))


# Layouts by mesh. The scalar is on all stages.
LAYOUTS = {
    "data=4": {"first": "S0R", "odd": "S0R", "last": "RS0"},
    "pipe=2,data=2": {
        "first": "S1R@0", "bias": "S1@0", "odd": "S1R@1", "token": "RRR@1", "last": "RS1@1",
        "twin": "RR@1", "scale": "",
    },
    "data=2,pipe=2": {
        "first": "S0R@1", "bias": "R@0", "odd": "RS0@0", "token": "RRR@1", "last": "S0R@0",
        "twin": "RS0@1", "scale": "",
    },
    "pipe=4": {
        "first": "RR@0", "bias": "R@1", "odd": "RR@2", "token": "RRR@3", "last": "RR",
        "twin": "RR@3", "scale": "",
    },
    "pipe=2,data=1,tensor=2": {
        "first": "S12R@1", "bias": "S1@1", "odd": "S2R@0", "token": "RRS2@0", "last": "S1S2@0",
        "twin": "S2R@1", "scale": "",
    },
}  # fmt: skip


def prepare(mesh_text: str) -> Any:
    """A mesh over all ranks, with the rules of an engine in force."""
    mesh = world.start(ClusterInfo.of(mesh_text), torch.device("cpu"))
    dtensor_rules.replicate_plain_tensors()
    dtensor_rules.install("cpu")
    dtensor_rules.install_for(views(), view)
    handle_later_optimizers()
    return mesh


def lay_out(model: nn.Module, optimizer: Any, mesh_text: str) -> Any:
    """Lay a model and its optimizer out as `LAYOUTS` says."""
    mesh = prepare(mesh_text)
    layouts = {n: StoredLayout.parse(text) for n, text in LAYOUTS[mesh_text].items()}
    adopt(model, optimizer, mesh)
    coords = tuple(mesh.get_coordinate())
    distribute(model, optimizer, layouts, mesh, coords, torch.device("cpu"))
    if optimizer is not None:
        StepOnShards.attach(optimizer)
        handle_state_dicts(optimizer)
    return mesh


def set_gradients(model: nn.Module, step: int = 0, factor: float = 1.0) -> None:
    for i, p in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * step + i)
        gradient = torch.randn(p.shape, dtype=torch.float64, generator=generator) * factor
        p.grad = laid_out_like(gradient, p)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = whole(a), whole(b)
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    if torch.equal(a, b) or not a.numel():
        return 0.0
    gap = (a.double() - b.double()).nan_to_num(0.0).abs().max().item()
    return gap if torch.equal(a.isnan(), b.isnan()) else float("inf")


class NormScaled(torch.optim.Optimizer):
    """Steps as long as the parameter, as Lamb's and Lars's are, with a moving average."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["average"] = torch.zeros_like(p)
                state["average"].lerp_(p.grad, 0.5)
                length, of_step = p.norm(2.0), state["average"].norm(2.0)
                ratio = torch.where(of_step > 0, length / of_step, torch.ones_like(length))
                p.add_(state["average"] * ratio.clamp(max=2.0), alpha=-group["lr"])


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "norm scaled": lambda p: NormScaled(p, 0.1),
}

SCRIPTS: dict[str, Callable[[Any, Any], Any]] = {}


def script(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    SCRIPTS[function.__name__] = function
    return function


@script
def steps_with_clipped_norms(model: Any, optimizer: Any) -> Any:
    norms = []
    for step, foreach in enumerate((True, False, None)):
        set_gradients(model, step)
        norms.append(clip_grad_norm_(model.parameters(), 1.0, foreach=foreach))
        optimizer.step()
    return norms


@script
def other_norms_and_values(model: Any, optimizer: Any) -> Any:
    set_gradients(model)
    norms = [
        clip_grad_norm_(model.parameters(), 3.0, norm_type=kind, foreach=foreach)
        for kind in (1.0, float("inf"))
        for foreach in (True, False)
    ]
    for foreach in (True, False):
        clip_grad_value_(model.parameters(), 0.1, foreach=foreach)
    optimizer.step()
    return norms


@script
@torch.no_grad()
def values_are_read(model: Any, optimizer: Any) -> Any:
    p, q, odd = model.first, model.twin, model.odd
    found = [p.norm(), (p - q).norm(), p.max(), p.min(), p.mean(), p.std(), p.abs().amax(1)]
    found += [odd.sum(), odd.sum(0), odd.sum(1), odd.mean(0), odd.argmax(), odd.max(0).values]
    found += [p[3], p[:, 2], p[2:5], odd[-1], p[p > 0], p.t() @ q, p.view(-1), (p * 2).view(-1)]
    found += [p.t() * 2, (p.t() + 1).reshape(-1), odd.flatten(), p.unsqueeze(0), model.token[0]]
    found += [p.view(2, 4, 6), p.permute(1, 0), torch.cat([p, q]), torch.stack([p, q]).sum(0)]
    found += [p + q, q * p, torch.where(p > q, p, q), p + p[0], p + model.bias[:, None]]
    found += [p.sort(0).values, p.cumsum(0), torch.isfinite(p).all(), model.token + p[None]]
    found += [torch.from_numpy(p.numpy().copy()), p.to(torch.float32), torch.zeros_like(p)]
    found += [p.new_ones(3), p.clone(), p.bool(), model.scale * p, p / p.norm(dim=1, keepdim=True)]
    found += [model.token.reshape(1, 6) * 2 + p, p - model.token.reshape(6), q.max(1).indices]
    found += [(q * 2).view(-1) + (p * 2).view(-1), (q * 2).view(-1) / (p * 2).view(-1)]
    found += [torch.tensor(torch.equal(p, p.clone())), torch.tensor(torch.equal(p, q))]
    return found


@script
@torch.no_grad()
def values_are_written(model: Any, optimizer: Any) -> None:
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    p, q, odd, token = model.first, model.twin, model.odd, model.token
    p.copy_(random(8, 6))
    p.add_(random(8, 6)).mul_(random(8, 1) > 0).lerp_(random(8, 6), 0.1)
    q.add_(p).lerp_(p, 0.25)
    q.copy_(p * 3)
    odd.data = random(5, 4)
    odd.data.clamp_(-0.5)
    odd[1] = 3.0
    odd[odd > 0.9] = 0.7
    odd.data[2:4].zero_()
    token.mul_(2).add_(random(6)).addcmul_(token, random(1, 1, 6))
    model.bias.masked_fill_(model.bias > 0, 0.5)
    model.last.clamp_(max=0.2).nan_to_num_()
    model.last.index_fill_(0, torch.tensor([1]), 9.0)
    torch.add(p, 1, out=q)
    model.bias.copy_(torch.clamp(model.bias, min=model.bias * 0.5))
    torch._foreach_mul_([p, q, odd, model.scale], 0.5)
    torch._foreach_add_([p, q, model.scale], [q, q, odd.sum()], alpha=0.1)
    torch._foreach_lerp_([p, odd], [random(8, 6), random(5, 4)], 0.3)


@script
def values_are_initialized(model: Any, optimizer: Any) -> None:
    nn.init.zeros_(model.first)
    nn.init.eye_(model.twin)
    nn.init.constant_(model.bias, 2.0)
    nn.init.ones_(model.token)
    nn.init.dirac_(model.token)


@script
def vectors_of_parameters(model: Any, optimizer: Any) -> Any:
    # torch flattens no shards of different lengths, as `odd` has them
    parameters = [p for name, p in model.named_parameters() if name != "odd"]
    vector = parameters_to_vector(parameters)
    vector_to_parameters(vector * 0.5, parameters)
    return [vector.detach()]


@script
def averages(model: Any, optimizer: Any) -> Any:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    kept = [p.detach().clone() for p in model.parameters()]
    for step in range(2):
        set_gradients(model, step)
        optimizer.step()
        average.update_parameters(model)
        with torch.no_grad():
            for k, p in zip(kept, model.parameters(), strict=True):
                k.mul_(0.5).add_(p, alpha=0.5)
    return [*average.module.parameters(), *kept]


@script
def gradients_are_changed(model: Any, optimizer: Any) -> Any:
    set_gradients(model)
    model.first.grad.clamp_(-0.3, 0.3)
    model.twin.grad = torch.full((8, 6), 0.5, dtype=torch.float64)
    model.odd.grad[2] = 0
    for p in model.parameters():
        p.grad.mul_(p.grad.isfinite())
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return [p.grad for p in model.parameters()]


@script
def penalties(model: Any, optimizer: Any) -> Any:
    """Autograd through DTensors."""
    optimizer.zero_grad()
    loss = sum((p**2).sum() for p in model.parameters())
    odd = model.odd.full_tensor() if hasattr(model.odd, "full_tensor") else model.odd
    (odd**3).sum().backward()
    for p in (model.token, model.last, model.first):
        (getattr(p, "to_local", lambda p=p: p)() ** 3).sum().backward()  # of this rank's shard
    (loss + (model.first * model.twin).sum()).backward()
    return [p.grad for p in model.parameters()]


@script
def unscaled(model: Any, optimizer: Any) -> Any:
    results = []
    for bad in (False, True):
        set_gradients(model, factor=8.0)
        if bad:
            model.last.grad.view(-1)[3] = float("nan")
        found = torch.zeros(1)
        gradients = [model.scale.grad, *(p.grad for p in model.parameters() if p.ndim)]
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, torch.full((1,), 0.125))
        results.append(found)
        if not bad:
            optimizer.step()
    return results


@script
@torch.no_grad()
def methods_of_the_model(model: Any, optimizer: Any) -> Any:
    with whole_parameters(model):
        product = model.last @ model.first + model.token[0, 0] + model.scale
        model.odd.mul_(2)
        model.bias[2:4] = 1
    return [product]


@script
def copies(model: Any, optimizer: Any) -> Any:
    twin = copy.deepcopy(model)
    p = copy.deepcopy(model.first)
    with torch.no_grad():
        model.first.zero_()
        twin.odd.mul_(2)
    return [*twin.parameters(), p]


@script
def state_dicts_of_whole_tensors(model: Any, optimizer: Any) -> Any:
    state = {name: torch.full(shape, 0.25).double() for name, shape in SHAPES.items()}
    before = {name: whole(x).clone() for name, x in model.state_dict().items()}
    model.load_state_dict(state)
    after = [whole(x).clone() for x in model.state_dict().values()]
    model.load_state_dict(before)
    return after


CASES = [(name, "adamw") for name in SCRIPTS]
CASES += [("steps_with_clipped_norms", name) for name in OPTIMIZERS if name != "adamw"]


def compare(mesh_text: str) -> dict[str, Any]:
    """By script and optimizer: the largest difference to one process, or what was raised."""
    found: dict[str, Any] = {}
    for name, maker in CASES:
        known, model = Net(), Net()
        expected = OPTIMIZERS[maker](known.parameters())
        optimizer = OPTIMIZERS[maker](model.parameters())
        lay_out(model, optimizer, mesh_text)
        wanted = SCRIPTS[name](known, expected) or []
        try:
            results = SCRIPTS[name](model, optimizer) or []
            gaps = [
                difference(a, b)
                for a, b in zip(
                    [*results, *model.parameters()], [*wanted, *known.parameters()], strict=True
                )
            ]
            found[f"{name}, {maker}"] = max(gaps)
        except Exception:  # on all ranks, or the pool is started again
            found[f"{name}, {maker}"] = traceback.format_exc()
    return found
