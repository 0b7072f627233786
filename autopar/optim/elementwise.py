"""Optimizers that treat each element by itself."""

from __future__ import annotations

import torch

# Their steps run on shards as they are, on some parameters after others.
ELEMENTWISE = {
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam,
    torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.ASGD,
    torch.optim.Adagrad, torch.optim.Adadelta,
}  # fmt: skip
