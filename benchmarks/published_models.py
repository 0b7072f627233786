"""Decoder-only models of published measurements, as their frameworks compute them on one device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a decoder-only transformer.

    Args:
        hidden, inner: features of the residual stream and within the feed-forward part.
        heads, kv_heads: of attention.
        gated: the feed-forward part is SwiGLU, norms are RMS norms, positions are rotary, and
            linear layers have no bias, as in Llama; else GELU, layer norms and learned positions.
        bias: of linear layers and norms.
        tied: the head is the embedding.
        flash: attention is one fused kernel; else two products and a softmax between, as in
            Megatron-DeepSpeed. Its scores are not masked there: the mask is within the fused
            softmax, which reads and writes scores once, as softmax does here.
        dropout: of activations and of attention.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tokens: int
    gated: bool = False
    bias: bool = True
    tied: bool = True
    flash: bool = False
    dropout: float = 0.0

    @property
    def parameters(self) -> int:
        """How many weights the model has, without biases and norms."""
        h, kv = self.hidden, self.hidden * self.kv_heads // self.heads
        block = 2 * h * h + 2 * h * kv + (3 if self.gated else 2) * h * self.inner
        positions = 0 if self.gated else self.tokens * h
        return self.layers * block + (1 if self.tied else 2) * self.vocabulary * h + positions


class Block(nn.Module):
    """One block, on activations [samples, tokens, hidden]."""

    def __init__(self, of: ModelShape) -> None:
        super().__init__()
        self.of, self.head = of, of.hidden // of.heads
        width = of.kv_heads * self.head
        self.attention_norm, self.mlp_norm = _norm(of), _norm(of)
        if of.gated:
            self.q = nn.Linear(of.hidden, of.hidden, bias=False)
            self.k = nn.Linear(of.hidden, width, bias=False)
            self.v = nn.Linear(of.hidden, width, bias=False)
            self.gate = nn.Linear(of.hidden, of.inner, bias=False)
        else:  # query, key and value of a head side by side
            self.qkv = nn.Linear(of.hidden, 3 * of.hidden, bias=of.bias)
        self.out = nn.Linear(of.hidden, of.hidden, bias=of.bias)
        self.up = nn.Linear(of.hidden, of.inner, bias=of.bias)
        self.down = nn.Linear(of.inner, of.hidden, bias=of.bias)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Activations of the same shape; `cos` and `sin` [tokens, head] turn queries and keys."""
        of = self.of
        y = self.attention_norm(x)
        samples, tokens = y.shape[:2]
        if of.gated:
            q = self.q(y).view(samples, tokens, of.heads, self.head).transpose(1, 2)
            k = self.k(y).view(samples, tokens, of.kv_heads, self.head).transpose(1, 2)
            v = self.v(y).view(samples, tokens, of.kv_heads, self.head).transpose(1, 2)
            q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        else:
            qkv = self.qkv(y).view(samples, tokens, of.heads, 3 * self.head).transpose(1, 2)
            q, k, v = qkv.split(self.head, dim=-1)
        if of.flash:
            grouped = of.kv_heads != of.heads
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            scores = torch.softmax(q @ k.transpose(-1, -2), -1)
            mixed = F.dropout(scores, of.dropout) @ v
        y = self.out(mixed.transpose(1, 2).reshape(samples, tokens, of.hidden))
        x = x + F.dropout(y, of.dropout)
        y = self.mlp_norm(x)
        y = F.silu(self.gate(y)) * self.up(y) if of.gated else F.gelu(self.up(y))
        return x + F.dropout(self.down(y), of.dropout)


class Decoder(nn.Module):
    """A language model from token numbers [samples, tokens] to its loss."""

    def __init__(self, of: ModelShape) -> None:
        super().__init__()
        self.of = of
        self.embedding = nn.Embedding(of.vocabulary, of.hidden)
        if of.gated:
            head = of.hidden // of.heads
            self.register_buffer("cos", torch.empty(of.tokens, head))
            self.register_buffer("sin", torch.empty(of.tokens, head))
        else:
            self.positions = nn.Embedding(of.tokens, of.hidden)
        self.layers = nn.ModuleList(Block(of) for _ in range(of.layers))
        self.norm = _norm(of)
        if not of.tied:
            self.head = nn.Linear(of.hidden, of.vocabulary, bias=False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy, a scalar. Logits are cast to float32 first."""
        x = self.embedding(ids)
        if self.of.gated:
            cos, sin = self.cos, self.sin
        else:
            cos = sin = x
            x = F.dropout(x + self.positions.weight, self.of.dropout)
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = self.norm(x)
        logits = F.linear(x, self.embedding.weight) if self.of.tied else self.head(x)
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), labels.view(-1))


def _norm(of: ModelShape) -> nn.Module:
    return nn.RMSNorm(of.hidden) if of.gated else nn.LayerNorm(of.hidden, bias=of.bias)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions of x [samples, heads, tokens, head], computed in float32."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
