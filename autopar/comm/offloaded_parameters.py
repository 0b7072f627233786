"""Shards of parameters that are on the host for a part of the step.

A schedule evicts a shard, which empties its storage, and prefetches it before it is read. The
parameter and its shard stay the same objects; meanwhile an `EvictedShard` takes the shard's place.
Whoever uses the parameter reloads it: between forward and backward, after a forward whose loss is
dropped, and after one that failed. A backward that follows prefetches only what is evicted.

The operators declare that they write to the shard, so that they keep their place among its readers.
They leave its version as it is, since its values are the same for autograd.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from autopar.comm import host_copies

# References to the parameters whose shards a schedule may evict, by the shard's storage.
_OWNERS = WeakIdKeyDictionary()


class EvictedShard(torch.Tensor):
    """Takes the place of a shard that is on the host. Any operator on it reloads the shard first.

    Args:
        shard: its storage is emptied.
        host: what it held.
        owner: the parameter.
    """

    shard: torch.Tensor
    _host: torch.Tensor
    _owner: weakref.ref[DTensor]
    _loading: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, shard: torch.Tensor, host: torch.Tensor, owner: weakref.ref[DTensor]
    ) -> EvictedShard:
        evicted: EvictedShard = torch.Tensor._make_subclass(cls, shard)
        evicted.shard, evicted._host, evicted._owner = shard, host, owner
        evicted._loading = False
        if shard.is_cuda:  # in whatever stream it was allocated
            shard.record_stream(torch.cuda.current_stream(shard.device))
        shard.untyped_storage().resize_(0)
        return evicted

    def prefetch(self) -> None:
        """Start to fill the shard."""
        if not self._loading:
            self._loading = True
            self.shard.untyped_storage().resize_(self._host.untyped_storage().nbytes())
            host_copies.copy(_bytes(self.shard), _bytes(self._host))

    def reload(self) -> torch.Tensor:
        """The shard, filled and in its place again."""
        self.prefetch()
        host_copies.wait(self.shard)
        owner = self._owner()
        if owner is not None and owner._local_tensor is self:
            owner._local_tensor = self.shard
        return self.shard

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(cls, cls.reload, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return copy.deepcopy(self.reload(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.reload().__reduce_ex__(protocol)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """A tensor's storage, with a version of its own."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def evicted_shard(parameter: DTensor) -> EvictedShard | None:
    """What is in the place of a parameter's shard, if that is on the host."""
    shard = parameter._local_tensor
    return shard if isinstance(shard, EvictedShard) else None


def offloadable(
    parameters: Mapping[str, torch.Tensor], buffers: Iterable[torch.Tensor]
) -> frozenset[str]:
    """Names of parameters whose shard fills a storage that nobody shares and that can be emptied:
    not parts of a flat parameter, and not what NumPy holds."""
    shards = {n: p._local_tensor for n, p in parameters.items() if isinstance(p, DTensor)}
    users = Counter(x.untyped_storage()._cdata for x in (*shards.values(), *buffers))
    names = set()
    for name, shard in shards.items():
        storage = shard.untyped_storage()
        alone = users[storage._cdata] == 1 and storage.nbytes() == shard.nbytes
        if alone and storage.resizable():
            names.add(name)
    return frozenset(names)


def reload_all(parameters: Mapping[str, torch.Tensor], buffers: Iterable[torch.Tensor]) -> None:
    """Reload all shards, and note which of them the step that follows may evict."""
    sharded = {n: p for n, p in parameters.items() if isinstance(p, DTensor)}
    for p in sharded.values():
        evicted = evicted_shard(p)
        if evicted is not None:
            evicted.reload()
    names = offloadable(sharded, buffers)
    for name, p in sharded.items():
        storage = p._local_tensor.untyped_storage()
        _OWNERS.pop(storage, None)
        if name in names:
            _OWNERS[storage] = weakref.ref(p)


def _evicted(x: torch.Tensor) -> EvictedShard | None:
    """What takes the place of a shard, if it is evicted."""
    reference = _OWNERS.get(x.untyped_storage())
    parameter = None if reference is None else reference()
    return None if parameter is None else evicted_shard(parameter)


def _evict(x: torch.Tensor, host: torch.Tensor) -> None:
    """Empty a shard that was copied to the host, if it is a parameter's own still."""
    host_copies.wait(host)
    storage, reference = x.untyped_storage(), _OWNERS.get(x.untyped_storage())
    parameter = None if reference is None else reference()
    if reference is None or parameter is None or not storage.resizable():
        return
    shard = parameter._local_tensor
    if not isinstance(shard, EvictedShard) and shard.untyped_storage() is storage:
        parameter._local_tensor = EvictedShard(shard, host, reference)


def _prefetch(x: torch.Tensor, host: torch.Tensor) -> None:
    """Start to fill a shard; nothing may read it before `finish_prefetch`."""
    evicted = _evicted(x)
    if evicted is not None:
        evicted.prefetch()


def _finish_prefetch(x: torch.Tensor) -> None:
    """A shard may be read."""
    evicted = _evicted(x)
    if evicted is not None:
        evicted.reload()


# Not by `custom_op`, which makes a new version of what is written to: what another forward saved
# could not be used by its backward any more.
_LIBRARY = torch.library.Library("autopar", "FRAGMENT")
_HOST = ", Tensor host"
for _function, _more in ((_evict, _HOST), (_prefetch, _HOST), (_finish_prefetch, "")):
    _name = _function.__name__.removeprefix("_")
    _LIBRARY.define(f"{_name}(Tensor(a!) x{_more}) -> ()")
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"autopar::{_name}", lambda *_: None, lib=_LIBRARY)
