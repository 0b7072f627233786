"""Small models of the four kinds that every numeric test runs, in float64."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

logging.getLogger("transformers").setLevel(logging.ERROR)


class MLP(nn.Module):
    """Two residual blocks and a loss; an odd width in the middle, so that splits are uneven."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 27)
        self.down = nn.Linear(27, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 8)

    def forward(self, x, y=None):
        h = self.norm(x + self.down(F.gelu(self.up(x))))
        logits = self.head(h)
        return logits if y is None else F.cross_entropy(logits, y)


class LanguageModel(nn.Module):
    """Hugging Face GPT-2 with its loss in the model's precision (the library's is float32)."""

    def __init__(self, layers: int = 1, dropout: float = 0.0, vocabulary: int = 101) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        self.gpt2 = GPT2LMHeadModel(
            GPT2Config(
                n_layer=layers,
                n_embd=16,
                n_head=4,
                vocab_size=vocabulary,
                n_positions=16,
                use_cache=False,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
                bos_token_id=None,
                eos_token_id=None,
            )
        )

    def forward(self, input_ids, labels=None):
        logits = self.gpt2(input_ids=input_ids).logits
        if labels is None:
            return logits
        return F.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
        )


class ResNet(nn.Module):
    """Convolutions with BatchNorm, in-place ReLU, pooling and a strided shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.conv1 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(12)
        self.shortcut = nn.Conv2d(8, 12, 1, stride=2, bias=False)
        self.head = nn.Linear(12, 5)

    def forward(self, x, y=None):
        x = self.pool(self.stem(x))
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        h = F.adaptive_avg_pool2d(F.relu(h + self.shortcut(x)), 1).flatten(1)
        logits = self.head(h)
        return logits if y is None else F.cross_entropy(logits, y)


class ViT(nn.Module):
    """Hugging Face ViT classifier with its loss in the model's precision."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        self.vit = ViTForImageClassification(
            ViTConfig(
                image_size=16,
                patch_size=8,
                num_hidden_layers=1,
                hidden_size=16,
                num_attention_heads=4,
                intermediate_size=24,
                num_labels=5,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )

    def forward(self, x, y=None):
        logits = self.vit(pixel_values=x).logits
        return logits if y is None else F.cross_entropy(logits, y)


class Classifier(nn.Module):
    """Heavy weights, and a loss over many classes that takes more: where it is computed, all other
    weights are idle. By default, sizes are odd, so that splits are uneven."""

    def __init__(self, width: int = 65, classes: int = 401) -> None:
        super().__init__()
        self.embed = nn.Embedding(52, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, classes)

    def forward(self, x, y):
        h = self.embed(x)
        for layer in self.layers:
            h = h + F.gelu(layer(h))
        return F.cross_entropy(self.head(h), y)


def words(seed: int, count: int = 128) -> dict[str, torch.Tensor]:
    """A batch for a `Classifier`."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(0, 52, (count,), generator=generator) for _ in "xy")
    return {"x": x, "y": y}


def _text(generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 101, (8, 12), generator=generator)
    return {"input_ids": ids, "labels": ids}


def _vectors(generator: torch.Generator) -> dict[str, torch.Tensor]:
    x = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    return {"x": x, "y": torch.randint(0, 8, (8,), generator=generator)}


def _images(generator: torch.Generator) -> dict[str, torch.Tensor]:
    x = torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64)
    return {"x": x, "y": torch.randint(0, 5, (8,), generator=generator)}


@dataclass(frozen=True)
class Case:
    """A model and batches for it."""

    make: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], dict[str, torch.Tensor]]

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.make().double().train()

    def batch(self, seed: int) -> dict[str, torch.Tensor]:
        return self.draw(torch.Generator().manual_seed(seed))


CASES = {
    "mlp": Case(MLP, _vectors),
    "gpt2": Case(LanguageModel, _text),
    "resnet": Case(ResNet, _images),
    "vit": Case(ViT, _images),
}

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-3),
}


@functools.cache
def reference(name: str, optimizer: str, steps: int) -> tuple[list, list, dict, dict]:
    """Losses, gradients per step, final parameters and buffers on a single device."""
    case = CASES[name]
    model = case.build()
    opt = OPTIMIZERS[optimizer](list(model.parameters()))
    losses, grads = [], []
    for step in range(steps):
        loss = model(**case.batch(step))
        opt.zero_grad()
        loss.backward()
        losses.append(loss.item())
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
        opt.step()
    return losses, grads, dict(model.named_parameters()), dict(model.named_buffers())
