"""Where the values of a model come from that has none yet on some rank.

A tensor without values is a deferred one, or one on the meta device. Its values come, in this
order, from a checkpoint; from a record of its initialization, which every rank runs if all recorded
the same; or from rank 0. Buffers get theirs when the engine is made, since the model's Python may
branch on them. Parameters get theirs when a plan is known, one after the other, and each rank keeps
its shard: no rank holds more than its shards and one whole parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils import _pytree as pytree

from autopar.comm.ranks import Ranks
from autopar.comm.stored_layout import StoredLayout
from autopar.errors import EngineError
from autopar.runtime.deferred_parameters import has_no_values, record_of
from autopar.runtime.deferred_tensors import Deferred, DeferredTensor, digests
from autopar.runtime.freed_memory import return_freed_memory
from autopar.runtime.module_init import record_initialization
from autopar.runtime.weights import Weights, names_in, open_weights

# What a tensor without record is described by, in the place of a hash.
_VALUES, _NOTHING = "values", "nothing"


@dataclass(frozen=True)
class InitialValues:
    """The values of the parameters that some rank has none of.

    Attributes:
        names: of these parameters, the same on all ranks.
        recorded: those that every rank computes alike.
        weights: the checkpoint that they are read from, or None.
        stored: names in the checkpoint.
    """

    names: frozenset[str] = frozenset()
    recorded: frozenset[str] = frozenset()
    weights: Weights | None = None
    stored: Mapping[str, str] = field(default_factory=dict)

    @torch.no_grad()
    def fill(self, parameters: Mapping[str, torch.Tensor], targets: Mapping[str, DTensor]) -> None:
        """Compute, read or receive values, on all ranks alike.

        Args:
            parameters: as the model has them, by name.
            targets: DTensors over new memory, by name, in the same order on all ranks.
        """
        if self.weights is not None:
            self.weights.read({self.stored[name]: x for name, x in targets.items()})
            return
        for name, target in targets.items():
            if name in self.recorded:
                record = record_of(parameters[name])
                assert record is not None, "every rank has it"
                target._local_tensor.copy_(_shard(record.compute(), target))
            else:
                _send(_whole(parameters[name]) if dist.get_rank() == 0 else None, target)
            return_freed_memory(target.nbytes)


def _whole(x: torch.Tensor) -> torch.Tensor:
    """The values of a tensor on a rank that has them."""
    record = record_of(x)
    if record is not None:
        return record.compute()
    if isinstance(x, DTensor):
        return x._local_tensor.detach()  # replicated until a plan is known
    return x.detach()


def _shard(whole: torch.Tensor, target: DTensor, rank: int | None = None) -> torch.Tensor:
    """The shard of a rank, of this one if none is named; a view."""
    mesh = target.device_mesh
    rank = dist.get_rank() if rank is None else rank
    coords = tuple((mesh.mesh == rank).nonzero()[0].tolist())
    return StoredLayout.of(target).shard_of(whole, mesh, coords)


def _send(whole: torch.Tensor | None, target: DTensor) -> None:
    """Send every rank its shard of rank 0's tensor, unless it is empty."""
    local = target._local_tensor
    if whole is None:
        if not local.numel():
            return
        received = torch.empty(local.shape, dtype=local.dtype, device=local.device)
        dist.recv(received, src=0)
        local.copy_(received)
        return
    for rank in range(1, dist.get_world_size()):
        shard = _shard(whole, target, rank)
        if shard.numel():
            dist.send(shard.to(local.device).contiguous(), dst=rank)
    local.copy_(_shard(whole, target, 0))


def initial_values(
    model: torch.nn.Module,
    ranks: Ranks,
    device: torch.device,
    weights: Path | None = None,
    *,
    converts: bool = False,
    again: bool = False,
) -> InitialValues:
    """Find out, on all ranks together, where values come from, and give buffers and tensor
    attributes of modules theirs. Parameters are left as they are; one on the meta device takes its
    record along.

    With a checkpoint, tensors that have values take those of the checkpoint at once.

    Args:
        device: where buffers of rank 0 are sent from and to.
        weights: the path of a checkpoint.
        converts: parameters may have another floating-point dtype in the checkpoint.
        again: tensors that have values have taken those of the checkpoint already.

    Raises:
        EngineError: on all ranks: values that cannot be had, tensors that differ between ranks, or
            a checkpoint that does not fit.
    """
    ranks.together(_outside_of_context)
    reader: Weights | None = None
    stored: dict[str, str] = {}
    if weights is not None:
        reader, stored = ranks.together(lambda: _opened(model, weights, converts))
    without_values = sorted(name for name, x in _named(model) if has_no_values(x))
    missing = sorted(set().union(*_gathered(without_values)))
    parameters = dict(model.named_parameters())
    missing = [name for name in missing if name not in stored]
    recorded = _agreed_records(model, ranks, missing) if missing else frozenset()
    if reader is not None:
        ranks.together(lambda: _read_now(model, reader, stored, again))
    _fill_buffers(model, ranks, device, [n for n in missing if n not in parameters], recorded)
    if reader is not None:
        deferred = frozenset().union(*_gathered([n for n in without_values if n in parameters]))
        return InitialValues(deferred, frozenset(), reader, stored)
    deferred = frozenset(name for name in missing if name in parameters)
    return InitialValues(deferred, recorded & deferred)


def _outside_of_context() -> None:
    if isinstance(torch.empty(1), DeferredTensor):
        raise EngineError(
            "auto_engine was called within deferred_init(), where its own tensors would be "
            "deferred; call it after the with block, which is for building the model"
        )


def _named(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if not isinstance(x, UninitializedParameter | UninitializedBuffer):
            yield name, x


def _gathered(value: Any) -> list[Any]:
    """What every rank has to say."""
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, value)
    return answers


def _opened(model: torch.nn.Module, path: Path, converts: bool) -> tuple[Weights, dict[str, str]]:
    reader = open_weights(path, {name for name, _ in _named(model)})
    return reader, names_in(reader, model, converts=converts)


@torch.no_grad()
def _read_now(
    model: torch.nn.Module, reader: Weights, stored: Mapping[str, str], again: bool
) -> None:
    """Read buffers, and parameters that have memory."""
    targets: dict[str, torch.Tensor] = {}
    for name, p in model.named_parameters():
        if name in stored and not has_no_values(p) and not again:
            targets[stored[name]] = p
    new: dict[int, torch.Tensor] = {}
    for name, buffer in model.named_buffers():
        if name in stored and (has_no_values(buffer) or not again):
            absent = has_no_values(buffer)
            new[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype) if absent else buffer
            targets[stored[name]] = new[id(buffer)]
    reader.read(targets)
    _put(model, new)


def _agreed_records(model: torch.nn.Module, ranks: Ranks, missing: list[str]) -> frozenset[str]:
    """The names among `missing` that all ranks compute alike; records what is to be initialized.

    The others come from rank 0, which has all of their values then.
    """
    tensors = dict(_named(model))
    on_zero = ranks.from_rank_zero(lambda: [_description(tensors.get(name)) for name in missing])
    ranks.together(lambda: _check_alike(missing, tensors, on_zero))
    unknown = {n for n, (_, state) in zip(missing, on_zero, strict=True) if state == _NOTHING}
    ranks.together(lambda: _initialize(model, tensors, unknown))
    texts = ranks.together(lambda: _hashes(tensors, missing))
    zero = ranks.from_rank_zero(lambda: texts)
    differing = [n for n in missing if texts[n] != zero[n] or texts[n] in (_VALUES, _NOTHING)]
    return frozenset(missing).difference(*_gathered(differing))


def _description(x: torch.Tensor | None) -> tuple[str, str]:
    """Shape and dtype of a tensor, and what is known of its values."""
    if x is None:
        return "absent", _NOTHING
    state = _VALUES if not has_no_values(x) or record_of(x) is not None else _NOTHING
    return f"{list(x.shape)} {x.dtype}", state


def _check_alike(
    missing: list[str], tensors: Mapping[str, torch.Tensor], on_zero: list[tuple[str, str]]
) -> None:
    for name, (shape, _) in zip(missing, on_zero, strict=True):
        own = _description(tensors.get(name))[0]
        if own != shape:
            raise EngineError(
                f"{name} is {shape} on rank 0 and {own} on rank {dist.get_rank()}; build the same "
                "model on every rank"
            )


def _initialize(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], unknown: set[str]
) -> None:
    """Record the initialization of tensors on the meta device that rank 0 does not have either."""
    names = {n for n in unknown if has_no_values(tensors[n]) and record_of(tensors[n]) is None}
    every = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    ids = {id(tensors[name]) for name in names}
    records = record_initialization(model, [name for name, x in every if id(x) in ids])
    for name in names:
        tensors[name].__dict__["_deferred"] = records[name]


def _hashes(tensors: Mapping[str, torch.Tensor], missing: list[str]) -> dict[str, str]:
    records = {name: record_of(tensors[name]) for name in missing}
    known = [(name, record) for name, record in records.items() if record is not None]
    texts = dict(zip((n for n, _ in known), digests([r for _, r in known]), strict=True))
    return {
        name: texts.get(name, _NOTHING if has_no_values(tensors[name]) else _VALUES)
        for name in missing
    }


def _fill_buffers(
    model: torch.nn.Module,
    ranks: Ranks,
    device: torch.device,
    names: list[str],
    recorded: frozenset[str],
) -> None:
    """Give buffers their values, and tensors that modules hold as attributes."""
    buffers = dict(model.named_buffers())
    new: dict[int, torch.Tensor] = {}
    for name in names:
        x = buffers[name]
        record: Deferred | None = record_of(x)
        if name in recorded:
            assert record is not None, "every rank has it"
            new[id(x)] = record.compute()
            continue
        value = torch.empty(x.shape, dtype=x.dtype, device=device)
        if dist.get_rank() == 0:
            value.copy_(_whole(x))
        dist.broadcast(value, src=0)
        new[id(x)] = value
    _put(model, new)
    ranks.together(lambda: _fill_attributes(model))


def _put(model: torch.nn.Module, new: Mapping[int, torch.Tensor]) -> None:
    """Put buffers into a model, by the ids of those before."""
    for module in model.modules():
        for name, x in module._buffers.items():
            if x is not None and id(x) in new:
                module._buffers[name] = new[id(x)]


def _fill_attributes(model: torch.nn.Module) -> None:
    for module in model.modules():
        for name, value in module.__dict__.items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            if any(isinstance(x, DeferredTensor) for x in pytree.tree_leaves(value)):
                module.__dict__[name] = pytree.tree_map_only(
                    DeferredTensor, DeferredTensor.compute, value
                )
