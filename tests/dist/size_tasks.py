"""Batches whose sizes vary, and dims that hold samples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from autopar import auto_engine
from autopar.ir import deferred_results
from tests.clusters import eager_to_shard
from tests.dist.script_tasks import data, gap, sgd


class Decoder(nn.Module):
    """Causal attention with a table of positions, a window, and targets shifted by one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.positions = nn.Parameter(torch.randn(128, 16) / 4)
        self.project = nn.Linear(16, 48)
        self.length = 0

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        b, n = ids.shape
        x = self.embed(ids) + self.positions[:n]
        q, k, v = self.project(x).view(b, n, 3, 2, 8).permute(2, 0, 3, 1, 4)
        near = torch.ones(n, n, dtype=torch.bool).tril().triu(-min(n, 24))
        scores = (q @ k.transpose(-1, -2)).masked_fill(~near, float("-inf"))
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, 16) + x
        logits = self.head(y)
        return F.cross_entropy(logits[:, :-1].reshape(-1, 32), ids[:, 1:].reshape(-1)), logits


class Translator(nn.Module):
    """Two lengths; padding is masked by a mean over what counts."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        memory, query = self.source(x), self.target(y)
        mixed = (query @ memory.transpose(1, 2)).softmax(-1) @ memory
        counts = (x.mean(-1) > 0).double()
        return (mixed - y).pow(2).mean() + (memory.mean(-1) * counts).sum() / counts.sum()


class Branching(nn.Module):
    """Its Python asks for the length."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.long = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        y = (self.long if n > 20 else self.short)(x)
        halves = y[:, : n // 2].mean() - y[:, n // 2 :].mean()
        return halves.pow(2) / n + F.pad(y, (0, 0, 0, -n % 8)).pow(2).mean()


class Lengths(nn.Module):
    """Returns and keeps what is made of lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.tag = nn.Linear(16, 16), ""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n = x.shape[1]
        self.tag = f"bucket {n // 8}"
        y = self.inner(x)
        return y.pow(2).mean() * round(n / 100, 1), torch.tensor(float(n // 8))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3))).pow(2).mean()


def _ids(step: int, b: int, n: int) -> tuple[torch.Tensor, ...]:
    return (torch.randint(32, (b, n), generator=torch.Generator().manual_seed(step)),)


# The model, the inputs for sizes, the sizes, and how many programs they may take.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], list[Any], int]] = {
    "decoder": (Decoder, _ids, [(8, n) for n in (16, 17, 31, 40, 50, 23, 16, 2)], 4),
    "large logits": (Decoder, _ids, [(8, n) for n in (16, 17, 31, 40, 50, 23)], 6),
    "batches too": (Decoder, _ids, [(8, 16), (4, 20), (8, 24), (12, 28), (4, 40), (8, 44)], 4),
    "two lengths": (
        Translator,
        lambda step, n, m: (data(step, 8, n, 16), data(step + 9, 8, m, 16)),
        [(8, 12), (12, 16), (20, 8), (8, 24), (28, 36), (12, 20)],
        4,
    ),
    "a branch": (
        Branching,
        lambda step, n: (data(step, 8, n, 16),),
        [(n,) for n in (8, 12, 40, 48, 16, 64, 4, 7)],
        8,
    ),
    "lengths in results": (
        Lengths,
        lambda step, n: (data(step, 8, n, 16),),
        [(n,) for n in (16, 17, 20, 30, 40)],
        5,
    ),
    "images": (
        Images,
        lambda step, n, m: (data(step, 8, 4, n, m),),
        [(16, 16), (24, 16), (32, 40), (48, 24), (16, 64)],
        5,
    ),
}


def varying_sizes(mesh: str, batch: str, name: str) -> dict[str, Any]:
    """Gaps to one process over batches of other sizes, and how many programs they take."""
    elements = 64 if name == "large logits" else deferred_results.MINIMUM_ELEMENTS
    with mock.patch.object(deferred_results, "MINIMUM_ELEMENTS", elements):
        return _varying_sizes(mesh, batch, name)


def _varying_sizes(mesh: str, batch: str, name: str) -> dict[str, Any]:
    build, inputs, sizes, bound = MODELS[name]
    torch.manual_seed(0)
    reference = build().double()
    model = copy.deepcopy(reference)
    optimizers = [sgd(reference.parameters()), sgd(model.parameters())]
    engine, _ = auto_engine(model, optimizers[1], eager_to_shard(mesh), batch=batch)
    apart = 0.0
    for step, size in enumerate(sizes):
        given = inputs(step, *size)
        ranks, rank = dist.get_world_size(), dist.get_rank()
        own = given if batch == "global" else [x.chunk(ranks)[rank] for x in given]
        found = []
        for module, optimizer, mine in zip(
            (reference, engine), optimizers, (given, own), strict=True
        ):
            optimizer.zero_grad()
            result = module(*mine)
            loss = result[0] if isinstance(result, tuple) else result
            loss.backward()
            optimizer.step()
            found.append([loss, *(result[1:] if isinstance(result, tuple) else ())])
        expected, values = found
        whole = [x if x.ndim == 0 or batch == "global" else x.chunk(ranks)[rank] for x in expected]
        apart = max(
            [apart, *((a - b).abs().max().item() for a, b in zip(whole, values, strict=True))]
        )
        assert getattr(model, "tag", "") == getattr(reference, "tag", "")
        with torch.no_grad():
            again = engine(*own), reference(*given)
        losses = [r[0] if isinstance(r, tuple) else r for r in again]
        apart = max(apart, (losses[0] - losses[1]).abs().item())
    return {
        "results": apart, "gap": gap(engine, reference), "programs": len(engine.steps),
        "bound": bound,
    }  # fmt: skip


class SequenceFirst(nn.Module):
    """Samples are in dim 1 of the inputs; `weights` are of classes, as many as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> Any:
        h = x.new_zeros(x.shape[1], 8)
        for step in x:
            h = torch.tanh(self.rnn(step) + h)
        logits = self.head(h) * weights
        return F.cross_entropy(logits, y), torch.stack([logits, 2 * logits])


def batch_dims(mesh: str) -> dict[str, Any]:
    """Local batches with samples in other dims than the first."""
    torch.manual_seed(0)
    reference = SequenceFirst().double()
    model = copy.deepcopy(reference)
    optimizers = [sgd(reference.parameters()), sgd(model.parameters())]
    engine, _ = auto_engine(
        model, optimizers[1], eager_to_shard(mesh), batch="local",
        batch_dim={"x": 1, "y": 0, "weights": None},
    )  # fmt: skip
    rank, ranks = dist.get_rank(), dist.get_world_size()
    apart = 0.0
    for step in range(2):
        x, weights = data(step, 5, 4 * ranks, 8), data(step + 9, 4)
        y = torch.randint(4, (4 * ranks,), generator=torch.Generator().manual_seed(step))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss, logits = reference(x, y, weights)
        own, pieces = engine(x.chunk(ranks, 1)[rank], y.chunk(ranks)[rank], weights)
        (loss + logits.pow(2).mean()).backward()
        (own + pieces.pow(2).mean()).backward()
        for optimizer in optimizers:
            optimizer.step()
        apart = max(apart, (logits.chunk(ranks, 1)[rank] - pieces).abs().max().item())
    messages = {}
    for wrong in ({"z": 0}, {"y": 2}):
        other, _ = auto_engine(
            SequenceFirst().double(), None, eager_to_shard(mesh), batch="local", batch_dim=wrong
        )
        try:
            other(x, y, weights)
        except Exception as error:
            messages[str(wrong)] = f"{type(error).__name__}: {error}"
    return {"gap": gap(engine, reference), "results": apart, "messages": messages}
