"""Parameters keep their identity: lists, optimizers and groups made before or after."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from tests.scripts.case import Found, Wrap, case
from tests.scripts.helpers import (
    Run,
    adamw,
    apart,
    data,
    fit,
    gap,
    mlp,
    of_both,
    pair,
    sgd,
    squares,
    tokens,
    whole,
)  # fmt: skip


@case("torchtune#2420, and any fine-tuning script")
def clipping_a_kept_list(wrap: Wrap) -> Found:
    """`clip_grad_norm_` over a list of parameters made before the loop clips their gradients."""
    model = mlp(64, 128, 8)
    lists: list[list[nn.Parameter]] = [list(model.parameters())]

    def optimizer(q: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(q.parameters(), lr=0.5)

    other = copy.deepcopy(model)
    lists.append([p for p in other.parameters() if p.requires_grad])
    runs = Run(model, optimizer(model)), Run(*wrap(other, optimizer(other)))
    found: Found = {}
    for step in range(3):
        norms = []
        for run, kept in zip(runs, lists, strict=True):
            run.optimizer.zero_grad()
            F.mse_loss(run.model(data(step, 16, 64)), 50 * data(step + 9, 16, 8)).backward()
            norms.append(whole(nn.utils.clip_grad_norm_(kept, 0.1)))
            run.optimizer.step()
        found[f"norm at step {step}"] = apart(*norms)
    return found | {"parameters": gap(runs[1].model, runs[0].model)}


@case("the order that FSDP teaches: wrap the model, then make the optimizer")
def optimizer_made_after(wrap: Wrap) -> Found:
    """An optimizer made from the engine's parameters trains them."""
    alone = mlp(16, 32, 4)
    engine, _ = wrap(copy.deepcopy(alone), None)
    runs = Run(alone, adamw(alone)), Run(engine, adamw(engine))
    fit(runs, squares(16, 16, 4))
    return {"parameters": gap(engine, alone)}


@case("a second stage: longer sequences, another mesh or budget", again=("engine", "model"))
def engine_twice(wrap: Wrap, again: str) -> Found:
    """`auto_engine` on what was trained before, the engine or the model, goes on."""
    alone = mlp(16, 32, 4)
    inner = copy.deepcopy(alone)
    one, other = Run(alone, adamw(alone)), Run(*wrap(inner, adamw(inner)))
    fit((one, other), squares(16, 16, 4), 2)
    other = Run(*wrap(other.model if again == "engine" else inner, other.optimizer))
    fit((one, other), squares(16, 16, 4), range(2, 4))
    return {"parameters": gap(other.model, alone)}


@case("transfer learning", first=(0, 2))
def head_replaced(wrap: Wrap, first: int) -> Found:
    """A layer replaced on the engine, before the first batch and after, and its parameters added to
    the optimizer, train."""
    runs = pair(wrap, mlp(16, 32, 4))
    head = nn.Linear(32, 4)
    for step in range(4):
        for run in runs:
            if step == first:
                setattr(run.model, "2", copy.deepcopy(head))
                added = getattr(run.model, "2").parameters()
                run.optimizer.add_param_group({"params": added, "lr": 0.05})
            run.step(lambda q, step=step: squares(16, 16, 4)(q, step))
    return {"parameters": gap(runs[1].model, runs[0].model)}


@case("gradual unfreezing")
def parameter_group_added(wrap: Wrap) -> Found:
    """The optimizer gets the backbone, frozen until then, at the third step."""

    def of_the_head(q: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(q[2].parameters(), lr=1e-2)

    model = mlp(16, 32, 4)
    model[0].requires_grad_(False)
    runs = pair(wrap, model, of_the_head)
    for step in range(5):
        for run in runs:
            if step == 2:
                run.model[0].requires_grad_(True)
                added = list(run.model[0].parameters())
                run.optimizer.add_param_group({"params": added, "lr": 1e-3})
            run.step(lambda q, step=step: squares(16, 16, 4)(q, step))
    return {"parameters": gap(runs[1].model, runs[0].model)}


class Tied(nn.Module):
    """A head tied to the embedding, and a block used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.block = nn.Embedding(64, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.emb(ids)
        for _ in range(3):
            h = h + torch.tanh(self.block(h))
        return self.head(h)


@case("torchtitan#1524, lingua#84")
def tied_weights(wrap: Wrap) -> Found:
    """Tied weights train as one, and are still one tensor."""
    runs = pair(wrap, Tied(), adamw)

    def loss(q: nn.Module, step: int) -> torch.Tensor:
        ids = tokens(step, 64, 8, 12)
        return F.cross_entropy(q(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    fit(runs, loss)
    model = runs[1].model
    return {
        "parameters": gap(model, runs[0].model),
        "one tensor": model.head.weight is model.emb.weight,
    }


@case("pytorch#82070", when=("before", "after"))
def average_by_deepcopy(wrap: Wrap, when: str) -> Found:
    """A moving average on a deep copy of the engine, made before training starts or after the first
    step; the copy can be evaluated."""
    runs = pair(wrap, mlp(32, 64, 8))
    averages = []
    for run in runs:
        average = copy.deepcopy(run.model) if when == "before" else None
        for step in range(3):
            run.step(lambda q, step=step: squares(16, 32, 8)(q, step))
            average = copy.deepcopy(run.model) if average is None else average
            with torch.no_grad():
                for mean, now in zip(average.parameters(), run.model.parameters(), strict=True):
                    mean.mul_(0.9).add_(now, alpha=0.1)
        averages.append(average)
    alone, other = averages
    with torch.no_grad():
        evaluated = apart(other(data(3, 4, 32)), alone(data(3, 4, 32)))
    return {"average": gap(other, alone), "evaluated": evaluated}


@case("torch.optim.swa_utils")
def stochastic_weight_averaging(wrap: Wrap) -> Found:
    """`AveragedModel` over the engine, then `update_bn`."""
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 8))
    runs = pair(wrap, model, sgd)
    averages = []
    for run in runs:
        run.step(lambda q: squares(16, 32, 8)(q, 5))
        average = AveragedModel(run.model)
        for step in range(3):
            run.step(lambda q, step=step: squares(16, 32, 8)(q, step))
            average.update_parameters(run.model)
        update_bn([data(step, 16, 32) for step in range(3)], average)
        averages.append(Run(average, None))
    alone, other = averages
    return {
        "averaged": gap(other.model, alone.model),
        "running_mean": of_both((alone, other), lambda q: q.module[1].running_mean),
    }
