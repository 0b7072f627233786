"""What a program takes for granted about the model's parameters, checked at every call.

`requires_grad` is compared by C loops over prepared lists. Modules and parameters that are replaced
are told by torch's registration hooks, and looked for only then. What the forward reads of modules,
modes included, is checked by `autopar/ir/bound_reads.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

_requires_grad = operator.attrgetter("requires_grad")


def precision_modes(device_type: str) -> tuple[Any, ...]:
    """The caller's modes that decide the dtypes of results."""
    autocast = torch.is_autocast_enabled(device_type)
    return (
        torch.get_default_dtype(),
        torch.get_autocast_dtype(device_type) if autocast else None,
    )


class _Registrations:
    """Counts the modules and parameters that any module takes in."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *_: Any) -> None:
        self.count += 1


_registrations = _Registrations()
register_module_module_registration_hook(_registrations)
register_module_parameter_registration_hook(_registrations)


@dataclass
class Assumptions:
    """The state of a model when its step was compiled.

    Args:
        tables: of every module, its submodules and its parameters by name.
        entries: the objects that those tables held.
        size: how many they held.
        parameters: each once.
        requires_grad: of the parameters.
        seen: registrations when the tables were last compared.
    """

    tables: Sequence[dict[str, Any]]
    entries: Sequence[list[Any]]
    size: int
    parameters: Sequence[torch.Tensor]
    requires_grad: Sequence[bool]
    seen: int

    @staticmethod
    def of(model: torch.nn.Module) -> Assumptions:
        """What holds now."""
        modules = list(model.modules())
        tables = [t for m in modules for t in (m._modules, m._parameters)]
        parameters = list(model.parameters())
        return Assumptions(
            tables,
            [list(t.values()) for t in tables],
            sum(map(len, tables)),
            parameters,
            list(map(_requires_grad, parameters)),
            _registrations.count,
        )

    def changed(self) -> str | None:
        """What has changed since, for a message; None if nothing has."""
        if list(map(_requires_grad, self.parameters)) != self.requires_grad:
            return "parameters were frozen or unfrozen (requires_grad)"
        if _registrations.count != self.seen or sum(map(len, self.tables)) != self.size:
            if not all(map(_same, self.tables, self.entries)):
                return "a module or a parameter of the model was replaced"
            self.seen = _registrations.count
        return None


def _same(table: dict[str, Any], entries: list[Any]) -> bool:
    return list(map(id, table.values())) == list(map(id, entries))
