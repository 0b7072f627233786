"""Moves a model's parameters and an optimizer's state into shards, as DTensors, all or nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autopar.errors import EngineError
from autopar.ir.spec import ShardingSpec, local_range


def shard_of(
    x: torch.Tensor, spec: ShardingSpec, mesh: tuple[int, ...], coords: tuple[int, ...]
) -> torch.Tensor:
    """This rank's shard of a global tensor (a view)."""
    for dim, axes in enumerate(spec.dims):
        if axes:
            x = x.narrow(dim, *local_range(x.shape[dim], axes, mesh, coords))
    return x


def _as_dtensor(
    full: torch.Tensor, spec: ShardingSpec, mesh: DeviceMesh, coords: tuple[int, ...]
) -> DTensor:
    local = shard_of(full, spec, tuple(mesh.shape), coords)
    if any(spec.dims):
        local = local.clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        local,
        mesh,
        spec.to_placements(mesh.ndim),
        run_check=False,
        shape=full.shape,
        stride=full.stride(),
    )


@torch.no_grad()
def _agreed(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rank 0's value on every rank."""
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
    """Tensors, with this rank's shards in the place of DTensors, to which their gradients flow."""
    parameters = [x for x in flat if isinstance(x, DTensor)]
    local = iter(_Shards.apply(*parameters) if parameters else ())
    return [next(local) if isinstance(x, DTensor) else x for x in flat]


def gradients(
    parameters: Sequence[torch.Tensor | None],
    grads: Sequence[torch.Tensor | None],
    taken: Collection[int] = (),
) -> list[torch.Tensor | None]:
    """Gradients of this rank's shards as those of the DTensors, laid out as they are.

    `DTensor.to_local` works out the layout of every gradient anew, at some 0.2 ms each. DTensor's
    `__new__` from a local tensor and a spec, and `_spec`, are private to torch; tested with 2.11
    and 2.13.

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
            grad = DTensor.__new__(DTensor, grad, p._spec, requires_grad=False)
        dtensors.append(grad)
    return dtensors


def check_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Refuse an optimizer that trains parameters of another model, or takes sparse gradients alone.

    Raises:
        EngineError: naming the group and the shapes.
    """
    if optimizer is None:
        return
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise EngineError(
            "SparseAdam takes sparse gradients, and a distributed program gives dense ones; use "
            "Adam, SGD or Adagrad (SGD and Adagrad then make the same updates as with sparse ones)"
        )
    known = {id(p) for p in model.parameters()}
    for i, group in enumerate(optimizer.param_groups):
        strange = [tuple(p.shape) for p in group["params"] if id(p) not in known]
        if strange:
            raise EngineError(
                f"optimizer param group {i} holds {len(strange)} parameter(s) that are not the "
                f"model's, of shapes {strange[:4]}; build the optimizer from model.parameters() of "
                "the model given to auto_engine, after any replacement of its layers"
            )


def stored_specs(model: torch.nn.Module) -> dict[str, ShardingSpec]:
    """How a distributed model's parameters are stored, by name; empty before `distribute`."""
    return {
        name: ShardingSpec.from_placements(p.placements, p.ndim)
        for name, p in model.named_parameters()
        if isinstance(p, DTensor)
    }


def distribute(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    specs: Mapping[str, ShardingSpec],
    mesh: DeviceMesh,
    coords: tuple[int, ...],
    device: torch.device,
) -> None:
    """Replace the model's parameters by DTensors, and those in the optimizer with their state.

    Everything is built first and swapped in at the end, so that a failure changes nothing.

    Args:
        specs: storage layout by qualified parameter name (parameters without one: replicated).
    """
    new: dict[int, torch.nn.Parameter] = {}
    for name, p in model.named_parameters():
        if p.is_meta:
            raise EngineError(
                f"parameter {name} is on the meta device and has no values to distribute; "
                "initialize the model on the CPU first, model.to_empty(device='cpu') and its "
                "reset_parameters or load_state_dict"
            )
        spec = specs.get(name, ShardingSpec.replicated(p.ndim))
        shard = _as_dtensor(_agreed(p, device), spec, mesh, coords)
        new[id(p)] = torch.nn.Parameter(shard, requires_grad=p.requires_grad)
    buffers = {id(b): _agreed(b, device) for b in model.buffers()}
    state: dict[torch.Tensor, Any] = {}
    if optimizer is not None:
        layout = {id(p): specs.get(n) for n, p in model.named_parameters()}
        for old, entries in optimizer.state.items():
            spec = layout.get(id(old)) or ShardingSpec.replicated(old.ndim)
            state[new[id(old)]] = {
                key: _as_dtensor(_agreed(value, device), spec, mesh, coords)
                if isinstance(value, torch.Tensor) and value.shape == old.shape and old.ndim
                else value
                for key, value in entries.items()
            }
    _swap(model, new, buffers)
    if optimizer is not None:
        for group in optimizer.param_groups:
            group["params"] = [new[id(p)] for p in group["params"]]
        optimizer.state.clear()
        optimizer.state.update(state)


def _swap(
    model: torch.nn.Module,
    parameters: Mapping[int, torch.nn.Parameter],
    buffers: Mapping[int, torch.Tensor],
) -> None:
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = parameters[id(p)]
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            if buffer.device != buffers[id(buffer)].device:
                module._buffers[name] = buffers[id(buffer)]
            else:
                buffer.copy_(buffers[id(buffer)])
