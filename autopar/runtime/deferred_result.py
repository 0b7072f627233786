"""Large results beside a loss, which are gathered where they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

# What a deferred result answers without its values.
_DESCRIPTIONS = frozenset(
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf")
) | {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_inference,
}


class DeferredResult(torch.Tensor):
    """A result of the program that is gathered where it is first read, on all ranks alike.

    Any function of torch finds the whole tensor, with its gradient.
    """

    _gather: Callable[[], torch.Tensor]
    _gathered: torch.Tensor | None

    @staticmethod
    def of(local: DTensor, gather: Callable[[], torch.Tensor]) -> DeferredResult:
        """A result of a DTensor's shape, dtype and device.

        Args:
            gather: gives the whole tensor.
        """
        result: DeferredResult = torch.Tensor._make_wrapper_subclass(
            DeferredResult, local.shape, dtype=local.dtype, device=local.device,
            requires_grad=local.requires_grad,
        )  # fmt: skip
        result._gather, result._gathered = gather, None
        return result

    @property
    def _version(self) -> int:  # type: ignore[override]
        return 0 if self._gathered is None else self._gathered._version

    def whole(self) -> torch.Tensor:
        """The whole tensor, on every rank."""
        if self._gathered is None:
            self._gathered = self._gather()
        return self._gathered

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map_only(cls, cls.whole, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(cls, cls.whole, (args, kwargs or {}))
        return func(*args, **kwargs)
