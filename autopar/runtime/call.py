"""A call of the model: its arguments, flattened once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree


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
            return call.with_leaves(whole)
        return call

    @property
    def inputs(self) -> tuple[Any, Any]:
        return self.args, self.kwargs

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [x for x in self.leaves if isinstance(x, torch.Tensor)]

    def with_leaves(self, leaves: Sequence[Any]) -> Call:
        """The same call with other leaves."""
        args, kwargs = pytree.tree_unflatten(leaves, pytree.tree_structure(self.inputs))
        return Call(args, kwargs, leaves, self.structure)

    def described(self) -> tuple[Any, ...]:
        """What of the leaves a program is compiled for: of tensors the shape, the dtype and whether
        a gradient is wanted, of others the value."""
        grads = torch.is_grad_enabled()
        return tuple(
            (tuple(x.shape), x.dtype, grads and x.requires_grad)
            if isinstance(x, torch.Tensor)
            else repr(x)
            for x in self.leaves
        )
