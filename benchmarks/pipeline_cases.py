"""The models of `benchmarks.pipeline`, and how they are cut by hand.

Both are an embedding, equal blocks, a norm and a head, as in the examples of torch's pipelining.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.regret_cases import Block

Batch = dict[str, torch.Tensor]

LENGTH, VOCABULARY = 128, 1024


class Embedding(nn.Module):
    """Of tokens and places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T] to [B, T, width]."""
        return self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))


class LlamaBlock(nn.Module):
    """Rotary attention with grouped heads, and an MLP with gates, wider than usual."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.head = width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, width // 2, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)
        turns = 10000.0 ** -(torch.arange(0, self.head, 2) / self.head)
        angles = torch.outer(torch.arange(LENGTH).float(), turns).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat((-b, a), -1) * self.sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, width] to the same."""
        h = self.norm1(x)
        q, k, v = (
            part(h).view(*h.shape[:2], -1, self.head).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        a = F.scaled_dot_product_attention(self._rotated(q), self._rotated(k), v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class LanguageModel(nn.Module):
    """Returns its loss."""

    def __init__(
        self, embed: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module, head: nn.Module
    ) -> None:
        super().__init__()
        self.embed, self.norm, self.head = embed, norm, head
        self.blocks = nn.ModuleList(blocks)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Both [B, T]."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


@dataclass(frozen=True)
class Case:
    """A model.

    Args:
        name: as printed.
        build: it.
        blocks: how many it has.
    """

    name: str
    build: Callable[[], LanguageModel]
    blocks: int
    samples: int = 16

    def batch(self) -> Batch:
        ids, labels = (torch.randint(0, VOCABULARY, (self.samples, LENGTH)) for _ in range(2))
        return {"ids": ids, "labels": labels}

    def firsts(self, stages: int) -> list[int]:
        """The blocks at which stages begin: as many blocks in each."""
        return [self.blocks * stage // stages for stage in range(stages)]


def _gpt2() -> LanguageModel:
    return LanguageModel(
        Embedding(256),
        [Block(256, 8) for _ in range(8)],
        nn.LayerNorm(256),
        nn.Linear(256, VOCABULARY, bias=False),
    )


def _llama() -> LanguageModel:
    return LanguageModel(
        nn.Embedding(VOCABULARY, 256),
        [LlamaBlock(256, 8, 2048) for _ in range(8)],
        nn.RMSNorm(256, 1e-5),
        nn.Linear(256, VOCABULARY, bias=False),
    )


CASES = (Case("GPT-2", _gpt2, 8), Case("Llama, wide MLP", _llama, 8))


def case(name: str) -> Case:
    """By its name."""
    return next(c for c in CASES if c.name == name)


class Stage(nn.Module):
    """Blocks of a model, with the embedding before the first and the head behind the last."""

    def __init__(self, model: LanguageModel, first: int, end: int) -> None:
        super().__init__()
        blocks = len(model.blocks)
        self.embed = model.embed if first == 0 else None
        self.blocks = model.blocks[first:end]
        self.norm, self.head = (model.norm, model.head) if end == blocks else (None, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Ids or hidden states to hidden states or logits."""
        if self.embed is not None:
            x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x if self.head is None else self.head(self.norm(x))
