"""`Family`: a model of a library, tiny, with the batches that train it."""

from __future__ import annotations

import logging
import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

for _noisy in ("transformers", "timm"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="transformers|timm|torch.nn")

Batch = dict[str, Any]

# rates at which something is dropped, masked or jittered: layerdrop, drop_path, SpecAugment, ...
_RATE = re.compile(r"drop|jitter|^mask_(time|feature)_prob$")
_SWITCH = re.compile(r"^apply_spec_augment$")


@dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        name: as the library calls it.
        library: "hf" or "timm".
        kind: decoder, encoder, ..., or the head that the automatic part found.
        make: the model, with the library's default dropout.
        draw: a batch for that model; with labels, so that the forward has a loss.
        dtype: of the weights.
        not_replayed: why the default dropout cannot be drawn again from torch's seed; None if it
            can.
    """

    name: str
    library: str
    kind: str
    make: Callable[[], nn.Module]
    draw: Callable[[nn.Module, torch.Generator], Batch]
    dtype: torch.dtype = torch.float64
    not_replayed: str | None = None

    def build(self, *, dropout: bool = False, seed: int = 0) -> nn.Module:
        """In training mode, always with the same weights."""
        seed_everything(seed)
        model = self.make().to(self.dtype).train()
        _move_off_zero(model)
        return model if dropout else without_dropout(model)

    def batch(self, model: nn.Module, seed: int = 0) -> Batch:
        batch = self.draw(model, torch.Generator().manual_seed(seed))
        return pytree.tree_map_only(
            torch.Tensor, lambda t: t.to(self.dtype) if t.is_floating_point() else t, batch
        )


def seed_everything(seed: int) -> None:
    """The three generators that the libraries draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def without_dropout(model: nn.Module) -> nn.Module:
    """Set every rate of dropping to 0, in the modules and in the configurations they hold."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _silence(module, seen)
    return model


def _silence(owner: Any, seen: set[int]) -> None:
    if id(owner) in seen:
        return
    seen.add(id(owner))
    for name, value in list(vars(owner).items()):
        if isinstance(value, float) and _RATE.search(name):
            setattr(owner, name, 0.0)
        elif isinstance(value, list | tuple) and _RATE.search(name) and _floats(value):
            setattr(owner, name, type(value)(0.0 for _ in value))
        elif value is True and _SWITCH.search(name):
            setattr(owner, name, False)
        elif _is_configuration(value):
            _silence(value, seen)


def _floats(values: Any) -> bool:
    return bool(values) and all(isinstance(v, float) for v in values)


def _is_configuration(value: Any) -> bool:
    return hasattr(value, "model_type") and hasattr(value, "to_dict")


def _move_off_zero(model: nn.Module) -> None:
    """Libraries start gates, scales and biases at constants; such a loss hides wrong gradients."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and p.numel() > 1 and bool((p == p.flatten()[0]).all()):
                p.add_(0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
