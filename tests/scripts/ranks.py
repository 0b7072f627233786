"""Ranks that do not do the same: other batches, a rank that evaluates alone."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.scripts.case import Found, Wrap, case, rank, short_wait, world
from tests.scripts.helpers import Run, data, gap, mlp, pair, sgd, squares, whole


class Weighted(nn.Module):
    """A classifier that takes the weights of its six classes as an input."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.lin(x), y, weight=weight)


@case("DDP with class weights or a mask of positions", samples=(5, 6), may_refuse=True)
def local_coincidence(wrap: Wrap, samples: int) -> Found:
    """With batch="local", an input that is not per sample; with six samples on a rank its first
    size happens to be the batch size."""
    alone = Weighted()
    inner = copy.deepcopy(alone)
    one, other = Run(alone, sgd(alone)), Run(*wrap(inner, sgd(inner), batch="local"))
    weight = torch.tensor([1.0, 2, 3, 4, 5, 6])
    for step in range(2):
        x, y = data(step, samples * world(), 8), torch.arange(samples * world()) % 6
        mine = x.chunk(world())[rank()], y.chunk(world())[rank()], weight
        one.step(lambda q, x=x, y=y: q(x, y, weight))
        other.step(lambda q, mine=mine: q(*mine))
    return {"parameters": gap(other.model, alone)}


@case("a habit from DDP", may_refuse=True, ends_apart=True)
def rank_zero_evaluates(wrap: Wrap) -> Found:
    """Only rank 0 validates: it works, or is told within seconds that others are missing."""
    _, other = pair(wrap, mlp(16, 32, 4), constraints={"0.weight": "S0R"})
    other.step(lambda q: squares(16, 16, 4)(q, 0))
    with short_wait(5.0):
        other.model.eval()
        if rank() == 0:
            with torch.no_grad():
                other.model(data(1, 16, 16))
        other.model.train()
        other.step(lambda q: squares(16, 16, 4)(q, 2))
    return {"it ended": True}


@case("DataLoader(shuffle=True) without a common seed", may_refuse=True)
def shuffled_apart(wrap: Wrap) -> Found:
    """A task that can be learnt exactly is learnt though each rank shuffles by itself; the loss is
    outside of the model."""
    model = nn.Linear(16, 4)
    x, y = data(1, 256, 16), data(1, 256, 16) @ data(2, 16, 4)
    torch.manual_seed(1234 + rank())
    runs = pair(wrap, model, lambda q: torch.optim.SGD(q.parameters(), lr=0.2))
    for _ in range(24):
        for a, b in DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True):
            for run in runs:
                run.step(lambda q, a=a, b=b: F.mse_loss(q(a), b))
    with torch.no_grad():
        engine = runs[1].model
        learnt = F.mse_loss(x @ whole(engine.weight).T + whole(engine.bias), y)
    return {"loss": learnt.item()}
