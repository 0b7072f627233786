"""Moves a model's parameters and an optimizer's state into shards, as DTensors, all or nothing.

Private to torch here: `DTensor._local_tensor`, `_spec`, and `__new__` from both; tested with 2.11
and 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autopar.comm.stored_layout import StoredLayout
from autopar.ir.spec import ShardingSpec, local_range
from autopar.runtime.deferred_tensors import DeferredTensor
from autopar.runtime.sharded_values import (
    SavedShard,
    ShardedGradient,
    ShardedParameter,
    ShardedState,
)


def shard_of(
    x: torch.Tensor, spec: ShardingSpec, mesh: tuple[int, ...], coords: tuple[int, ...]
) -> torch.Tensor:
    """This rank's shard of a global tensor (a view)."""
    for dim, axes in enumerate(spec.dims):
        if axes:
            x = x.narrow(dim, *local_range(x.shape[dim], axes, mesh, coords))
    return x


def _as_dtensor(
    full: torch.Tensor, layout: StoredLayout, mesh: DeviceMesh, coords: tuple[int, ...]
) -> DTensor:
    local = layout.shard_of(full, mesh, coords)
    if layout.splits:
        local = local.clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        local,
        mesh,
        layout.placements(mesh),
        run_check=False,
        shape=full.shape,
        stride=full.stride(),
    )


def laid_out_like(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same on every rank, laid out as a parameter of its shape."""
    if not isinstance(p, DTensor):
        return x
    mesh = p.device_mesh
    coords = mesh.get_coordinate()
    assert coords is not None, "the mesh is over all processes"
    return _as_dtensor(x.to(p.device), StoredLayout.of(p), mesh, tuple(coords))


def sharded_state(x: Any, p: torch.Tensor) -> Any:
    """An entry of an optimizer's state, laid out as its parameter if it has the same shape; a
    DTensor of another shape stays laid out as it is."""
    if not isinstance(p, DTensor) or not isinstance(x, torch.Tensor) or isinstance(x, ShardedState):
        return x
    if not x.ndim or x.shape != p.shape:
        return ShardedState.of_dtensor(x) if isinstance(x, SavedShard) else x
    laid_out: Any = x if isinstance(x, DTensor) else laid_out_like(x, p)
    return ShardedState.of_dtensor(laid_out)


@torch.no_grad()
def _agreed(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rank 0's value on every rank, whole."""
    if isinstance(x, DeferredTensor):  # state of an optimizer of deferred parameters
        x = x.compute()
    if isinstance(x, DTensor):
        replicated = all(placement.is_replicate() for placement in x.placements)
        x = x.to_local() if replicated else x.full_tensor()
    value = x.detach().to(device)
    if dist.get_world_size() > 1:
        value = value.clone(memory_format=torch.contiguous_format) if value is x else value
        dist.broadcast(value, src=0)
    return value


class _Shards(torch.autograd.Function):
    """DTensors to local tensors, all at once; gradients become DTensors laid out as they are."""

    @staticmethod
    def forward(ctx: Any, *parameters: DTensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.parameters = parameters
        locals_ = tuple(p._local_tensor.detach() for p in parameters)
        frozen = (x for x, p in zip(locals_, parameters, strict=True) if not p.requires_grad)
        ctx.mark_non_differentiable(*frozen)
        return locals_

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        return tuple(gradients(ctx.parameters, grads))


def shards(flat: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors as a program takes them; gradients of shards flow to their parameters."""
    parameters = [x for x in flat if isinstance(x, ShardedParameter)]
    local = iter(_Shards.apply(*parameters) if parameters else ())
    return [next(local) if isinstance(x, ShardedParameter) else argument_of(x) for x in flat]


def argument_of(x: torch.Tensor) -> torch.Tensor:
    """A tensor as a program takes it: this rank's shard of a parameter, and other DTensors (a
    buffer that the caller computed from parameters) whole."""
    if isinstance(x, ShardedParameter):
        return x._local_tensor
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(
    parameters: Sequence[torch.Tensor | None],
    grads: Sequence[torch.Tensor | None],
    taken: Collection[int] = (),
) -> list[torch.Tensor | None]:
    """Gradients of this rank's shards as those of the DTensors, laid out as they are.

    `DTensor.to_local` works out the layout of every gradient anew, at some 0.2 ms each.

    Args:
        parameters: DTensors; None, and plain tensors, where a gradient is to stay as it is.
        taken: addresses of memory that no gradient may lie in.
    """
    held = set(taken)
    dtensors: list[torch.Tensor | None] = []
    for p, grad in zip(parameters, grads, strict=True):
        if grad is not None and isinstance(p, DTensor):
            # two gradients of one value: autograd cannot see that the DTensors share their memory
            shared = grad.data_ptr() in held
            if shared or grad.stride() != p._local_tensor.stride():
                grad = torch.empty_like(p._local_tensor).copy_(grad)
            held.add(grad.data_ptr())
            grad = ShardedGradient.of(grad, p._spec)
        dtensors.append(grad)
    return dtensors


def stored_layouts(model: torch.nn.Module) -> dict[str, StoredLayout]:
    """How a model's parameters are stored, by name."""
    named = model.named_parameters()
    return {name: StoredLayout.of(p) for name, p in named if isinstance(p, DTensor)}


def stored_specs(model: torch.nn.Module) -> dict[str, ShardingSpec]:
    """How a model's parameters are stored over the axes that plans know, by name."""
    return {name: layout.spec for name, layout in stored_layouts(model).items()}


def distribute(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    specs: Mapping[str, StoredLayout | ShardingSpec],
    mesh: DeviceMesh,
    coords: tuple[int, ...],
    device: torch.device,
    unfilled: Collection[str] = (),
    fill: Callable[[Mapping[str, torch.Tensor], Mapping[str, DTensor]], None] | None = None,
) -> None:
    """Lay the parameters of an adopted model out, and the optimizer's state with them, in place.

    Everything is built first and put in place at the end, so that a failure changes nothing.

    Args:
        specs: storage layout by qualified parameter name (parameters without one: replicated).
        unfilled: names of parameters whose values `fill` gives.
        fill: of parameters by name, and of new DTensors by name that it writes.
    """
    layout = {
        id(p): StoredLayout.of_spec(specs.get(name, ShardingSpec.replicated(p.ndim)))
        for name, p in model.named_parameters()
    }

    def laid_out(x: torch.Tensor, p: torch.Tensor) -> DTensor:
        return _as_dtensor(_agreed(x, device), layout[id(p)], mesh, coords)

    named = {n: p for n, p in model.named_parameters() if isinstance(p, DTensor)}
    new = {
        n: _unwritten(p, layout[id(p)], mesh, coords, device)
        for n, p in named.items()
        if n in unfilled
    }
    if fill is not None and new:
        fill(named, new)
    parameters = list(named.values())
    values = [new[n] if n in new else laid_out(p, p) for n, p in named.items()]
    grads = [None if p.grad is None else laid_out(p.grad, p) for p in parameters]
    buffers = {id(b): _agreed(b, device) for b in model.buffers()}
    state: dict[torch.Tensor, Any] = {}
    for p, entries in optimizer.state.items() if optimizer is not None else ():
        if id(p) in layout and p.ndim:
            state[p] = {
                key: ShardedState.of_dtensor(laid_out(x, p))
                if isinstance(x, torch.Tensor) and x.shape == p.shape
                else x
                for key, x in entries.items()
            }
    for p, value, grad in zip(parameters, values, grads, strict=True):
        _lay_out(p, value, grad)
    _put_buffers(model, buffers)
    for p, entries in state.items():
        assert optimizer is not None
        optimizer.state[p].update(entries)  # a step that runs, whose closure came here, holds it


def _unwritten(
    p: torch.Tensor,
    layout: StoredLayout,
    mesh: DeviceMesh,
    coords: tuple[int, ...],
    device: torch.device,
) -> DTensor:
    """A DTensor like a parameter over new memory, which is this rank's shard alone."""
    full = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta")
    local = layout.shard_of(full, mesh, coords)
    stride = local.contiguous().stride() if layout.splits else full.stride()
    return DTensor.from_local(
        torch.empty_strided(local.shape, stride, dtype=p.dtype, device=device),
        mesh,
        layout.placements(mesh),
        run_check=False,
        shape=full.shape,
        stride=full.stride(),
    )


@torch.no_grad()
def _lay_out(p: Any, value: DTensor, grad: DTensor | None) -> None:
    """Give a parameter the values and the layout of another DTensor."""
    p.grad = None
    p.lay_out(value)
    p.grad = grad


def _put_buffers(model: torch.nn.Module, buffers: Mapping[int, torch.Tensor]) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            if buffer.device != buffers[id(buffer)].device:
                module._buffers[name] = buffers[id(buffer)]
            else:
                buffer.copy_(buffers[id(buffer)])
