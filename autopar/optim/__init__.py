"""Optimizers and schedules for large batches; and how optimizers' steps run on shards.

`LARS` and `LAMB` are timm's `Lars` and `Lamb`. Any other optimizer steps on shards just as well:
`recorder.py` records a step, `step_plan.py` lays it out, `local_program.py` writes the program of a
rank.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from autopar.optim.clip import clip_grad_norm_

__all__ = ["LAMB", "LARS", "clip_grad_norm_", "large_batch_schedule", "scaled_lr"]

_FROM_TIMM = {"LARS": "Lars", "LAMB": "Lamb"}


def __getattr__(name: str) -> Any:
    if name not in _FROM_TIMM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module("timm.optim"), _FROM_TIMM[name])
    except ImportError as error:
        raise ImportError(
            f"autopar.optim.{name} is timm's {_FROM_TIMM[name]}; install it: pip install timm"
        ) from error


def scaled_lr(lr: float, batch: int, base_batch: int = 256, rule: str = "linear") -> float:
    """The learning rate for a batch, from one that was tuned for another.

    Args:
        lr: for batches of `base_batch` samples.
        rule: "linear" in the batch (Goyal et al., 2017), as for LARS, or "sqrt", as for LAMB.

    Raises:
        ValueError: the rule is another one, or a batch is not positive.
    """
    if rule not in ("linear", "sqrt"):
        raise ValueError(f"rule must be 'linear' or 'sqrt', got {rule!r}")
    if batch < 1 or base_batch < 1:
        raise ValueError(f"batches must be positive, got {batch} and {base_batch}")
    return lr * (batch / base_batch) ** (1.0 if rule == "linear" else 0.5)


def large_batch_schedule(
    optimizer: Optimizer, warmup_steps: int, total_steps: int, power: float = 2.0
) -> LambdaLR:
    """Warm-up from 0 in equal steps, then polynomial decay to 0, as LARS and LAMB train with.

    Args:
        warmup_steps: until the optimizer's own learning rate is reached.
        total_steps: of the training; the learning rate is 0 after them.
        power: of the decay; 2 as for LARS (You et al., 2017), 1 as for LAMB (You et al., 2020).

    Raises:
        ValueError: the warm-up is not shorter than the training.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps must be at least 0 and less than total_steps, got {warmup_steps} of "
            f"{total_steps}"
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        left = (total_steps - step) / (total_steps - warmup_steps)
        return float(max(0.0, left) ** power)

    return LambdaLR(optimizer, factor)
