"""`Call`: all that a rule may depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autopar.sharding.rule import Shape


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
