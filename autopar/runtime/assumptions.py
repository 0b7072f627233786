"""What a program takes for granted about the model's parameters, checked at every call.

Changes are told where they happen, and looked for only then: of `requires_grad` by parameters
(`autopar/runtime/sharded_values.py`), of a replaced parameter by torch's registration hook. Modules
and what the forward reads of them are checked by `autopar/ir/bound_reads.py`.

`torch._C._any_requires_grad` is private to torch; tested with 2.11 and 2.13.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from autopar.runtime.sharded_values import ShardedParameter, freezing

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


def _changes() -> tuple[int, int]:
    return _registrations.count, freezing.count


@dataclass
class Assumptions:
    """The parameters of a model when its step was compiled.

    Args:
        tables: parameters by name, of every module.
        parameters: what the tables held.
        requires_grad: of the parameters.
        untold: frozen parameters, which `torch.Tensor.requires_grad_(p)` unfreezes untold, and
            plain parameters, which tell nothing. (Autograd drops gradients of frozen ones.)
        seen: the changes told when the parameters were last compared.
    """

    tables: Sequence[dict[str, Any]]
    parameters: Sequence[torch.Tensor]
    requires_grad: Sequence[bool]
    untold: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]
    seen: tuple[int, int]

    @staticmethod
    def of(model: torch.nn.Module) -> Assumptions:
        """What holds now."""
        tables = [m._parameters for m in model.modules()]
        parameters = [p for p in _values(tables) if p is not None]
        frozen = [p for p in parameters if not p.requires_grad]
        plain = [p for p in parameters if p.requires_grad and not isinstance(p, ShardedParameter)]
        requires_grad = list(map(_requires_grad, parameters))
        return Assumptions(tables, parameters, requires_grad, (frozen, plain), _changes())

    def changed(self) -> str | None:
        """What has changed since, for a message; None if nothing has."""
        frozen, plain = self.untold
        notified = _changes() != self.seen
        if not (
            notified or torch._C._any_requires_grad(*frozen) or not all(map(_requires_grad, plain))
        ):
            return None
        now = [p for p in _values(self.tables) if p is not None]
        if list(map(id, now)) != list(map(id, self.parameters)):
            return "a parameter of the model was replaced"
        if list(map(_requires_grad, now)) != self.requires_grad:
            return "parameters were frozen or unfrozen (requires_grad)"
        self.seen = _changes()
        return None


def _values(tables: Sequence[dict[str, Any]]) -> Any:
    return chain.from_iterable(map(dict.values, tables))
