"""What a program takes for granted about the model's parameters, checked at every call.

`requires_grad` is compared in C. A parameter that is replaced is told by torch's registration hook,
and looked for only then. Modules, and what the forward reads of them, are checked by
`autopar/ir/bound_reads.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

_requires_grad = operator.attrgetter("requires_grad")


def precision_modes(device_type: str) -> tuple[Any, ...]:
    """The caller's modes that decide the dtypes of results."""
    autocast = torch.is_autocast_enabled(device_type)
    return (
        torch.get_default_dtype(),
        torch.get_autocast_dtype(device_type) if autocast else None,
    )


class _Registrations:
    """Counts the parameters that any module takes in."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *_: Any) -> None:
        self.count += 1


_registrations = _Registrations()
register_module_parameter_registration_hook(_registrations)


@dataclass
class Assumptions:
    """The parameters of a model when its step was compiled.

    Args:
        tables: parameters by name, of every module.
        parameters: what the tables held.
        requires_grad: of the parameters.
        seen: registrations when the tables were last compared.
    """

    tables: Sequence[dict[str, Any]]
    parameters: Sequence[torch.Tensor]
    requires_grad: Sequence[bool]
    seen: int

    @staticmethod
    def of(model: torch.nn.Module) -> Assumptions:
        """What holds now."""
        tables = [m._parameters for m in model.modules()]
        parameters = [p for p in _values(tables) if p is not None]
        return Assumptions(
            tables, parameters, list(map(_requires_grad, parameters)), _registrations.count
        )

    def changed(self) -> str | None:
        """What has changed since, for a message; None if nothing has."""
        if list(map(_requires_grad, self.parameters)) != self.requires_grad:
            return "parameters were frozen or unfrozen (requires_grad)"
        if _registrations.count != self.seen:
            now = [p for p in _values(self.tables) if p is not None]
            if list(map(id, now)) != list(map(id, self.parameters)):
                return "a parameter of the model was replaced"
            self.seen = _registrations.count
        return None


def _values(tables: Sequence[dict[str, Any]]) -> Any:
    return chain.from_iterable(map(dict.values, tables))
