"""Programs that broke guards, planning, lowering or the run on ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tests.custom_functions import NoneForTheWeight
from tests.scripts.capture import one_step
from tests.scripts.case import Found, Wrap, case, world
from tests.scripts.helpers import apart, buffer_gaps, close, data, fit, gap, pair, whole
from tests.zoo.assignment import linear_sum_assignment


class Speech(nn.Module):
    """A CTC loss on log-probabilities of a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a, self.dtype = nn.Linear(8, 12), dtype

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        scores = F.log_softmax(self.a(x), -1, dtype=self.dtype).transpose(0, 1)
        return F.ctc_loss(scores, y, torch.full((4,), 9), torch.full((4,), 3))


@case(
    "CTC loss of speech models",
    dtypes=("float32 float32", "float64 float64", "float64 float32", "bfloat16 float32"),
)
def ctc_loss(wrap: Wrap, dtypes: str) -> Found:
    """The dtype of the model and that of the loss; every rank computes the whole batch."""
    of_model, of_loss = (getattr(torch, name) for name in dtypes.split())
    replicated = {"inputs.x": "RRR", "inputs.y": "RR", "a": "RRR"}
    runs = pair(wrap, Speech(of_loss).to(of_model), constraints=replicated)
    x, y = data(0, 4, 9, 8).to(of_model), 1 + torch.arange(12).reshape(4, 3) % 11
    losses = [run.model(x, y) for run in runs]
    for loss in losses:
        loss.backward()
    alone, other = (run.model.a.weight.grad for run in runs)
    if dtypes == "float64 float64":
        return {"loss": apart(*losses), "gradient": apart(other, alone)}
    return {"loss": close(*losses), "gradient": close(other, alone)}


@case("CTC loss of speech models")
def ctc_loss_split(wrap: Wrap) -> Found:
    """The batch is split as the planner likes."""
    return one_step(
        wrap, Speech(torch.float64), data(0, 4, 9, 8), 1 + torch.arange(12).reshape(4, 3) % 11
    )


class Matching(nn.Module):
    """A set loss by Hungarian matching, which runs on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        p = self.a(x)
        loss: Any = 0.0
        for i in range(x.shape[0]):
            cost = torch.cdist(p[i], t[i]).detach().cpu()
            rows, columns = map(torch.as_tensor, linear_sum_assignment(cost))
            loss = loss + (p[i, rows] - t[i, columns]).abs().mean()
        return loss


@case("scipy.optimize.linear_sum_assignment", may_refuse=True)
def hungarian_matching(wrap: Wrap) -> Found:
    """Predictions are matched to targets by a function of the host."""
    return one_step(wrap, Matching(), data(0, 4, 5, 8), data(1, 4, 3, 4))


def numpy_mask(*shape: int) -> np.ndarray:
    return np.random.rand(*shape) < 0.5


class Augmented(nn.Module):
    """Masks results by draws of NumPy."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.tensor(numpy_mask(x.shape[0], x.shape[1]), dtype=torch.bool)
        return self.a(x).masked_fill(mask[..., None], 0.0).square().mean()


@case("SpecAugment by NumPy", may_refuse=True)
def draws_of_numpy(wrap: Wrap) -> Found:
    """Each call draws another mask, the same on all ranks."""
    model = Augmented()
    engine, _ = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x = data(0, 4, 16, 8)
    losses = torch.stack([whole(engine(x)) for _ in range(3)])
    engine(x).backward()
    return {
        "other draws at each call": len(set(losses.tolist())) == 3,
        "alike on all ranks": _spread(losses),
        "a gradient": model.a.weight.grad is not None,
    }


def _spread(x: torch.Tensor) -> float:
    """The largest difference between ranks."""
    if world() == 1:
        return 0.0
    extremes = torch.stack([x, -x])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return extremes.sum(0).max().item()


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Linear(8, 8)
        self.n = nn.InstanceNorm1d(6, affine=True, track_running_stats=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.n(self.e(x)).square().mean()


@case("InstanceNorm with track_running_stats")
def instance_norm_statistics(wrap: Wrap) -> Found:
    """Running statistics are those of the whole batch."""
    runs = pair(wrap, Normalized())
    fit(runs, lambda q, step: q(data(step, 4, 6, 8)), 2)
    alone, engine = (run.model for run in runs)
    return {"parameters": gap(engine, alone)} | buffer_gaps(engine, alone)


@case("BatchNorm(momentum=None), which reads the number of batches")
def guard_on_a_buffer(wrap: Wrap) -> Found:
    """Checking a guard does not run the update that it depends on."""
    runs = pair(wrap, nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None)))
    fit(runs, lambda q, step: q(data(step, 16, 8)).square().mean(), 4)
    alone, engine = (run.model for run in runs)
    return {"parameters": gap(engine, alone)} | buffer_gaps(engine, alone)


class Cached(nn.Module):
    """Concatenates to an empty key cache."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.tensor([]), self.l(x)], -2).square().mean()


@case("torch.tensor([]) as an empty key cache")
def concatenation_with_nothing(wrap: Wrap) -> Found:
    """`torch.cat` with an empty tensor of the shape [0]."""
    return one_step(wrap, Cached(), data(0, 4, 6, 8))


class Durations(nn.Module):
    """Predicts lengths, and masks up to the longest."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = torch.clamp_min(self.l(x).exp().sum(1), 1).long()
        mask = torch.arange(length.max())[None] < length
        return (mask * self.l(x).mean(1)).sum() / mask.sum()


@case("predicted durations", may_refuse=True)
def size_from_activations(wrap: Wrap) -> Found:
    """A size that depends on activations."""
    return one_step(wrap, Durations(), data(0, 4, 6, 8))


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return NoneForTheWeight.apply(torch.tanh(self.a(x)), self.a.weight).square().mean()


@case("custom functions that return None for a gradient", may_refuse=True)
def function_without_a_gradient(wrap: Wrap) -> Found:
    """A custom function's own backward runs."""
    return one_step(wrap, Custom(), data(0, 4, 8))


class Folded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(9, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.fold(self.a(x), (4, 4), 2).square().mean()


@case("fold to one channel", samples=(1, 12))
def fold_one_channel(wrap: Wrap, samples: int) -> Found:
    """`fold` (col2im) of 1 * k * k columns; with one sample only those could be split."""
    runs = pair(wrap, Folded())
    fit(runs, lambda q, step: q(data(1, samples, 4, 9)), 1)
    return {"parameters": gap(runs[1].model, runs[0].model)}
