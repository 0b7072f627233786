"""The models of `benchmarks.sequence`: Llama's blocks, whose attention the caller may exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Batch = dict[str, torch.Tensor]
# Queries [B, H, T, D], keys and values [B, K, T, D], H a multiple of K, to [B, H, T, D].
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

VOCABULARY = 1024


def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention on one device."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def rotation(positions: torch.Tensor, width: int) -> torch.Tensor:
    """Cosines and sines of rotary embeddings, [2, T, width]."""
    turns = 10000.0 ** -(torch.arange(0, width, 2) / width)
    angles = torch.outer(positions.float(), turns).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()])


class Block(nn.Module):
    """Rotary attention, where heads may share keys, and an MLP with gates (SwiGLU)."""

    def __init__(self, of: Case, attend: Attend) -> None:
        super().__init__()
        width, self.head = of.width, of.width // of.heads
        self.attend = attend
        self.norm1, self.norm2 = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, of.keys * self.head, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, of.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(of.inner, width, bias=False)

    def _rotated(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * turns[0] + torch.cat((-b, a), -1) * turns[1]

    def forward(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """[B, T, width] to the same; turns [2, T, head]."""
        h = self.norm1(x)
        q, k, v = (
            part(h).view(*h.shape[:2], -1, self.head).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        a = self.attend(self._rotated(q, turns), self._rotated(k, turns), v)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """A language model that returns its loss.

    Args:
        positions: of the tokens it is called with.
        recompute: blocks keep their inputs alone.
    """

    turns: torch.Tensor

    def __init__(
        self, of: Case, positions: torch.Tensor, attend: Attend, recompute: bool
    ) -> None:  # fmt: skip
        super().__init__()
        self.recompute = recompute
        self.embed = nn.Embedding(VOCABULARY, of.width)
        self.blocks = nn.ModuleList(Block(of, attend) for _ in range(of.layers))
        self.norm = nn.RMSNorm(of.width, 1e-5)
        self.head = nn.Linear(of.width, VOCABULARY, bias=False)
        self.register_buffer("turns", rotation(positions, of.width // of.heads), persistent=False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Both [B, T]."""
        x = self.embed(ids)
        for block in self.blocks:
            if self.recompute:
                x = checkpoint(block, x, self.turns, use_reentrant=False)
            else:
                x = block(x, self.turns)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


@dataclass(frozen=True)
class Case:
    """A model and the length of its sequence; the batch is one sequence.

    Args:
        tokens: length of the sequence.
        width: of hidden states.
        heads: of queries.
        keys: heads of keys and values, a divisor of heads.
        layers: blocks.
    """

    tokens: int
    width: int
    heads: int
    keys: int
    layers: int

    @property
    def name(self) -> str:
        shared = "" if self.keys == self.heads else f", {self.keys} for keys"
        return f"{self.tokens // 1024}k tokens, {self.heads} heads{shared}"

    @property
    def grouped(self) -> bool:
        """Whether heads share keys."""
        return self.keys != self.heads

    @property
    def inner(self) -> int:
        """Width of the MLP."""
        return 2 * self.width

    def build(
        self, positions: torch.Tensor | None = None, attend: Attend = whole, recompute: bool = False
    ) -> Llama:
        """The model with the same weights at every call; of all positions if None."""
        torch.manual_seed(0)
        if positions is None:
            positions = torch.arange(self.tokens)
        return Llama(self, positions, attend, recompute)

    def batch(self) -> Batch:
        """The same at every call."""
        generator = torch.Generator().manual_seed(1)
        ids, labels = (
            torch.randint(0, VOCABULARY, (1, self.tokens), generator=generator) for _ in range(2)
        )
        return {"ids": ids, "labels": labels}


# Wide where sequences are short, so that steps take 0.2 to 3 s on two cores.
CASES = (
    Case(2048, 256, 8, 8, 2),
    Case(2048, 256, 8, 2, 2),
    Case(8192, 128, 8, 8, 1),
    Case(8192, 128, 8, 2, 1),
    Case(32768, 32, 4, 4, 1),
    Case(32768, 32, 4, 2, 1),
)


def case(name: str) -> Case:
    """By its name."""
    return next(c for c in CASES if c.name == name)
