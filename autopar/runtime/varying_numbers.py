"""Numbers among a call's arguments that change from call to call, as inputs of the program.

A number is a constant of the program at first. At its second value it becomes a tensor of no dims,
unless that would change a result: such a tensor has the default dtype, in which Python's numbers
count, and no parameter may have a lower precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree


class VaryingNumbers:
    """Of the calls of one model."""

    def __init__(self) -> None:
        self._last: dict[Any, list[Any]] = {}
        self._varying: dict[Any, set[int]] = {}
        self._constant: set[Any] = set()

    def lift(self, model: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments, with tensors for the floats that have changed before."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec in self._constant or not any(type(x) is float for x in leaves):
            return args, kwargs
        numbers = [x if type(x) is float else None for x in leaves]
        last = self._last.setdefault(spec, numbers)
        varying = self._varying.setdefault(spec, set())
        for k, (now, before) in enumerate(zip(numbers, last, strict=True)):
            if now is not None and now != before:
                varying.add(k)
        if not varying or not _exact(model):
            return args, kwargs
        lifted = [torch.tensor(x) if k in varying else x for k, x in enumerate(leaves)]
        args, kwargs = pytree.tree_unflatten(lifted, spec)
        return args, kwargs

    def keep_constant(self, args: Any, kwargs: Any) -> None:
        """The model does not capture with tensors for the numbers of calls like this one."""
        self._constant.add(pytree.tree_structure((args, kwargs)))


def _exact(model: torch.nn.Module) -> bool:
    """Whether a tensor of the default dtype counts as a Python number does in every operator."""
    default = torch.finfo(torch.get_default_dtype())
    floating = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    return all(torch.finfo(dtype).bits == default.bits for dtype in floating)
