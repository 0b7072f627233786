"""State dicts of whole, plain tensors, gathered from the shards and distributed to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.errors import EngineError
from autopar.runtime.distribute import laid_out_like


@torch.no_grad()
def gather_state(state: Any, *, rank0_only: bool, offload_to_cpu: bool) -> Any:
    """A state dict, of a model or an optimizer, with whole tensors in the place of shards; on all
    ranks. Entries over the same memory (tied weights) are one tensor afterwards.

    Args:
        rank0_only: other ranks get an empty dict.
    """
    keep = not rank0_only or dist.get_rank() == 0
    copies: dict[Any, torch.Tensor] = {}

    def whole(x: torch.Tensor) -> torch.Tensor:
        memory = _memory(x)
        if memory not in copies:
            full = x.full_tensor() if isinstance(x, DTensor) else x
            copies[memory] = _copy(full.detach(), offload_to_cpu) if keep else full.new_empty(0)
        return copies[memory]

    gathered = pytree.tree_map_only(torch.Tensor, whole, state)
    return gathered if keep else {}


def _memory(x: torch.Tensor) -> Any:
    """Equal for tensors over the same memory; of shards, on this rank."""
    local, placements = (x._local_tensor, x.placements) if isinstance(x, DTensor) else (x, ())
    return local.untyped_storage()._cdata, local.storage_offset(), x.shape, x.stride(), placements


def _copy(x: torch.Tensor, to_cpu: bool) -> torch.Tensor:
    """A copy that later steps do not change."""
    copied = x.to("cpu") if to_cpu else x
    return copied.clone() if copied is x else copied


@torch.no_grad()
def distribute_state(
    state: Mapping[str, Any] | None, entries: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """A state dict to load on this rank: shards of whole tensors, which rank 0 or all ranks have.

    Args:
        state: whole, plain tensors; None or empty on ranks that have none.
        entries: of the model, laid out.

    Raises:
        EngineError: neither rank 0 alone nor all ranks have a state.
    """
    world = dist.get_world_size()
    have: list[Any] = [None] * world
    dist.all_gather_object(have, bool(state))
    ranks = [rank for rank, has in enumerate(have) if has]
    if ranks not in ([0], list(range(world))):
        raise EngineError(
            f"ranks {ranks} of {world} passed a state to load_full_state_dict; pass it on rank 0, "
            "and None on the others, or pass it on all ranks"
        )
    own = dict(state or {})
    if len(ranks) == world:
        return own
    listed: list[Any] = [[(name, _kind(x)) for name, x in own.items()]]
    dist.broadcast_object_list(listed, src=0)
    distributed: dict[str, Any] = {}
    for name, kind in listed[0]:
        if isinstance(kind, _Other):
            distributed[name] = kind.value
            continue
        shape, dtype = kind
        if own:
            whole = own[name].detach().to(device).contiguous()
        else:
            whole = torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(whole, src=0)
        distributed[name] = _shard(whole, entries.get(name))
    return distributed


class _Other:
    """An entry that is no tensor.

    Args:
        value: the extra state of a module.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


def _kind(x: Any) -> Any:
    return (tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else _Other(x)


def _shard(x: Any, entry: Any) -> Any:
    """This rank's part of a whole tensor, so that the whole can be freed."""
    sharded = isinstance(x, torch.Tensor) and isinstance(entry, DTensor)
    return laid_out_like(x, entry) if sharded and x.shape == entry.shape else x
