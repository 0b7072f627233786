"""What a program takes for granted about the model, checked at every call.

Structure (which module holds which parameter), `requires_grad` and dtypes of parameters, and modes
are compared by C loops over prepared lists.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autopar.ir.graph import ModelGraph

_requires_grad = operator.attrgetter("requires_grad")
_dtype = operator.attrgetter("dtype")
_training = operator.itemgetter("training")


def precision_modes(device_type: str) -> tuple[Any, ...]:
    """The caller's modes that decide the dtypes of results."""
    autocast = torch.is_autocast_enabled(device_type)
    return (
        torch.get_default_dtype(),
        torch.get_autocast_dtype(device_type) if autocast else None,
    )


class _Entries:
    """The entries of a table, equal to a table that holds the same objects."""

    __slots__ = ("held", "ids")

    def __init__(self, table: dict[str, Any]) -> None:
        self.held = list(table.values())  # alive, so that ids stay theirs
        self.ids = list(map(id, self.held))

    def __eq__(self, table: object) -> bool:
        return list(map(id, table.values())) == self.ids  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Assumptions:
    """The state of a model when its step was compiled.

    Args:
        tables: of every module, its submodules and its parameters by name.
        entries: what those tables held.
        attributes: every module's `__dict__`.
        training: their modes.
        parameters: each once.
        requires_grad: of the parameters.
        dtypes: of the parameters.
    """

    tables: Sequence[dict[str, Any]]
    entries: Sequence[_Entries]
    attributes: Sequence[dict[str, Any]]
    training: Sequence[bool]
    parameters: Sequence[torch.Tensor]
    requires_grad: Sequence[bool]
    dtypes: Sequence[torch.dtype]

    @staticmethod
    def of(model: torch.nn.Module, graph: ModelGraph) -> Assumptions:
        """What holds now."""
        modules = list(model.modules())
        tables = [t for m in modules for t in (m._modules, m._parameters) if t]
        attributes = [m.__dict__ for m in modules]
        parameters = list(model.parameters())
        return Assumptions(
            tables,
            [_Entries(t) for t in tables],
            attributes,
            list(map(_training, attributes)),
            parameters,
            list(map(_requires_grad, parameters)),
            list(map(_dtype, parameters)),
        )

    def changed(self) -> str | None:
        """What has changed since, for a message; None if nothing has."""
        if list(map(_training, self.attributes)) != self.training:
            return "modules of the model changed between train() and eval()"
        if list(map(_requires_grad, self.parameters)) != self.requires_grad:
            return "parameters were frozen or unfrozen (requires_grad)"
        if list(map(_dtype, self.parameters)) != self.dtypes:
            return "parameters have another dtype"
        if not all(map(operator.eq, self.entries, self.tables)):
            return "a module or a parameter of the model was replaced"
        return None
