"""Shards of parameters that are on the host for a part of the step.

A step empties the storage of a shard where its schedule says so, and fills it again before it is
read. A parameter stays the same object, and so does its shard; in the shard's place stands an
`Absent` meanwhile. Whoever touches the parameter finds it filled again: between forward and
backward, after a forward whose loss is dropped, and after one that failed. A backward that follows
fills only what is empty.

The operators say that they write to the shard, which keeps them in their place among its readers.
They leave its version as it is, since its values are the same for autograd.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.comm import host_copies as offload

# parameters whose shards may leave, by the address of the shard's storage
_OWNERS: weakref.WeakValueDictionary[int, DTensor] = weakref.WeakValueDictionary()


class Absent(torch.Tensor):
    """Stands for a shard that is on the host. What is done with it, is done with the shard, which
    comes back for that.

    Args:
        shard: its storage is emptied.
        host: what it held.
        owner: the parameter.
    """

    shard: torch.Tensor
    _host: torch.Tensor
    _owner: weakref.ref[DTensor]
    _filling: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, shard: torch.Tensor, host: torch.Tensor, owner: DTensor) -> Absent:
        made: Absent = torch.Tensor._make_subclass(cls, shard)
        made.shard, made._host, made._owner = shard, host, weakref.ref(owner)
        made._filling = False
        if shard.is_cuda:  # in whatever stream it was allocated
            shard.record_stream(torch.cuda.current_stream(shard.device))
        shard.untyped_storage().resize_(0)
        return made

    def fill(self) -> None:
        """Start to fill the shard."""
        if not self._filling:
            self._filling = True
            self.shard.untyped_storage().resize_(self._host.untyped_storage().nbytes())
            offload.copy(_bytes(self.shard), _bytes(self._host))

    def back(self) -> torch.Tensor:
        """The shard, filled and in its place again."""
        self.fill()
        offload.wait(self.shard)
        owner = self._owner()
        if owner is not None and owner._local_tensor is self:
            owner._local_tensor = self.shard
        return self.shard

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(cls, cls.back, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return copy.deepcopy(self.back(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.back().__reduce_ex__(protocol)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """A tensor's storage, with a version of its own."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def may_leave(
    parameters: Mapping[str, torch.Tensor], buffers: Iterable[torch.Tensor]
) -> frozenset[str]:
    """Names of parameters whose shard fills a storage that nobody shares and that can be emptied:
    not parts of a flat parameter, and not what NumPy holds."""
    shards = {n: p._local_tensor for n, p in parameters.items() if isinstance(p, DTensor)}
    held = Counter(x.untyped_storage()._cdata for x in (*shards.values(), *buffers))
    found = set()
    for name, shard in shards.items():
        storage = shard.untyped_storage()
        alone = held[storage._cdata] == 1 and storage.nbytes() == shard.nbytes
        if alone and storage.resizable():
            found.add(name)
    return frozenset(found)


def at_home(parameters: Mapping[str, torch.Tensor], buffers: Iterable[torch.Tensor]) -> None:
    """All shards are on the device from here on, until the step that follows says otherwise."""
    found = {n: p for n, p in parameters.items() if isinstance(p, DTensor)}
    for p in found.values():
        if isinstance(p._local_tensor, Absent):
            p._local_tensor.back()
    free = may_leave(found, buffers)
    for name, p in found.items():
        key = p._local_tensor.untyped_storage()._cdata
        _OWNERS.pop(key, None)
        if name in free:
            _OWNERS[key] = p


def _absent(x: torch.Tensor) -> Absent | None:
    """What stands for a shard, if it is empty."""
    owner = _OWNERS.get(x.untyped_storage()._cdata)
    found = None if owner is None else owner._local_tensor
    return found if isinstance(found, Absent) else None


def _emptied(x: torch.Tensor, host: torch.Tensor) -> None:
    """What was copied to the host goes, if it is a parameter's own still."""
    offload.wait(host)
    storage = x.untyped_storage()
    owner = _OWNERS.get(storage._cdata)
    shard = None if owner is None else owner._local_tensor
    if owner is None or shard is None or isinstance(shard, Absent) or not storage.resizable():
        return
    if shard.untyped_storage()._cdata == storage._cdata:
        owner._local_tensor = Absent(shard, host, owner)


def _filling(x: torch.Tensor, host: torch.Tensor) -> None:
    """Start to fill a shard; it is not to be read before `filled`."""
    absent = _absent(x)
    if absent is not None:
        absent.fill()


def _filled(x: torch.Tensor) -> None:
    """A shard may be read."""
    absent = _absent(x)
    if absent is not None:
        absent.back()


# Not by `custom_op`, which makes a new version of what is written to: what another forward saved
# could not be used by its backward any more.
_LIBRARY = torch.library.Library("autopar", "FRAGMENT")
for _function, _more in ((_emptied, ", Tensor host"), (_filling, ", Tensor host"), (_filled, "")):
    _name = _function.__name__.removeprefix("_")
    _LIBRARY.define(f"{_name}(Tensor(a!) x{_more}) -> ()")
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"autopar::{_name}", lambda *_: None, lib=_LIBRARY)

_RESIZE = {torch.ops.autopar.emptied.default, torch.ops.autopar.filling.default}


@contextmanager
def counted(func: Any, args: Sequence[Any], count: Callable[[int], None]) -> Iterator[None]:
    """Counts the bytes by which a shard's storage grows while an operator runs (fewer than none
    where it is emptied); nothing for other operators."""
    storage = args[0].untyped_storage() if func in _RESIZE else None
    before = 0 if storage is None else storage.nbytes()
    yield
    if storage is not None:
        count(storage.nbytes() - before)
