"""Measures live bytes: every storage made under the tracker, until it is freed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.comm import host_copies
from autopar.comm.offloaded_parameters import counted_resizes


def _local(t: torch.Tensor) -> torch.Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind tensors (of DTensors, the local shards')."""
    storages = {}
    for t in tensors:
        storage = _local(t.detach()).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes held by tensors that were made while it was active, less those of
    parameters that are on the host meanwhile.

    It keeps nothing alive itself, and sees what kernels return, not their scratch space.

    Attributes:
        current: bytes alive now.
        peak: the largest value of `current`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._known: set[int] = set()

    def _resized(self, nbytes: int) -> None:
        self.current += nbytes
        self.peak = max(self.peak, self.current)

    def _free(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.current -= nbytes

    def _see(self, t: torch.Tensor, before: set[int]) -> None:
        if isinstance(t, DTensor) or t.device.type == "meta":
            return
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._known or key in before:
            return
        self._known.add(key)
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(isinstance(t, DTensor) for t in tensors):
            return NotImplemented  # seen again as operations on the local shards
        before = {t.untyped_storage()._cdata for t in tensors}
        with counted_resizes(func, args, self._resized):
            out = func(*args, **kwargs)
        if func is host_copies.HOST:
            return out
        for t in pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self._see(t, before)
        return out


def training_state_bytes(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None
) -> dict[str, int]:
    """Bytes this rank holds between steps: parameters, optimizer state, buffers."""
    state: list[torch.Tensor] = []
    if optimizer is not None:
        for entries in optimizer.state.values():
            state += [v for v in entries.values() if isinstance(v, torch.Tensor) and v.ndim]
    return {
        "parameters": storage_bytes(model.parameters()),
        "optimizer": storage_bytes(state),
        "buffers": storage_bytes(model.buffers()),
    }
