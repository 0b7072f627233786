"""Parts of sharded tensors: views of a gathered tensor that write through to the shards.

Whether values may have changed since they were gathered is counted, not looked up: views that
torch's dispatcher makes of a shard have version counters of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree


class _Steps:
    """Counts calls of engines and steps of optimizers, after which values may be others."""

    def __init__(self) -> None:
        self.count = 0


steps = _Steps()

_WRITING = {"__setitem__", "__set__"} | {
    f"__i{name}__" for name in "add and floordiv mod mul or pow sub truediv xor".split()
}


class GatheredPart(torch.Tensor):
    """A view of a gathered tensor. What is written to it is written to the shards as well.

    Before a write, and before a read if a step came between, the tensor is gathered again, on all
    ranks. One rank alone may read what has been gathered.
    """

    _gathered: torch.Tensor
    _sharded: DTensor

    @classmethod
    def of(cls, x: torch.Tensor, gathered: torch.Tensor, sharded: DTensor) -> Any:
        """A part; a copy (indexed by tensors) stays what it is, as in eager PyTorch.

        Args:
            gathered: the whole tensor, of which `x` may be a view.
            sharded: what is gathered.
        """
        if x.untyped_storage()._cdata != gathered.untyped_storage()._cdata:
            return x
        part = x.as_subclass(cls)
        part._gathered, part._sharded = gathered, sharded
        if not hasattr(gathered, "_gathered_at"):
            gathered._gathered_at = steps.count  # type: ignore[attr-defined]
        return part

    @torch.no_grad()
    def _refresh(self, to_write: bool) -> None:
        gathered: Any = self._gathered
        if to_write or gathered._gathered_at != steps.count:
            gathered.copy_(self._sharded.full_tensor())
            gathered._gathered_at = steps.count

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        in_place = name in _WRITING or (name.endswith("_") and not name.endswith("__"))
        written = cls._among(args[0] if in_place else kwargs.get("out"))
        parts = cls._among((args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            for part in parts:
                part._refresh(bool(written))
        args, kwargs = pytree.tree_map_only(
            cls, lambda x: x.as_subclass(torch.Tensor), (args, kwargs)
        )
        results = func(*args, **kwargs)
        for part in written:
            part._sharded.copy_(part._gathered)

        def result(x: torch.Tensor) -> torch.Tensor:
            for part in parts if type(x) is torch.Tensor else ():
                x = cls.of(x, part._gathered, part._sharded)
            return x

        return pytree.tree_map_only(torch.Tensor, result, results)

    @classmethod
    def _among(cls, values: Any) -> list[GatheredPart]:
        """Parts in nested values, one of each gathered tensor."""
        parts = (x for x in pytree.tree_leaves(values) if isinstance(x, cls))
        return list({id(x._gathered): x for x in parts}.values())
