"""In-place writes of a forward that autograd does not see: under `no_grad`, or through `x.data`.

Eager PyTorch changes the value and leaves its derivative alone: the gradient of the new value is
that of the old one. Functionalization would make a new value without a gradient. So such a write
makes the value `new + (old - old.detach())`, which has the value of `new` and the gradient of
`old`. Writes into parameters are `writes.py`'s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from autopar.errors import CaptureError
from autopar.tracer.proxies import aliases, current_tracer, slot_of, stand_for
from autopar.tracer.source import current_line

_IN_PLACE = {
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__",
    "__ipow__", "__iand__", "__ior__", "__ixor__",
}  # fmt: skip
# end in an underscore, and write no values
_OTHERS = {"requires_grad_", "detach_"}


class HiddenWrites:
    """Finds and carries out the writes that autograd does not see."""

    def __init__(self) -> None:
        self._owners: dict[int, torch.Tensor] = {}  # what carries the gradient, by storage

    def detached(self, source: torch.Tensor, alias: torch.Tensor) -> torch.Tensor:
        """Remember that `alias` shows the memory of a tensor with a gradient; returns it."""
        if isinstance(source, FakeTensor) and source.requires_grad:
            self._owners[source.untyped_storage()._cdata] = source
        return alias

    def hides(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether a call writes into a value with a gradient, unseen by autograd."""
        t = kwargs.get("out", args[0] if args else None)
        if not isinstance(t, FakeTensor) or not _writes(func, kwargs):
            return False
        if torch.is_grad_enabled() and t.requires_grad:
            return False
        owner = self._owner(t)
        return owner is not None and not isinstance(owner, torch.nn.Parameter)

    def _owner(self, t: torch.Tensor) -> torch.Tensor | None:
        if slot_of(t, current_tracer()) is None:
            return None
        if t.requires_grad:
            return t
        return self._owners.get(t.untyped_storage()._cdata)

    def write(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Carry out an in-place operator on its first argument.

        Raises:
            CaptureError: the write goes through a view, or other tensors show the same memory.
        """
        t = args[0]
        owner = self._owner(t)
        assert owner is not None
        if slot_of(owner, current_tracer()).proxy.node.op == "placeholder":
            line = current_line()
            raise CaptureError(
                f"{line}: `{line.text}` changes an input in place, of which a gradient is asked; "
                "change a copy (x = x.clone())"
            )
        others = any(x is not t and x is not owner for x in aliases(t))
        entire = t.shape == owner.shape and t.stride() == owner.stride()
        named = _name(func).endswith("_")
        if others or not entire or not named or owner.is_complex():
            line = current_line()
            raise CaptureError(
                f"{line}: `{line.text}` writes into a part or a view of a value with a gradient "
                "where autograd does not see it (under torch.no_grad(), or through .data or "
                ".detach()). Compute a new value instead, and give it the old gradient by "
                "new + (old - old.detach()); write into a parameter outside of the forward"
            )
        with torch.no_grad():
            new = t.detach().clone()
            func(new, *args[1:], **kwargs)
        with torch.enable_grad():
            # 0 with the gradient of the old value, also where that is infinite
            change = (owner - owner.detach()).nan_to_num(0.0)
            stand_for(owner, new + change)
        if t is not owner:
            stand_for(t, new)
        return t


def _name(func: Any) -> str:
    return getattr(func, "__name__", "")


def _writes(func: Any, kwargs: Any) -> bool:
    name = _name(func)
    if name in _OTHERS:
        return False
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _IN_PLACE or "out" in kwargs or kwargs.get("inplace") is True
