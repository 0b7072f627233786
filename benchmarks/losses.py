"""Models as a training step has them: from a batch to the loss, and nothing else to the caller."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Classifier(nn.Module):
    """Cross-entropy of a model's logits.

    Args:
        model: images [N, 3, H, W] to logits [N, classes].
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar; `labels` are class indices [N]."""
        return F.cross_entropy(self.model(images).float(), labels)


class LossOnly(nn.Module):
    """The loss of a Hugging Face model: logits stay on the devices that made them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> torch.Tensor:
        """The loss, a scalar."""
        return self.model(**batch).loss
