"""The graph being built by `make_fx`, and where a captured tensor stands in it.

torch.fx.experimental.proxy_tensor is private (tested with torch 2.13).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import (
    PreDispatchTorchFunctionMode,
    get_proxy_slot,
    set_proxy_slot,
)
from torch.overrides import _get_current_function_mode_stack


def current_tracer() -> Any:
    """The tracer of the graph being built."""
    for mode in _get_current_function_mode_stack():
        if isinstance(mode, PreDispatchTorchFunctionMode):
            return mode.tracer
    return None


def slot_of(t: Any, tracer: Any) -> Any:
    """The tracer's record of a tensor: node and constant value; None if it has none."""
    if tracer is None or not isinstance(t, FakeTensor):
        return None
    return get_proxy_slot(t, tracer, None)


def stand_for(t: torch.Tensor, value: torch.Tensor) -> None:
    """From here on, a captured tensor is another captured value."""
    tracer = current_tracer()
    set_proxy_slot(t, tracer, get_proxy_slot(value, tracer))


def aliases(t: torch.Tensor) -> Iterator[torch.Tensor]:
    """The captured tensors that still exist and share the memory of t, t included."""
    storage = t.untyped_storage()._cdata
    for other in list(current_tracer().tensor_tracker.keys()):
        has_memory = isinstance(other, torch.Tensor) and torch._C._has_storage(other)
        if has_memory and other.untyped_storage()._cdata == storage:
            yield other
