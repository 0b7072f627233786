"""Arguments of a traced call: what they may be, their values, what the forward does to them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from autopar.errors import CaptureError
from autopar.tracer.effects import Carried


class Arguments:
    """The arguments of a traced call, before the forward runs.

    Args:
        inputs: (args, kwargs), with containers that the forward may change.
    """

    def __init__(self, inputs: Any) -> None:
        self._inputs = inputs
        self._leaves = pytree.tree_leaves(inputs)
        self._versions = self._now()

    def _now(self) -> list[int]:
        return [
            x._version if isinstance(x, torch.Tensor) and not x.is_inference() else 0
            for x in self._leaves
        ]

    def changes(self, carried: Carried) -> Carried:
        """Add the inputs that were changed in place to what the forward did.

        Raises:
            CaptureError: the forward puts values into a list or a dict of the caller, or changes an
                input that a gradient is asked of.
        """
        known = set(map(id, self._leaves))
        new = [x for x in pytree.tree_leaves(self._inputs) if id(x) not in known]
        if any(isinstance(x, torch.Tensor) for x in new):
            raise CaptureError(
                f"the forward puts {len(new)} value(s) into a list or dict among its arguments, "
                "which the caller would not find there; return them instead"
            )
        pairs = enumerate(zip(self._versions, self._now(), strict=True))
        written = tuple(k for k, (before, after) in pairs if before != after)
        if any(self._leaves[k].requires_grad for k in written):
            raise CaptureError(
                f"the forward changes inputs {list(written)} in place, of which a gradient is "
                "asked; change a copy (x = x.clone())"
            )
        # before the other effects
        carried.tensors[:0] = [self._leaves[k].clone() for k in written]
        carried.effects = replace(carried.effects, inputs=written)
        return carried


def check_inputs(model: torch.nn.Module, example: Any) -> None:
    """Raise for a value that cannot be an input."""
    for path, value in pytree.tree_flatten_with_path(example)[0]:
        if value is None or isinstance(value, torch.Tensor | bool | int | float | str):
            continue
        if isinstance(value, torch.dtype | torch.device | torch.layout | complex):
            continue
        where = pytree.keystr(path[1:])
        raise CaptureError(
            f"input {where} of {type(model).__name__} is a {type(value).__name__}; inputs are "
            "tensors, numbers, strings, None, and lists, tuples and dicts of them. Convert it "
            "(torch.as_tensor for arrays), or register its type with torch.utils._pytree."
        )


def examples(model: torch.nn.Module, example: Any) -> dict[tuple[str, Any], torch.Tensor | None]:
    """Values by role; None for tensors that have none."""
    leaves = enumerate(pytree.tree_leaves(example))
    tensors: dict[tuple[str, Any], torch.Tensor] = {
        ("input", i): t for i, t in leaves if isinstance(t, torch.Tensor)
    }
    tensors |= {("buffer", n): b for n, b in model.named_buffers(remove_duplicate=False)}

    def known(t: torch.Tensor) -> bool:
        return not t.is_meta and not isinstance(t, FakeTensor)

    return {role: t.detach() if known(t) else None for role, t in tensors.items()}
