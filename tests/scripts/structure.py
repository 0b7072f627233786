"""What stands between a model and a plain graph: checkpointed regions and packed sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.scripts.case import Found, Wrap, case
from tests.scripts.helpers import Model, apart, data, fit, gap, gradient_gap, pair, squares


class Blocks(nn.Module):
    """Residual blocks, each checkpointed."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=32,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double().train()
    model.gradient_checkpointing_enable()
    return model


def _squares(q: Model, step: int) -> torch.Tensor:
    # reentrant checkpoints pass no gradient where their input needs none
    x = data(step, 8, 32).requires_grad_(q.reentrant)
    return F.mse_loss(q(x), data(step + 9, 8, 32))


def _language(q: Model, step: int) -> torch.Tensor:
    ids = torch.arange(64).reshape(4, 16)
    return q(input_ids=ids, labels=ids).loss


_KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[Model, int], torch.Tensor]]] = {
    "use_reentrant=False": (lambda: Blocks(False), _squares),
    "use_reentrant=True": (lambda: Blocks(True), _squares),
    "Hugging Face": (_gpt2, _language),
}


@case("activation checkpointing by hand, gradient_checkpointing_enable", kind=tuple(_KINDS))
def checkpointed_blocks(wrap: Wrap, kind: str) -> Found:
    """Blocks that are checkpointed train."""
    build, loss = _KINDS[kind]
    runs = pair(wrap, build())
    fit(runs, loss, 2)
    return {"parameters": gap(runs[1].model, runs[0].model)}


class Middle(nn.Module):
    """The middle of three layers is checkpointed, reentrantly."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(16, 32), nn.Linear(32, 4)
        self.b = nn.Sequential(nn.Linear(32, 32), nn.GELU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(checkpoint(self.b, self.a(x), use_reentrant=True))


@case("torch.utils.checkpoint with use_reentrant=True", may_refuse=True)
def reentrant_checkpoint_inside(wrap: Wrap) -> Found:
    """The checkpointed middle of a model trains."""
    runs = pair(wrap, Middle())
    fit(runs, squares(16, 16, 4))
    alone, engine = (run.model for run in runs)
    return {"parameters": gap(engine, alone), "gradients": gradient_gap(engine, alone)}


class Tagger(nn.Module):
    """An LSTM over packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(50, 16)
        self.rnn = nn.LSTM(16, 32, batch_first=True, bidirectional=True)
        self.out = nn.Linear(64, 5)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.emb(ids), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        h, _ = nn.utils.rnn.pad_packed_sequence(
            self.rnn(packed)[0], batch_first=True, total_length=ids.shape[1]
        )
        return self.out(h)


@case("pytorch#171978, pytorch#112044")
def packed_tagger(wrap: Wrap) -> Found:
    """`pack_padded_sequence` around an LSTM, with other lengths at each step."""
    runs = pair(wrap, Tagger())

    def loss(q: Model, step: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 50, (8, 10), generator=g)
        lengths = torch.randint(3, 11, (8,), generator=g)
        labels = torch.randint(0, 5, (8, 10), generator=g)
        return F.cross_entropy(q(ids, lengths).flatten(0, 1), labels.flatten())

    fit(runs, loss)
    return {"parameters": gap(runs[1].model, runs[0].model)}


class Growing(nn.Module):
    """Concatenates to tensors that have no elements yet, and computes with such ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.table = nn.Linear(8, 8), nn.LayerNorm(8), nn.Embedding(5, 8)
        self.none = nn.Parameter(torch.zeros(0, 8))

    def forward(self, x: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([torch.zeros(0, 8), self.none, self.layer(x)])
        rows = torch.cat([rows, self.layer(more)])
        nothing = self.norm(self.layer(x[:0])).softmax(-1)
        nothing = nothing + self.table(torch.zeros(0, dtype=torch.long))
        attended = F.scaled_dot_product_attention(x[None, :0], x[None], x[None])[0]
        zeros = x[:, :0] @ torch.zeros(0, 8)
        return torch.cat([rows, nothing, attended]) + zeros.sum() + nothing.sum()


@case("x[:0], torch.zeros(0, n)")
def operands_without_elements(wrap: Wrap) -> Found:
    """Slices, constants, parameters and inputs without elements."""
    runs = pair(wrap, Growing())
    fit(runs, lambda q, step: q(data(step, 4, 8), data(step, 0, 8)).pow(2).mean())
    pairs = zip(*(run.model.parameters() for run in runs), strict=True)
    return {"parameters": max(apart(p, q) for p, q in pairs if p.numel())}
