"""`Call`: all that a rule may depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autopar.sharding.rule import OpRule, Row, Shape


@dataclass(frozen=True)
class Call:
    """One operator call, described by shapes.

    Args:
        op: the operator.
        arguments: its arguments by schema name; tensors are given as their shapes.
        inputs: shapes of the tensor operands in schema order (None: absent).
        outputs: shapes of the tensor results.
        masks: which operands are boolean.
        strides: of the operands.
    """

    op: torch._ops.OpOverload
    arguments: Mapping[str, Any]
    inputs: tuple[Shape | None, ...]
    outputs: tuple[Shape, ...]
    masks: tuple[bool, ...] = ()
    strides: tuple[Shape | None, ...] = ()

    def operand(self, index: int) -> Shape:
        """Shape of an operand that the op always has."""
        shape = self.inputs[index]
        assert shape is not None
        return shape

    def bind(
        self,
        notation: str,
        linear: tuple[tuple[int, ...], ...] = (),
        lowering: Callable[..., Any] | None = None,
    ) -> OpRule:
        """The rule of a row for this call, see `Row`."""
        return Row(notation, linear, lowering).bind(self.inputs, self.outputs)
