"""Shards of which writes are noticed.

A tensor's counter of writes does not tell those through DTensors: `p.data.mul_(2)` counts nowhere
that `p` knows of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree


class WatchedShard(torch.Tensor):
    """Takes the place of a DTensor's shard, and notes whether an operator may have written to it:
    it did, or gave out a view.

    Args:
        shard: that operators run on.
    """

    shard: torch.Tensor
    is_written: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, shard: torch.Tensor) -> WatchedShard:
        watched: WatchedShard = torch.Tensor._make_subclass(cls, shard)
        watched.shard, watched.is_written = shard, False
        return watched

    def give(self) -> torch.Tensor:
        """The shard, for whatever somebody does with it."""
        self.is_written = True
        return self.shard

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for k, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None:
                value = args[k] if k < len(args) else kwargs.get(argument.name)
                pytree.tree_map_only(cls, cls.give, value)
        args, kwargs = pytree.tree_map_only(cls, lambda x: x.shard, (args, kwargs))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.shard.detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.shard.__reduce_ex__(protocol)


def watch(x: DTensor) -> WatchedShard:
    """Watch a DTensor's shard."""
    watched = WatchedShard(x._local_tensor)
    x._local_tensor = watched
    return watched


def unwatch(x: DTensor, watched: WatchedShard) -> bool:
    """Put the shard back; whether it was in its place all the time, and not written to."""
    if x._local_tensor is not watched:
        return False
    x._local_tensor = watched.shard
    return not watched.is_written
