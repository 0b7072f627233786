"""Shared by the cases: a model beside the same model behind `wrap`, data, and differences."""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from autopar.errors import AutoparError
from tests.scripts.case import Found, Wrap, rank, world

Model = Any  # an nn.Module whose attributes are the case's own


def sgd(model: Model) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def adamw(model: Model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@dataclass
class Run:
    """A model in training.

    Args:
        model: the user's own, or the engine.
        optimizer: of its parameters.
    """

    model: Model
    optimizer: Any

    def step(self, loss: Callable[[Model], torch.Tensor]) -> None:
        """One step of training."""
        self.optimizer.zero_grad()
        loss(self.model).backward()
        self.optimizer.step()


def pair(
    wrap: Wrap,
    model: nn.Module,
    optimizer: Callable[[Model], torch.optim.Optimizer] = sgd,
    **options: Any,
) -> tuple[Run, Run]:
    """The model by itself, and a copy of it behind `wrap`, each with an optimizer."""
    other = copy.deepcopy(model)
    return Run(model, optimizer(model)), Run(*wrap(other, optimizer(other), **options))


def fit(
    runs: Iterable[Run], loss: Callable[[Model, int], torch.Tensor], steps: int | range = 3
) -> None:
    """Train each for some steps; `loss(model, step)`."""
    for step in range(steps) if isinstance(steps, int) else steps:
        for run in runs:
            run.step(lambda model, step=step: loss(model, step))


def squares(size: int, inputs: int, outputs: int) -> Callable[[Model, int], torch.Tensor]:
    """The mean squared error on random data [size, inputs] -> [size, outputs], by step."""

    def loss(model: Model, step: int) -> torch.Tensor:
        x, y = data(step, size, inputs), data(step + 99, size, outputs)
        return nn.functional.mse_loss(model(x), y)

    return loss


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with GELU between."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def data(seed: int, *shape: int) -> torch.Tensor:
    """Random numbers, the same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int, vocabulary: int, *shape: int) -> torch.Tensor:
    """Random tokens, the same on every rank."""
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def whole(x: Any) -> torch.Tensor:
    """The whole of a tensor, detached; a collective if it is sharded."""
    x = x.detach()
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of two tensors; infinite if their shapes differ."""
    a, b = whole(a), whole(b)
    return (a - b).abs().max().item() if a.shape == b.shape else float("inf")


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree to the precision of their dtype, which is below float64."""
    try:
        torch.testing.assert_close(whole(a), whole(b))
    except AssertionError:
        return False
    return True


def gap(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of their parameters."""
    return max(apart(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def gradient_gap(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of their gradients; infinite if one lacks a gradient of the other."""
    worst = 0.0
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        if (p.grad is None) != (q.grad is None):
            return float("inf")
        if p.grad is not None and q.grad is not None:
            worst = max(worst, apart(p.grad, q.grad))
    return worst


def buffer_gaps(a: nn.Module, b: nn.Module) -> Found:
    """The largest difference of each buffer."""
    theirs = dict(b.named_buffers())
    return {name: apart(x.double(), theirs[name].double()) for name, x in a.named_buffers()}


def programs(model: Any) -> int:
    """The number of programs compiled for a model; 0 for one that runs by itself."""
    return len(getattr(model, "steps", ()))


def from_rank_zero(action: Callable[[], Any]) -> Any:
    """What an action of rank 0 alone returns, or raises if it is a refusal, on every rank."""
    answer: list[Any] = [None]
    if rank() == 0:
        try:
            answer = [action()]
        except AutoparError as error:
            answer = [error]
    if world() > 1:
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], AutoparError):
        raise answer[0]
    return answer[0]


@contextmanager
def common_folder() -> Iterator[str]:
    """A temporary folder of rank 0 that all ranks know; needs the process group."""
    with tempfile.TemporaryDirectory() as mine:
        yield from_rank_zero(lambda: mine)
        wait_for_all()


def wait_for_all() -> None:
    """Until every rank has come here."""
    if world() > 1:
        dist.barrier()


def of_both(runs: tuple[Run, Run], action: Callable[[Model], torch.Tensor]) -> float:
    """The largest difference of what an action returns for either."""
    alone, other = runs
    return apart(action(other.model), action(alone.model))
