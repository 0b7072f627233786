"""Modules that find whole parameters, for code of the model that runs outside of the program.

A method that the caller calls on the engine (`encode`, `generate`) computes with plain tensors:
while it runs, a parameter that a module reads is gathered, and gradients flow back to its shards.
All ranks must call it, as they call the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor


class _WholeParameters(dict[str, Any]):
    """A module's parameters, gathered where they are read by name.

    Args:
        stored: as they are stored.
        gathered: whole parameters without gradients, with the versions of their shards; those with
            gradients belong to one use each.
    """

    def __init__(
        self, stored: dict[str, Any], gathered: dict[int, tuple[int, torch.Tensor]]
    ) -> None:
        super().__init__(stored)
        self.stored = stored
        self._gathered = gathered

    def __getitem__(self, name: str) -> Any:
        p = super().__getitem__(name)
        if not isinstance(p, DTensor):
            return p
        if torch.is_grad_enabled() and p.requires_grad:
            return p.full_tensor()
        version = p._local_tensor._version
        known, whole = self._gathered.get(id(p), (None, None))
        if known != version:  # an optimizer has stepped since
            with torch.no_grad():
                whole = p.full_tensor()
            self._gathered[id(p)] = version, whole
        return whole


@contextmanager
def whole_parameters(model: torch.nn.Module) -> Iterator[None]:
    """While on, `module.weight` of the model's modules is a whole tensor."""
    gathered: dict[int, tuple[int, torch.Tensor]] = {}
    stored = [(m, m._parameters) for m in model.modules()]
    for module, parameters in stored:
        module.__dict__["_parameters"] = _WholeParameters(parameters, gathered)
    try:
        yield
    finally:
        for module, parameters in stored:
            now = module._parameters
            if list(map(id, now.values())) != list(map(id, parameters.values())):
                parameters.clear()
                parameters.update(now)  # what the method replaced
            module.__dict__["_parameters"] = parameters


@contextmanager
def stored_parameters(model: torch.nn.Module) -> Iterator[None]:
    """While on, within `whole_parameters`, modules have their parameters as they are stored."""
    whole = [(m, m._parameters) for m in model.modules()]
    for module, parameters in whole:
        if isinstance(parameters, _WholeParameters):
            module.__dict__["_parameters"] = parameters.stored
    try:
        yield
    finally:
        for module, parameters in whole:
            module.__dict__["_parameters"] = parameters
