"""Registers functions as operators of graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

# Of the operators that a late pass replaces, the implementation by functional collectives.
IMPLEMENTATIONS: dict[torch._ops.OpOverload, Callable[..., Any]] = {}


def operator(
    shapes: Callable[..., Any], mutates: Sequence[str] = (), *, inline: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the implementation of `torch.ops.autopar.<its name>`.

    Args:
        shapes: the same on fake tensors.
        mutates: names of operands that it writes to.
        inline: a late pass writes the implementation into the graphs that run.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        registered = torch.library.custom_op(f"autopar::{name}", function, mutates_args=mutates)
        registered.register_fake(shapes)
        if inline:
            IMPLEMENTATIONS[getattr(torch.ops.autopar, name).default] = function
        return function

    return register
