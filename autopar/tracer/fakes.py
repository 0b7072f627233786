"""Fake implementations that torch lacks, and what fake tensors log.

`torch._subclasses.fake_impls.register_op_impl` is private (tested with torch 2.13); the public
`torch.library.register_fake` comes after its refusal of operators with data-dependent shapes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_impls import op_implementations_dict, register_op_impl

from autopar.tracer.modes import replaced

aten = torch.ops.aten

_LOGGERS = [
    logging.getLogger(f"torch.{name}")
    for name in ("_subclasses.fake_tensor", "fx.experimental.symbolic_shapes")
]


def _ctc_loss(
    mode: Any, func: Any, log_probs: torch.Tensor, targets: torch.Tensor, inputs: Any, lengths: Any,
    *_: Any, **__: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Loss per sample, and alpha of (N, T, 2 S + 1): S is the longest target, known only if
    lengths are numbers or targets are padded; for concatenated targets it is an upper bound."""
    time, samples = log_probs.shape[0], (log_probs.shape[1] if log_probs.ndim == 3 else 1)
    if isinstance(lengths, Sequence):
        longest = max(lengths)
    else:
        longest = targets.shape[-1]
    loss = log_probs.new_empty((samples,) if log_probs.ndim == 3 else ())
    return loss, log_probs.new_empty((samples, time, 2 * longest + 1))


def _ctc_loss_backward(
    mode: Any, func: Any, grad: torch.Tensor, log_probs: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    return torch.empty_like(log_probs, memory_format=torch.contiguous_format)


def register() -> None:
    """Register them with torch; repeated calls do nothing."""
    for op in (aten._ctc_loss.default, aten._ctc_loss.Tensor):
        if op not in op_implementations_dict:
            register_op_impl(op)(_ctc_loss)
    for op in (aten._ctc_loss_backward.default, aten._ctc_loss_backward.Tensor):
        if op not in op_implementations_dict:
            register_op_impl(op)(_ctc_loss_backward)


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """Fake tensors log an operator's error with its traceback, and raise it: here it is told once,
    with the user's source line. Symbols log with theirs what they cannot solve, and go on."""
    with contextlib.ExitStack() as stack:
        for logger in _LOGGERS:
            stack.enter_context(replaced(logger, "disabled", lambda before: True))
        yield
