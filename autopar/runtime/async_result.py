"""A result whose sum over ranks may still run: the loss, while the backward runs.

A program starts the sum and returns (`autopar/passes/async_sums.py`). On CPUs, where a wait blocks
the process, the caller gets torch's `AsyncCollectiveTensor`, which waits at the first use of its
value. A backward that starts from it does not wait.

`AsyncCollectiveTensor` is private to torch; tested with 2.11 and 2.13.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils import _pytree as pytree

from autopar.comm.world import explained_failures

_ONES_LIKE = torch.ops.aten.ones_like.default


class AsyncResult(AsyncCollectiveTensor):
    """Waits for its value at the first use, and prints, formats and copies as a plain tensor does.

    Args:
        elem: the tensor that the collective writes to.
    """

    def trigger_wait(self) -> Any:
        with explained_failures():
            return super().trigger_wait()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _ONES_LIKE:  # the gradient that a backward starts from
            return func(torch.empty_like(args[0].elem), **kwargs)
        # views too: a plain tensor is worth more to the caller than one more that waits
        args, kwargs = pytree.tree_map_only(cls, lambda x: x.trigger_wait(), (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.trigger_wait())

    def __format__(self, spec: str) -> str:
        return format(self.trigger_wait(), spec)

    def __deepcopy__(self, memo: Any) -> Any:
        return self.trigger_wait().__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.trigger_wait().detach().__reduce_ex__(protocol)

    def numpy(self, *, force: bool = False) -> Any:
        if self.requires_grad and not force:  # torch's own error
            return torch.empty_like(self.elem, requires_grad=True).numpy()
        return self.detach().numpy()
