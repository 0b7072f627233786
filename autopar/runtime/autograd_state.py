"""What autograd does in this thread.

`torch._C._current_graph_task_id` and `_top_saved_tensors_default_hooks` are private (tested with
torch 2.13); torch's own checkpoints ask them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd.graph import saved_tensors_hooks


def in_backward() -> bool:
    """Whether a backward runs."""
    return torch._C._current_graph_task_id() != -1


def without_saved_tensors_hooks() -> AbstractContextManager[object]:
    """No hooks of the caller (a checkpoint's) see what is saved meanwhile."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return nullcontext()
    return saved_tensors_hooks(_itself, _itself)


def _itself(saved: torch.Tensor) -> torch.Tensor:
    return saved
