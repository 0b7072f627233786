"""Numbers among a call's arguments that change from call to call, as inputs of the program.

A number is a constant of the program at first. At its second value it becomes a tensor of no dims,
unless that would change a result: such a tensor has the default dtype, in which Python's numbers
count, and no parameter may have a lower precision.
"""

from __future__ import annotations

from typing import Any

import torch

from autopar.runtime.call import Call


class VaryingNumbers:
    """Of the calls of one model, by their structure."""

    def __init__(self) -> None:
        self._first: dict[Any, list[Any]] = {}
        self._varying: dict[Any, set[int]] = {}
        self._constant: set[Any] = set()

    def lift(self, model: torch.nn.Module, call: Call) -> Call:
        """The call, with tensors for the floats that have changed before; itself if none has."""
        where = call.structure
        if not any(type(x) is float for x in call.leaves) or where in self._constant:
            return call
        numbers = [x if type(x) is float else None for x in call.leaves]
        first = self._first.setdefault(where, numbers)
        varying = self._varying.setdefault(where, set())
        pairs = enumerate(zip(numbers, first, strict=True))
        varying |= {k for k, (now, before) in pairs if now is not None and now != before}
        if not varying or not _exact(model):
            return call
        leaves = call.leaves
        return call.with_leaves(
            [torch.tensor(x) if k in varying else x for k, x in enumerate(leaves)]
        )

    def keep_constant(self, call: Call) -> None:
        """The model does not capture with tensors for the numbers of calls like this one."""
        self._constant.add(call.structure)


def _exact(model: torch.nn.Module) -> bool:
    """Whether a tensor of the default dtype counts as a Python number does in every operator."""
    default = torch.finfo(torch.get_default_dtype())
    floating = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    return all(torch.finfo(dtype).bits == default.bits for dtype in floating)
