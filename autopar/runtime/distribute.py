"""Moves a model's parameters and an optimizer's state into shards, as DTensors, all or nothing.

Parameters become DTensors when the engine is made, replicated, and change their layout in place
when a plan is known: from then on a parameter is one object, for optimizers, hooks and lists that
hold it. What the caller held before is a `MovedParameter`, which stands for the DTensor.

Private to torch here: `DTensor._local_tensor`, `_spec`, and `__new__` from both; tested with 2.11
and 2.13.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parameter import UninitializedParameter
from torch.utils import _pytree as pytree

from autopar.errors import EngineError
from autopar.ir.spec import ShardingSpec, local_range
from autopar.runtime.sharded_values import ShardedGradient, ShardedParameter


class MovedParameter(torch.nn.Parameter):
    """A parameter object from before the engine was made. Whatever is asked of it is asked of the
    DTensor that took its place; it holds no values itself."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(cls, current, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return copy.deepcopy(current(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return current(self).__reduce_ex__(protocol)


def current(p: torch.Tensor) -> torch.Tensor:
    """The parameter that an object stands for: itself, unless it was moved."""
    return p.__dict__["_autopar_parameter"] if isinstance(p, MovedParameter) else p


# An object that the caller holds, and the DTensor in its place.
Moved = tuple[torch.nn.Parameter, torch.nn.Parameter]


def adopt(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, mesh: DeviceMesh
) -> list[Moved]:
    """Make a model's plain parameters replicated DTensors, also those in the optimizer, and buffers
    and tensor attributes that the caller computed from sharded parameters (masks) whole.

    Returns:
        what changed, for `restore`.

    Raises:
        EngineError: a parameter has no values yet.
    """
    new: dict[int, Any] = {}
    moved: list[Moved] = []
    for name, p in model.named_parameters():
        if p.is_meta or isinstance(p, UninitializedParameter):
            raise EngineError(_no_values(name, p))
        if isinstance(p, MovedParameter):  # put back into the model by the caller
            new[id(p)] = current(p)
        elif not isinstance(p, ShardedParameter):
            new[id(p)] = _dtensor_for(p, mesh)
            moved.append((p, new[id(p)]))
    _exchange(model, optimizer, new)
    for old, dtensor in moved:
        _move(old, dtensor, mesh)
    for module in model.modules():
        for held in (module._buffers, module.__dict__):
            for name, x in held.items():
                if isinstance(x, DTensor) and not isinstance(x, ShardedParameter):
                    held[name] = x.full_tensor().detach()
    return moved


def restore(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, moved: Sequence[Moved]
) -> None:
    """Undo `adopt`, if no layout was put in force since."""
    _exchange(model, optimizer, {id(new): old for old, new in moved})
    for old, new in moved:
        if isinstance(old, MovedParameter):
            old.__class__ = torch.nn.Parameter  # type: ignore[assignment]
            old.data = new._local_tensor.detach()  # type: ignore[attr-defined]
        _hand_over(new, old)
        if new.grad is not None:
            old.grad, new.grad = new.grad.to_local(), None  # type: ignore[attr-defined]


def _exchange(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, new: Mapping[int, Any]
) -> None:
    """Put parameters, by the ids of those before, into the model and the optimizer."""
    for module in model.modules():
        for name, held in module._parameters.items():
            if held is not None and id(held) in new:
                module._parameters[name] = new[id(held)]
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [new.get(id(p), current(p)) for p in group["params"]]
    state: dict[Any, Any] = optimizer.state
    for trained in [p for p in state if id(p) in new]:
        state[new[id(trained)]] = state.pop(trained)


def _dtensor_for(p: torch.nn.Parameter, mesh: DeviceMesh) -> ShardedParameter:
    """The DTensor in the place of a parameter; the same one again after `restore`."""
    values: Any = p.detach() if isinstance(p, DTensor) else _replicated(p.detach(), mesh)
    known = p.__dict__.pop("_autopar_parameter", None)
    if known is None:
        return ShardedParameter.of_values(values, p.requires_grad)
    _lay_out(known, values, None)
    return known.requires_grad_(p.requires_grad)


def _no_values(name: str, p: torch.Tensor) -> str:
    if isinstance(p, UninitializedParameter):
        return (
            f"parameter {name} of a lazy module has no shape yet; run one batch through the model "
            "before auto_engine"
        )
    return (
        f"parameter {name} is on the meta device and has no values to distribute; "
        "initialize the model on the CPU first, model.to_empty(device='cpu') and its "
        "reset_parameters or load_state_dict"
    )


def _replicated(x: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    x = x if x.device.type == mesh.device_type else x.to(mesh.device_type)
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)


@torch.no_grad()
def _move(old: torch.nn.Parameter, new: torch.nn.Parameter, mesh: DeviceMesh) -> None:
    """Let an object stand for the parameter in its place."""
    if old.grad is not None:
        new.grad, old.grad = _replicated(old.grad, mesh), None
    _hand_over(old, new)
    if type(old) is torch.nn.Parameter:  # others have a layout of their own
        old.requires_grad_(False)
        old.data = torch.empty(0, dtype=old.dtype)
        old._autopar_parameter = new  # type: ignore[attr-defined]
        old.__class__ = MovedParameter


def _hand_over(old: torch.nn.Parameter, new: torch.nn.Parameter) -> None:
    """Let a parameter take over another one's flag, hooks and attributes."""
    new.requires_grad_(old.requires_grad)
    new.__dict__.update(old.__dict__)
    if old._backward_hooks:
        new._backward_hooks = old._backward_hooks
    hooks = getattr(old, "_post_accumulate_grad_hooks", None)
    if hooks:
        new._post_accumulate_grad_hooks = hooks


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


def laid_out_like(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same on every rank, laid out as a parameter of its shape."""
    if not isinstance(p, DTensor):
        return x
    mesh = p.device_mesh
    coords = mesh.get_coordinate()
    assert coords is not None, "the mesh is over all processes"
    spec = ShardingSpec.from_placements(p.placements, p.ndim)
    return _as_dtensor(x.to(p.device), spec, mesh, tuple(coords))


@torch.no_grad()
def _agreed(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rank 0's value on every rank, whole."""
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
    known = {id(current(p)) for p in model.parameters()}
    for i, group in enumerate(optimizer.param_groups):
        strange = [tuple(p.shape) for p in group["params"] if id(current(p)) not in known]
        if strange:
            raise EngineError(
                f"optimizer param group {i} holds {len(strange)} parameter(s) that are not the "
                f"model's, of shapes {strange[:4]}; build the optimizer from model.parameters() of "
                "the model given to auto_engine, after any replacement of its layers"
            )


def stored_specs(model: torch.nn.Module) -> dict[str, ShardingSpec]:
    """How a model's parameters are stored, by name."""
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
    """Lay the parameters of an adopted model out, and the optimizer's state with them, in place.

    Everything is built first and put in place at the end, so that a failure changes nothing.

    Args:
        specs: storage layout by qualified parameter name (parameters without one: replicated).
    """
    layout = {
        id(p): specs.get(name, ShardingSpec.replicated(p.ndim))
        for name, p in model.named_parameters()
    }

    def laid_out(x: torch.Tensor, p: torch.Tensor) -> DTensor:
        return _as_dtensor(_agreed(x, device), layout[id(p)], mesh, coords)

    parameters = [p for p in model.parameters() if isinstance(p, DTensor)]
    values = [laid_out(p, p) for p in parameters]
    grads = [None if p.grad is None else laid_out(p.grad, p) for p in parameters]
    buffers = {id(b): _agreed(b, device) for b in model.buffers()}
    state: dict[torch.Tensor, Any] = {}
    for p, entries in optimizer.state.items() if optimizer is not None else ():
        if id(p) in layout and p.ndim:
            state[p] = {
                key: laid_out(x, p) if isinstance(x, torch.Tensor) and x.shape == p.shape else x
                for key, x in entries.items()
            }
    for p, value, grad in zip(parameters, values, grads, strict=True):
        _lay_out(p, value, grad)
    _put_buffers(model, buffers)
    if optimizer is not None:
        optimizer.state.update(state)


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
