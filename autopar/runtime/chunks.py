"""Chunks of parameters whose states are off the device, and how their steps run on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autopar.comm.offloaded_parameters import EvictedShard
from autopar.runtime.watched_shard import WatchedShard
from autopar.schedule.host_step import CHUNK_BYTES

# Whose fused kernels run on CPUs: one pass over the memory instead of ten.
_FUSED_ON_HOST = {torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad}
# The same on GPUs, where torch takes its lists of tensors if nobody says otherwise: of AdamW 19
# passes over the memory instead of 7, and a temporary value of every parameter.
_FUSED_ON_DEVICE = {torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW}
FUSED_DEVICES = {"cuda"}


def partition(
    shards: Sequence[torch.Tensor], nbytes: float | None = None
) -> Iterator[list[torch.Tensor]]:
    """Parts of at most so many bytes, or of one shard; `CHUNK_BYTES` if None."""
    part: list[torch.Tensor] = []
    size, nbytes = 0, CHUNK_BYTES if nbytes is None else nbytes
    for shard in shards:
        if part and size + shard.nbytes > nbytes:
            yield part
            part, size = [], 0
        part.append(shard)
        size += shard.nbytes
    if part:
        yield part


class StoredShard(EvictedShard):
    """Takes the place of a shard of the state that is on a drive. Any operator on it loads it."""

    load: Any

    def prefetch(self) -> None:
        if not self._loading:
            self._loading = True
            self.load()


def is_away(t: torch.Tensor) -> bool:
    """Whether a tensor is on a drive alone."""
    return bool(t.nbytes) and not t.untyped_storage().nbytes()


def local_of(x: Any) -> Any:
    """As `DTensor.to_local` finds it, which asks autograd first; also if it is on a drive, or
    watched."""
    if type(x) is not DTensor and not isinstance(x, DTensor):
        return x
    local = x._local_tensor
    return local.shard if isinstance(local, StoredShard | WatchedShard) else local


def fused_groups(
    optimizer: torch.optim.Optimizer, state: Mapping[Any, Any], stepped: Callable[[Any], bool]
) -> list[int]:
    """Numbers of the parameter groups that leave the implementation open, where a fused one takes
    their tensors.

    Args:
        stepped: whether a parameter has a gradient in the step.
    """
    if type(optimizer) not in _FUSED_ON_HOST:
        return []
    groups = enumerate(optimizer.param_groups)
    return [k for k, g in groups if _may_fuse(g, [p for p in g["params"] if stepped(p)], state)]


def fuse_on_device(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Let the fused implementation step parameter groups on a GPU that leave it open; these groups.
    It has its counters of steps beside the parameters."""
    if type(optimizer) not in _FUSED_ON_DEVICE:
        return []
    groups, state = [], optimizer.state
    for group in optimizer.param_groups:
        on_device = all(p.device.type in FUSED_DEVICES for p in group["params"])
        own = [p for p in group["params"] if p.grad is not None]
        if not on_device or group.get("foreach") is not None or not _may_fuse(group, own, state):
            continue
        group["fused"] = True
        groups.append(group)
        for p in group["params"]:
            step = state[p].get("step") if p in state else None
            if isinstance(step, torch.Tensor) and step.device != p.device:
                state[p]["step"] = step.to(p.device)
    return groups


def counters_on_host(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """A state dict with counters of steps where torch has them for its groups as they are: on the
    host, unless a group is fused or capturable."""
    state = dict(saved["state"])
    for group in saved["param_groups"]:
        if group.get("fused") or group.get("capturable"):
            continue
        for k in group["params"]:
            step = state[k].get("step") if k in state else None
            if isinstance(step, torch.Tensor) and step.device.type in FUSED_DEVICES:
                state[k] = {**state[k], "step": step.cpu()}
    return {**saved, "state": state}


def _may_fuse(group: dict[str, Any], own: Sequence[torch.Tensor], state: Mapping[Any, Any]) -> bool:
    entries = [state.get(p) or {} for p in own]
    steps = (entry.get("step") for entry in entries)
    return (
        group.get("fused") is None
        and not group.get("foreach")
        and not group.get("capturable")
        and not isinstance(group.get("lr"), torch.Tensor)
        and all(p.is_floating_point() for p in own)
        and all(not isinstance(s, torch.Tensor) or s.dtype == torch.float32 for s in steps)
        # that of SGD takes momentum of all parameters or of none
        and len({entry.get("momentum_buffer") is None for entry in entries}) < 2
    )
