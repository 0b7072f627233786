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
        gathered: parameters without gradients; those with gradients belong to one use each.
    """

    def __init__(self, stored: dict[str, Any], gathered: dict[int, _Gathered]) -> None:
        super().__init__(stored)
        self.stored = stored
        self._gathered = gathered

    def __getitem__(self, name: str) -> Any:
        p = super().__getitem__(name)
        if not isinstance(p, DTensor):
            return p
        if torch.is_grad_enabled() and p.requires_grad:
            return p.full_tensor()
        known = self._gathered.get(id(p))
        if known is None or known.is_stale():
            known = self._gathered[id(p)] = _Gathered(p)
        return known.whole

    def write_back(self) -> None:
        """Give all shards what was changed."""
        for known in self._gathered.values():
            known.write_back()


class _Gathered:
    """A whole parameter, which the method may change in place."""

    @torch.no_grad()
    def __init__(self, p: DTensor) -> None:
        self._p = p
        self.whole = p.full_tensor()
        self._versions = self._now()

    def _now(self) -> tuple[int, int]:
        return self._p._local_tensor._version, self.whole._version

    def is_stale(self) -> bool:
        """An optimizer has stepped since."""
        return self._now()[0] != self._versions[0]

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the shards what the method has changed, on all ranks alike."""
        if self._now()[1] != self._versions[1]:
            self._p.copy_(self.whole)
            self._versions = self._now()


@contextmanager
def whole_parameters(model: torch.nn.Module) -> Iterator[None]:
    """While on, `module.weight` of the model's modules is a whole tensor."""
    gathered: dict[int, _Gathered] = {}
    stored = [(m, m._parameters) for m in model.modules()]
    for module, parameters in stored:
        module.__dict__["_parameters"] = _WholeParameters(parameters, gathered)
    try:
        yield
    finally:
        for known in gathered.values():
            known.write_back()
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
            parameters.write_back()
            module.__dict__["_parameters"] = parameters.stored
    try:
        yield
    finally:
        for module, parameters in whole:
            module.__dict__["_parameters"] = parameters
