"""Models that pipelines are tried on, in float64, and training them beside one device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from tests.models import CASES, OPTIMIZERS, LanguageModel

Batch = dict[str, Any]


class TextModel(nn.Module):
    """A decoder of transformers, with the loss in the model's precision."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        import transformers

        sizes: Any = {"vocab_size": 61, "use_cache": False, "attn_implementation": "eager"}
        if kind == "llama":
            config: Any = transformers.LlamaConfig(
                hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, tie_word_embeddings=False, **sizes,
            )  # fmt: skip
            self.lm = transformers.LlamaForCausalLM(config)
        else:
            config = transformers.T5Config(
                d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, dropout_rate=0.0,
                decoder_start_token_id=0, vocab_size=61, use_cache=False,
            )  # fmt: skip
            self.lm = transformers.T5ForConditionalGeneration(config)

    def forward(self, labels, **inputs):
        logits = self.lm(**inputs).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class UNet(nn.Module):
    """Down, through, and up again, with skip connections over the stages between."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(self._block(width << k, width << k) for k in range(2))
        self.shrink = nn.ModuleList(
            nn.Conv2d(width << k, width << k + 1, 2, stride=2) for k in range(2)
        )
        self.middle = self._block(4 * width, 4 * width)
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(width << k + 1, width << k, 2, stride=2) for k in (1, 0)
        )
        self.up = nn.ModuleList(self._block(2 * (width << k), width << k) for k in (1, 0))
        self.leave = nn.Conv2d(width, 3, 1)

    @staticmethod
    def _block(given: int, made: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(given, made, 3, padding=1), nn.GroupNorm(2, made), nn.SiLU(),
            nn.Conv2d(made, made, 3, padding=1),
        )  # fmt: skip

    def forward(self, x, noise):
        h = self.enter(x + noise)
        skips = []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            h = block(h)
            skips.append(h)
            h = shrink(h)
        h = self.middle(h)
        for block, grow in zip(self.up, self.grow, strict=True):
            h = block(torch.cat([grow(h), skips.pop()], 1))
        return F.mse_loss(self.leave(h), noise)


class Experts(nn.Module):
    """Two layers of experts, of which every token takes two of four."""

    def __init__(self, width: int = 8, experts: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, width)
        self.gates = nn.ModuleList(nn.Linear(width, experts, bias=False) for _ in range(2))
        self.up = nn.ParameterList(torch.randn(experts, width, 12) / 3 for _ in range(2))
        self.down = nn.ParameterList(torch.randn(experts, 12, width) / 3 for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.head = nn.Linear(width, 31)

    def forward(self, ids, labels):
        h = self.embed(ids)
        for gate, up, down, norm in zip(self.gates, self.up, self.down, self.norms, strict=True):
            x = norm(h)
            weights, chosen = gate(x).softmax(-1).topk(2)
            share = torch.zeros_like(x[..., :1]).expand(*x.shape[:-1], up.shape[0])
            share = share.scatter(-1, chosen, weights)
            each = torch.einsum("bth,ehk->betk", x, up)
            h = h + torch.einsum("betk,ekh,bte->bth", F.gelu(each), down, share)
        return F.cross_entropy(self.head(h).flatten(0, 1), labels.flatten())


class Thrice(nn.Module):
    """One matrix in every stage, a scalar, a layer that no gradient reaches, and one unused."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x, y):
        h = x
        for layer in self.layers:
            h = h + torch.tanh(layer(self.shared(h))) * self.scale
        return F.cross_entropy(self.head(h), y)


class Tied(nn.Module):
    """The table of the first stage is the last layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(31, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 31)
        self.head.weight = self.table.weight
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, ids, labels):
        h = self.table(ids)
        for layer in self.layers:
            h = h + torch.tanh(layer(h)) * self.scale
        return F.cross_entropy(self.head(h).flatten(0, 1), labels.flatten())


class Crossings(nn.Module):
    """Values of every kind go from stage to stage: integers, booleans, several of one operator,
    results of the first stage for the last; and results that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)
        self.third, self.fourth = nn.Linear(8, 8), nn.Linear(8, 5)
        self.register_buffer("table", torch.linspace(0, 1, 8))

    def forward(self, x, y, mask=None):
        h = torch.tanh(self.first(x))
        left, right = h.chunk(2, -1)
        value, place = left.max(-1)  # one is differentiable, one an integer
        positive = right > 0
        h = self.second(h) + self.table
        h = torch.where(mask[:, None], h, h * 0.5) if mask is not None else h
        picked = h.gather(1, place[:, None])
        h = self.third(torch.relu(h)) + value[:, None] + picked * positive.sum(-1, keepdim=True)
        logits = self.fourth(h + self.table)
        loss = F.cross_entropy(logits, y)
        return {"loss": loss, "number": 5, "nothing": None, "hidden": h, "chosen": place,
                "penalty": (right**2).mean(), "name": "crossings"}  # fmt: skip


class Frozen(nn.Module):
    """Layers of which some do not train: a stage of them has no gradients of its own."""

    def __init__(self, frozen: tuple[int, ...] = (0, 1)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 3)
        for k in frozen:
            self.layers[k].requires_grad_(False)

    def forward(self, x, y):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return F.cross_entropy(self.head(x), y)


class Normed(nn.Module):
    """Batch statistics in the first and in the last stage."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norms = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x, y):
        h = torch.relu(self.norms[0](self.first(x)))
        h = torch.relu(self.norms[1](self.second(h)))
        return F.cross_entropy(self.head(h), y)


class Counted(nn.Module):
    """A counter that every stage reads, and a mean of activations, which an earlier stage than the
    one that updates it may read."""

    def __init__(self, shared_mean: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 3)
        self.shared_mean = shared_mean
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x, y):
        if self.training:
            self.count.add_(1)
        if self.shared_mean:
            x = x - self.mean
        for k, layer in enumerate(self.layers):
            x = torch.tanh(layer(x)) / (1 + 0.1 * self.count)
            if k == 1 and self.training:
                self.mean.lerp_(x.detach().mean(0), 0.1)
        return F.cross_entropy(self.head(x) * (1 + 0.1 * self.count), y)


class Dropped(nn.Module):
    """Dropout in two stages, and the dropped values beside the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x, y):
        h = F.dropout(self.first(x), 0.5, self.training)
        h = F.dropout(torch.tanh(self.second(h)), 0.5, self.training)
        return F.cross_entropy(self.head(h), y), h


class Logits(nn.Module):
    """A loss, and beside it logits that are so large that they are gathered when they are read;
    and hidden states of the first stage."""

    def __init__(self, classes: int = 22000, width: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, width), nn.Linear(width, width)
        self.wide = nn.Linear(width, classes)
        self.head = nn.Linear(width, classes)

    def forward(self, x, y):
        h = torch.tanh(self.first(x))
        early = self.wide(h)
        logits = self.head(torch.tanh(self.second(h)))
        return F.cross_entropy(logits, y) + early.mean(), logits, early


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def text(seed: int, samples: int = 8, length: int = 10) -> Batch:
    ids = torch.randint(0, 61, (samples, length), generator=_generator(seed))
    labels = ids.roll(-1, 1).clone()
    labels[:, -1] = -100
    return {"input_ids": ids, "labels": labels}


def padded_text(seed: int, samples: int = 8, length: int = 10) -> Batch:
    batch = text(seed, samples, length)
    lengths = torch.randint(4, length, (samples, 1), generator=_generator(seed + 1))
    mask = torch.arange(length)[None] < lengths
    batch["labels"] = batch["labels"].masked_fill(~mask, -100)
    return {**batch, "attention_mask": mask.long()}


def translation(seed: int, samples: int = 8) -> Batch:
    batch = padded_text(seed, samples, 9)
    answer = torch.randint(0, 61, (samples, 7), generator=_generator(seed + 2))
    labels = answer.masked_fill(torch.arange(7)[None] > 2 + seed % 4, -100)
    return {**batch, "decoder_input_ids": answer.roll(1, 1), "labels": labels}


def noisy_images(seed: int, samples: int = 8) -> Batch:
    x = torch.randn(2, samples, 3, 8, 8, generator=_generator(seed), dtype=torch.float64)
    return {"x": x[0], "noise": x[1]}


def tokens(seed: int, samples: int = 8) -> Batch:
    ids = torch.randint(0, 31, (2, samples, 6), generator=_generator(seed))
    return {"ids": ids[0], "labels": ids[1]}


def vectors(seed: int, samples: int = 8, classes: int = 3) -> Batch:
    x = torch.randn(samples, 8, generator=_generator(seed), dtype=torch.float64)
    return {"x": x, "y": torch.randint(0, classes, (samples,), generator=_generator(seed + 1))}


def masked_vectors(seed: int, samples: int = 8) -> Batch:
    mask = torch.rand(samples, generator=_generator(seed)) > 0.4
    return {**vectors(seed, samples), "mask": mask}


@dataclass(frozen=True)
class Model:
    """A model and batches for it.

    Args:
        single: it computes in float32 somewhere, whatever its type.
    """

    make: Callable[[], nn.Module]
    batch: Callable[..., Batch]
    single: bool = False

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.make().double().train()

    @property
    def tolerance(self) -> float:
        return 1e-6 if self.single else 1e-9


MODELS = {
    "mlp": Model(CASES["mlp"].make, CASES["mlp"].batch),
    "gpt2": Model(lambda: LanguageModel(layers=2), text),
    "vit": Model(CASES["vit"].make, CASES["vit"].batch),
    "llama": Model(lambda: TextModel("llama"), padded_text, single=True),
    "t5": Model(lambda: TextModel("t5"), translation, single=True),
    "unet": Model(UNet, noisy_images),
    "experts": Model(Experts, tokens),
    "thrice": Model(Thrice, vectors),
    "tied": Model(Tied, tokens),
    "crossings": Model(Crossings, masked_vectors),
    "frozen": Model(Frozen, vectors),
    "frozen end": Model(lambda: Frozen((2, 3)), vectors),
    "normed": Model(Normed, vectors),
    "counted": Model(Counted, vectors),
    "counted mean": Model(lambda: Counted(shared_mean=True), vectors),
    "dropped": Model(Dropped, vectors),
    "logits": Model(Logits, vectors),
}


def loss_of(result: Any) -> torch.Tensor:
    """The loss that a model gives: its result, or the first part of it."""
    if isinstance(result, dict):
        return result["loss"]
    return result[0] if isinstance(result, tuple) else result


def whole(x: torch.Tensor) -> torch.Tensor:
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


def gap(mine: Any, theirs: Any) -> float:
    """Largest difference of nested results; what is no tensor must be equal."""
    a, b = pytree.tree_leaves(mine), pytree.tree_leaves(theirs)
    assert len(a) == len(b), (mine, theirs)
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not isinstance(y, torch.Tensor):
            assert x == y, (x, y)
            continue
        x, y = whole(x), whole(y)
        assert x.shape == y.shape and x.dtype == y.dtype, (x.shape, y.shape, x.dtype, y.dtype)
        if y.numel():
            worst = max(worst, (x - y).abs().max().item() if y.dtype != torch.bool
                        else float((x != y).any()))  # fmt: skip
    return worst


def gradients_gap(engine: nn.Module, alone: nn.Module) -> float:
    """Largest difference of gradients; what has none alone has none or zeros."""
    worst = 0.0
    for (name, p), q in zip(engine.named_parameters(), alone.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None or not whole(p.grad).any(), f"{name} has a gradient"
        else:
            assert p.grad is not None, f"{name} has no gradient"
            worst = max(worst, gap(p.grad, q.grad))
    return worst


def state_gap(engine: nn.Module, alone: nn.Module) -> float:
    """Largest difference of parameters and buffers."""
    pairs = zip(
        [*engine.parameters(), *engine.buffers()], [*alone.parameters(), *alone.buffers()],
        strict=True,
    )  # fmt: skip
    return max(gap(a, b) for a, b in pairs)


def accumulates(alone: nn.Module, batch: Batch, sizes: list[int]) -> torch.Tensor:
    """The loss of a loop that accumulates gradients over microbatches, and its backward."""
    samples, start, total = sum(sizes), 0, 0.0
    for size in sizes:
        part = {n: x[start : start + size] for n, x in batch.items()}
        loss = loss_of(alone(**part)) * (size / samples)
        loss.backward()
        total = total + loss.detach()
        start += size
    return total  # type: ignore[return-value]


def train_beside(
    name: str,
    distribute: Callable[[nn.Module, torch.optim.Optimizer], tuple[nn.Module, Any]],
    *,
    optimizer: str = "adamw",
    steps: int = 3,
    sizes: list[int] | None = None,
    samples: list[int] | None = None,
    clip: float | None = None,
    evaluate: bool = False,
) -> dict[str, float]:
    """Train an engine and the same model on one device; largest differences by what differs.

    Args:
        sizes: the microbatches, where each is a batch of its own.
        samples: of the batch of each step.
        clip: the norm of gradients.
        evaluate: after each step.
    """
    model = MODELS[name]
    alone = model.build()
    beside = OPTIMIZERS[optimizer]([p for p in alone.parameters() if p.requires_grad])
    engine = copy.deepcopy(alone)
    trained = OPTIMIZERS[optimizer]([p for p in engine.parameters() if p.requires_grad])
    engine, trained = distribute(engine, trained)
    worst = dict.fromkeys(("results", "gradients", "norm", "state", "evaluated"), 0.0)

    def note(what: str, difference: float) -> None:
        worst[what] = max(worst[what], difference)

    for step in range(steps):
        batch = model.batch(step) if samples is None else model.batch(step, samples[step])
        result = engine(**batch)
        beside.zero_grad()
        trained.zero_grad()
        loss_of(result).backward()
        if sizes is None:
            expected = alone(**batch)
            loss_of(expected).backward()
            note("results", gap(result, expected))
        else:
            note("results", gap(loss_of(result), accumulates(alone, batch, sizes)))
        note("gradients", gradients_gap(engine, alone))
        if clip is not None:
            norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), clip) for m in (engine, alone)]
            note("norm", gap(*norms))
        trained.step()
        beside.step()
        if evaluate:
            engine.eval(), alone.eval()
            with torch.no_grad():
                note("evaluated", gap(engine(**batch), alone(**batch)))
            engine.train(), alone.train()
    note("state", state_gap(engine, alone))
    return worst
