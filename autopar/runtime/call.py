"""A call of the model: its arguments, flattened once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.ir.numbers import Argument, Origin


@dataclass(frozen=True)
class Call:
    """
    Args:
        args, kwargs: as the caller passed them.
        leaves: flattened, in the order of `pytree`.
        structure: equal for calls that nest their leaves alike.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: Sequence[Any]
    structure: Any

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Quick where nothing is nested. What the caller computed from sharded parameters is made
        whole, on all ranks."""
        leaves: Sequence[Any] = (*args, *kwargs.values())
        if all(isinstance(x, torch.Tensor | float) for x in leaves):
            call = Call(args, kwargs, leaves, (len(args), *kwargs))
        else:
            call = Call(args, kwargs, *pytree.tree_flatten((args, kwargs)))
        if any(isinstance(x, DTensor) for x in call.leaves):
            whole = [x.full_tensor() if isinstance(x, DTensor) else x for x in call.leaves]
            args, kwargs = pytree.tree_unflatten(whole, pytree.tree_structure((args, kwargs)))
            return Call(args, kwargs, whole, call.structure)
        return call

    @property
    def inputs(self) -> tuple[Any, Any]:
        return self.args, self.kwargs

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [x for x in self.leaves if isinstance(x, torch.Tensor)]

    def described(self, varying: Collection[Origin] = ()) -> tuple[Any, ...]:
        """What of the leaves a program is compiled for: of tensors the shape, the dtype and whether
        a gradient is wanted, of numbers that vary the type, of others the value."""
        grads = torch.is_grad_enabled()
        positions = {p.position for p in varying if isinstance(p, Argument)}
        return tuple(
            (tuple(x.shape), x.dtype, grads and x.requires_grad)
            if isinstance(x, torch.Tensor)
            else type(x).__name__
            if k in positions
            else repr(x)
            for k, x in enumerate(self.leaves)
        )
