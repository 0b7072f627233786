"""The models of `benchmarks.regret`, and how an expert would split each by tensor parallelism.

Every model returns its loss, and is written so that `parallelize_module` can split it: query, key
and value apart, heads by `view(..., -1, head_dim)`, group norm in the place of batch norm (whose
statistics data parallelism would take over other samples).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.nn import functional as F

Batch = dict[str, torch.Tensor]
Styles = dict[str, ParallelStyle]


@dataclass(frozen=True)
class Case:
    """A model and what trains it.

    Args:
        name: as printed.
        build: the model; its forward takes the batch as keywords and returns the mean loss.
        batch: a global batch, whose samples are dim 0 of every tensor.
        tensor: the tensor-parallel plan, per submodule.
        blocks: names of the submodules that FSDP gathers one at a time.
        split_loss: the logits arrive split over the vocabulary (`loss_parallel`).
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    tensor: Callable[[], Styles]
    blocks: tuple[str, ...]
    split_loss: bool = False


class MLP(nn.Module):
    """Linear layers with GELU between; mean squared error."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [B, first width], y [B, last width]."""
        for i, layer in enumerate(self.layers):
            x = layer(F.gelu(x) if i else x)
        return F.mse_loss(x, y)


class Block(nn.Module):
    """A transformer's block, causal."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head = width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, width] to the same."""
        h = self.norm1(x)
        q, k, v = (
            part(h).view(*h.shape[:2], -1, self.head).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A language model."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Both [B, T]."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


class Convolutions(nn.Module):
    """Residual blocks of two convolutions; every stage halves the image. Then linear layers."""

    def __init__(self, channels: tuple[int, ...], *head: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels[0], 3, padding=1)
        self.stages = nn.ModuleList(map(Stage, channels[:-1], channels[1:]))
        self.layers = nn.ModuleList(map(nn.Linear, head[:-1], head[1:]))

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] and [B]."""
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        pooled = F.adaptive_avg_pool2d(x, 1) if x.shape[1] == self.layers[0].in_features else x
        x = pooled.flatten(1)
        for i, layer in enumerate(self.layers):
            x = layer(F.relu(x) if i else x)
        return F.cross_entropy(x, labels)


class Stage(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(into, out, 3, padding=1, stride=2)
        self.second = nn.Conv2d(out, out, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(8, out), nn.GroupNorm(8, out)
        self.short = nn.Conv2d(into, out, 1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, into, H, W] to [B, out, H/2, W/2]."""
        h = F.relu(self.norm1(self.first(x)))
        return F.relu(self.norm2(self.second(h)) + self.short(x))


class Recommender(nn.Module):
    """One large table for all categorical features, and an MLP over what is looked up."""

    def __init__(self, rows: int, width: int, features: int, *hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, width)
        widths = (features * width, *hidden, 1)
        self.layers = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))

    def forward(self, ids: torch.Tensor, clicks: torch.Tensor) -> torch.Tensor:
        """ids [B, features], clicks [B, 1]."""
        x = self.embed(ids).flatten(1)
        for i, layer in enumerate(self.layers):
            x = layer(F.relu(x) if i else x)
        return F.binary_cross_entropy_with_logits(x, clicks)


# -- tensor parallelism ---------------------------------------------------------------------------


def _layers_in_pairs(count: int) -> Styles:
    """Column then row, as Megatron does; one that is left over stays whole."""
    styles: Styles = {}
    for i in range(0, count - 1, 2):
        styles |= {f"layers.{i}": ColwiseParallel(), f"layers.{i + 1}": RowwiseParallel()}
    return styles


def _transformer(layers: int) -> Styles:
    styles: Styles = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    for i in range(layers):
        styles |= {f"blocks.{i}.{part}": ColwiseParallel() for part in ("q", "k", "v", "up")}
        styles |= {f"blocks.{i}.{part}": RowwiseParallel() for part in ("o", "down")}
    return styles


def _blocks(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}.{i}" for i in range(count))


def _pairs(samples: int, into: int, out: int) -> Callable[[], Batch]:
    return lambda: {"x": torch.randn(samples, into), "y": torch.randn(samples, out)}


def _texts(samples: int, length: int, vocabulary: int) -> Callable[[], Batch]:
    def make() -> Batch:
        ids, labels = (torch.randint(0, vocabulary, (samples, length)) for _ in range(2))
        return {"ids": ids, "labels": labels}

    return make


def _images(samples: int, side: int, classes: int) -> Callable[[], Batch]:
    return lambda: {
        "images": torch.randn(samples, 3, side, side),
        "labels": torch.randint(0, classes, (samples,)),
    }


def _clicks(samples: int, features: int, rows: int) -> Callable[[], Batch]:
    return lambda: {
        "ids": torch.randint(0, rows, (samples, features)),
        "clicks": torch.randint(0, 2, (samples, 1)).float(),
    }


CASES = (
    Case(
        "small batch, wide layers",
        lambda: MLP(1024, 4096, 1024, 4096, 1024),
        _pairs(16, 1024, 1024),
        lambda: _layers_in_pairs(4),
        _blocks("layers", 4),
    ),
    Case(
        "large batch, small weights",
        lambda: MLP(128, 256, 256, 256, 128),
        _pairs(8192, 128, 128),
        lambda: _layers_in_pairs(4),
        (),
    ),
    Case(
        "long sequence",
        lambda: Transformer(2, 128, 4, 512),
        _texts(4, 1024, 512),
        lambda: _transformer(2),
        _blocks("blocks", 2),
        split_loss=True,
    ),
    Case(
        "large vocabulary",
        lambda: Transformer(2, 128, 4, 32000),
        _texts(4, 64, 32000),
        lambda: _transformer(2),
        ("embed", *_blocks("blocks", 2), "head"),
        split_loss=True,
    ),
    Case(
        "convolutional",
        lambda: Convolutions((16, 32, 64, 128), 128, 100),
        _images(32, 64, 100),
        lambda: {"layers.0": ColwiseParallel(output_layouts=Replicate())},
        _blocks("stages", 3),
    ),
    Case(
        "embedding-heavy",
        lambda: Recommender(200_000, 32, 16, 256, 64),
        _clicks(1024, 16, 200_000),
        lambda: {
            "embed": RowwiseParallel(input_layouts=Replicate()),
            "layers.0": ColwiseParallel(),
            "layers.1": RowwiseParallel(),
        },
        ("embed",),
    ),
    Case(
        "tall-skinny MLP",
        lambda: MLP(16384, 64, 16384),
        _pairs(256, 16384, 16384),
        lambda: _layers_in_pairs(2),
        _blocks("layers", 2),
    ),
    Case(
        "mixed blocks",
        lambda: Convolutions((16, 32, 64), 64 * 12 * 12, 1024, 1024, 100),
        _images(32, 48, 100),
        lambda: _layers_in_pairs(2),
        (*_blocks("stages", 2), *_blocks("layers", 3)),
    ),
)


def case(name: str) -> Case:
    """By its name."""
    return next(c for c in CASES if c.name == name)


def contestant_arguments(batch: Batch, part: int, parts: int) -> dict[str, Any]:
    """The samples of one data-parallel rank, of equal number on all."""
    return {key: value.chunk(parts)[part] for key, value in batch.items()}
