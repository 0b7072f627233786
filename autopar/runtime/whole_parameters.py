"""Modules that find whole parameters, for code of the model that runs outside of the program.

A method that the caller calls on the engine (`encode`, `generate`) computes with plain tensors:
while it runs, a parameter that a module reads is gathered, once, and gradients flow back to its
shards. All ranks must call it, as they call the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor


class _WholeParameters(dict[str, Any]):
    """A module's parameters, gathered where they are read by name."""

    def __init__(self, parameters: dict[str, Any], gathered: dict[int, torch.Tensor]) -> None:
        super().__init__(parameters)
        self._gathered = gathered

    def __getitem__(self, name: str) -> Any:
        p = super().__getitem__(name)
        if not isinstance(p, DTensor):
            return p
        key = id(p)
        # with gradients, a value of the tape of this use; without, gathered once
        if torch.is_grad_enabled() and p.requires_grad:
            return p.full_tensor()
        if key not in self._gathered:
            self._gathered[key] = p.full_tensor()
        return self._gathered[key]


@contextmanager
def whole_parameters(model: torch.nn.Module) -> Iterator[None]:
    """While on, `module.weight` of the model's modules is a whole tensor."""
    gathered: dict[int, torch.Tensor] = {}
    before = [(m, m._parameters) for m in model.modules()]
    for module, parameters in before:
        module.__dict__["_parameters"] = _WholeParameters(parameters, gathered)
    try:
        yield
    finally:
        for module, parameters in before:
            now = module._parameters
            if list(map(id, now.values())) != list(map(id, parameters.values())):
                parameters.clear()
                parameters.update(now)  # what the method replaced
            module.__dict__["_parameters"] = parameters
