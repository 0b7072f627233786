"""The tensors that a recording finds: DTensors, values of earlier recordings, plain tensors.

Private to torch here: `DTensor._local_tensor`, its `_spec`, and storages' `_cdata`; tested with
2.13.
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Partial

from autopar.comm.offloaded_parameters import EvictedShard
from autopar.comm.owned_shards import Owned
from autopar.optim.layout import Layout
from autopar.optim.lazy_tensor import LazyTensor, NotRecorded
from autopar.optim.recording import Value

_PLAIN = torch.Tensor.__torch_dispatch__

# Inputs that are remembered between steps.
_MOST_KNOWN = 100_000


class Described(NamedTuple):
    """An input.

    Args:
        memory: the same for two handles of the same elements.
        storage: None if this rank holds no part.
    """

    value: Value
    layout: Layout
    memory: Any
    storage: int | None


class Inputs:
    """Describes tensors; remembers DTensors, which mostly stay."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self._known: dict[int, tuple[Any, Any, Described]] = {}

    def described(self, x: torch.Tensor) -> Described:
        """What an input is like.

        Raises:
            NotRecorded: a recording cannot have it.
        """
        if not is_dtensor(type(x)):
            return self._describe(x)
        known = self._known.get(id(x))
        dtensor: Any = x
        if known is not None and known[1] is dtensor._spec and known[0]() is dtensor._local_tensor:
            return known[2]
        described = self._describe(x)
        if len(self._known) > _MOST_KNOWN:
            self._known.clear()
        self._known[id(x)] = weakref.ref(dtensor._local_tensor), dtensor._spec, described
        return described

    def _describe(self, x: torch.Tensor) -> Described:
        if type(x).__torch_dispatch__ is not _PLAIN and not is_recorded(type(x)):
            raise NotRecorded
        if x.layout is not torch.strided or x.is_quantized or (x.requires_grad and not x.is_leaf):
            raise NotRecorded
        local, layout = self.shard(x)
        value = Value(tuple(x.shape), tuple(x.stride()), x.dtype, x.device)
        if local is None:
            return Described(value, layout, ("absent", id(x)), None)
        storage = storage_of(local)
        memory = storage, local.storage_offset(), local.shape, local.stride(), value.shape
        return Described(value, layout, memory, storage)

    def shard(self, x: torch.Tensor) -> tuple[torch.Tensor | None, Layout]:
        """This rank's part, and the layout."""
        if type(x) is LazyTensor:
            assert x.shard is not None
            return x.shard
        if is_dtensor(type(x)):
            dtensor: Any = x
            spec = dtensor._spec
            known = all(map(is_known, spec.placements))
            if not known or (spec.mesh is not self.mesh and spec.mesh != self.mesh):
                raise NotRecorded
            local = dtensor._local_tensor
            if isinstance(local, EvictedShard):
                local = local.reload()
            return local, _layout_of(spec.placements, len(spec.shape))
        return x, Layout.replicated(x.ndim)


def whole_of(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def memory_of(x: torch.Tensor) -> int:
    """What changes when a tensor gets other memory."""
    return id(x._local_tensor) if is_dtensor(type(x)) else x.data_ptr()  # type: ignore[attr-defined]


@cache
def is_recorded(kind: type) -> bool:
    return issubclass(kind, LazyTensor | DTensor)


@cache
def is_dtensor(kind: type) -> bool:
    return issubclass(kind, DTensor)


@cache
def _layout_of(placements: tuple[Any, ...], ndim: int) -> Layout:
    return Layout.of_placements(placements, ndim)


def storage_of(x: torch.Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def is_known(placement: Any) -> bool:
    """Whether a placement is of a kind that layouts have."""
    if type(placement) is Partial:
        return bool(placement.reduce_op == "sum")
    return type(placement) in (Shard, Owned, Replicate)
