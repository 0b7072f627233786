"""Models whose activations outweigh their weights, for `benchmarks.time_splits`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn


class TriangleUpdate(nn.Module):
    """Of a pair representation `[n, n, channels]` (AlphaFold 2, algorithms 11 and 12).

    Args:
        outgoing: sums over edges that leave both nodes, else over those that enter both.
    """

    def __init__(self, channels: int, hidden: int, outgoing: bool) -> None:
        super().__init__()
        self.outgoing = outgoing
        self.norm, self.out_norm = nn.LayerNorm(channels), nn.LayerNorm(hidden)
        self.left, self.right = nn.Linear(channels, hidden), nn.Linear(channels, hidden)
        self.left_gate, self.right_gate = nn.Linear(channels, hidden), nn.Linear(channels, hidden)
        self.gate, self.out = nn.Linear(channels, channels), nn.Linear(hidden, channels)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.norm(z)
        left = self.left(x) * torch.sigmoid(self.left_gate(x))
        right = self.right(x) * torch.sigmoid(self.right_gate(x))
        equation = "ikc,jkc->ijc" if self.outgoing else "kic,kjc->ijc"
        update = torch.einsum(equation, left, right)
        return z + self.out(self.out_norm(update)) * torch.sigmoid(self.gate(x))


class AxialAttention(nn.Module):
    """Attention along the rows of a pair representation, with a bias from its third edge
    (AlphaFold 2, algorithms 13 and 14).

    Args:
        ending: along columns.
    """

    def __init__(self, channels: int, heads: int, ending: bool) -> None:
        super().__init__()
        self.heads, self.ending = heads, ending
        self.norm = nn.LayerNorm(channels)
        self.query, self.key, self.value = (
            nn.Linear(channels, channels, bias=False) for _ in range(3)
        )
        self.bias = nn.Linear(channels, heads, bias=False)
        self.gate, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.norm(z.transpose(0, 1) if self.ending else z)
        n, _, channels = x.shape
        q, k, v = (
            layer(x).view(n, n, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) / (channels // self.heads) ** 0.5
        scores = scores + self.bias(x).permute(2, 0, 1)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, n, channels)
        update = self.out(torch.sigmoid(self.gate(x)) * mixed)
        return z + (update.transpose(0, 1) if self.ending else update)


class Transition(nn.Module):
    """A wide MLP on each pair."""

    def __init__(self, channels: int, factor: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = (
            nn.Linear(channels, factor * channels),
            nn.Linear(factor * channels, channels),
        )

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z + self.down(F.relu(self.up(self.norm(z))))


class PairStack(nn.Module):
    """The pair stack of an Evoformer."""

    def __init__(self, channels: int = 64, heads: int = 4, blocks: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                TriangleUpdate(channels, channels, True),
                TriangleUpdate(channels, channels, False),
                AxialAttention(channels, heads, False),
                AxialAttention(channels, heads, True),
                Transition(channels),
            )
            for _ in range(blocks)
        )

    def forward(self, z: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.blocks:
            z = block(z)
        return z if target is None else (z - target).square().mean()


class ResBlock(nn.Module):
    """Two convolutions with group norms."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, source), nn.GroupNorm(8, target)
        self.conv1 = nn.Conv2d(source, target, 3, padding=1)
        self.conv2 = nn.Conv2d(target, target, 3, padding=1)
        self.skip = nn.Conv2d(source, target, 1) if source != target else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class PixelAttention(nn.Module):
    """Attention between all pixels, with its scores written out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.qkv, self.out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x).view(b, c, h * w)).chunk(3, 1)
        scores = (q.transpose(1, 2) @ k / c**0.5).softmax(-1)
        return x + self.out(v @ scores.transpose(1, 2)).view(b, c, h, w)


class UNet(nn.Module):
    """Of a diffusion model, with attention at the lower resolution."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        c = channels
        self.stem, self.head = nn.Conv2d(3, c, 3, padding=1), nn.Conv2d(c, 3, 3, padding=1)
        self.down = ResBlock(c, c)
        self.shrink = nn.Conv2d(c, 2 * c, 3, stride=2, padding=1)
        self.middle = nn.Sequential(
            ResBlock(2 * c, 2 * c), PixelAttention(2 * c), ResBlock(2 * c, 2 * c)
        )
        self.grow = nn.ConvTranspose2d(2 * c, c, 2, stride=2)
        self.up = ResBlock(2 * c, c)

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        a = self.down(self.stem(x))
        h = self.grow(self.middle(self.shrink(a)))
        y = self.head(self.up(torch.cat([a, h], 1)))
        return y if target is None else (y - target).square().mean()


class Block(nn.Module):
    """A block of a vision transformer, with its scores written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5).softmax(-1)
        x = x + self.out((scores @ v).transpose(1, 2).reshape(b, n, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """A vision transformer."""

    def __init__(self, width: int = 64, heads: int = 4, blocks: int = 2, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        y = self.head(self.norm(self.blocks(h)).mean(1))
        return y if target is None else F.cross_entropy(y, target)


class Head(nn.Module):
    """A language model's head and loss behind one gated MLP."""

    def __init__(self, width: int = 64, classes: int = 128_000) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.down, self.head = nn.Linear(4 * width, width), nn.Linear(width, classes, bias=False)

    def forward(self, h: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        h = h + self.down(F.silu(self.gate(h)) * self.up(h))
        logits = self.head(h)
        if target is None:
            return logits.argmax(-1)
        return F.cross_entropy(logits.flatten(0, -2), target.flatten())


class WideMLP(nn.Module):
    """An MLP whose hidden values outweigh all others."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, factor * width), nn.Linear(factor * width, width)

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        y = x + self.down(F.gelu(self.up(self.norm(x))))
        return y if target is None else (y - target).square().mean()


class TiledMLP(nn.Module):
    """The same in tiles of tokens, each recomputed for its backward, as written by hand.

    Args:
        tiles: number of them.
    """

    def __init__(self, model: nn.Module, tiles: int = 8) -> None:
        super().__init__()
        self.model, self.tiles = model, tiles

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        parts = [
            torch.utils.checkpoint.checkpoint(self.model, part, use_reentrant=False)
            if torch.is_grad_enabled()
            else self.model(part)
            for part in x.chunk(self.tiles, 1)
        ]
        y = torch.cat(parts, 1)  # type: ignore[arg-type]
        return y if target is None else (y - target).square().mean()


class _FusedLoss(torch.autograd.Function):
    """A linear layer and cross-entropy in chunks of tokens (as Liger, arXiv:2410.10989)."""

    @staticmethod
    def forward(ctx, h, weight, target, chunks):
        loss, of_weight, of_h = 0.0, torch.zeros_like(weight), []
        for part, labels in zip(h.chunk(chunks), target.chunk(chunks), strict=True):
            logits = part @ weight.t()
            scale = logits.logsumexp(1, keepdim=True)
            loss = loss + (scale.squeeze(1) - logits.gather(1, labels[:, None]).squeeze(1)).sum()
            gradient = logits.sub_(scale).exp_()
            gradient.scatter_add_(1, labels[:, None], gradient.new_full((len(labels), 1), -1.0))
            gradient.div_(len(h))
            of_h.append(gradient @ weight)
            of_weight.addmm_(gradient.t(), part)
        ctx.save_for_backward(torch.cat(of_h), of_weight)
        return loss / len(h)

    @staticmethod
    def backward(ctx, grad):
        of_h, of_weight = ctx.saved_tensors
        return of_h.mul_(grad), of_weight.mul_(grad), None, None


class HeadByHand(nn.Module):
    """A `Head` whose loss is computed in chunks by hand."""

    def __init__(self, model: Head, chunks: int = 16) -> None:
        super().__init__()
        self.model, self.chunks = model, chunks

    def forward(self, h: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        m = self.model
        h = h + m.down(F.silu(m.gate(h)) * m.up(h))
        loss: torch.Tensor = _FusedLoss.apply(
            h.flatten(0, -2), m.head.weight, target.flatten(), self.chunks
        )
        return loss


def by_hand(model: nn.Module) -> nn.Module:
    """A head by hand."""
    assert isinstance(model, Head)
    return HeadByHand(model)
