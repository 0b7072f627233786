"""Makes parameters DTensors, and lets the objects from before stand for them.

Parameters become DTensors when the engine is made, replicated, and change their layout in place
when a plan is known: from then on a parameter is one object, for optimizers, hooks and lists that
hold it. What the caller held before is a `MovedParameter`, which stands for the DTensor.

Private to torch here: `DTensor._local_tensor`; tested with 2.11 and 2.13.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parameter import UninitializedParameter
from torch.utils import _pytree as pytree

from autopar.errors import EngineError
from autopar.ir.precision import Precision
from autopar.runtime.deferred_parameters import (
    DeferredParameter,
    deferred_parameter,
    has_no_values,
)
from autopar.runtime.deferred_tensors import DeferredTensor
from autopar.runtime.distribute import laid_out_like
from autopar.runtime.sharded_values import ShardedParameter


class MovedParameter(torch.nn.Parameter):
    """A parameter object from before the engine was made. Whatever is asked of it is asked of the
    DTensor that took its place; it holds no values itself."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(cls, current, (args, kwargs or {}))
        return _of_sharded_parameters(func)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return copy.deepcopy(current(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return current(self).__reduce_ex__(protocol)


def _of_sharded_parameters(func: Any) -> Any:
    """What `ShardedParameter` has in the place of a method of tensors, or of an attribute's."""
    attribute, name = getattr(func, "__self__", None), getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        own = inspect.getattr_static(
            ShardedParameter, getattr(attribute, "__name__", ""), attribute
        )
        return getattr(own, name)
    if getattr(torch.Tensor, name, None) is func:
        return getattr(ShardedParameter, name)
    return func


def current(p: torch.Tensor) -> torch.Tensor:
    """The parameter that an object stands for: itself, unless it was moved."""
    if isinstance(p, ShardedParameter):
        return p
    stands_for: torch.Tensor = p.__dict__.get("_autopar_parameter", p)
    return stands_for


def train_current_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer from before the engine train the DTensors in its parameters' place."""
    for group in optimizer.param_groups:
        group["params"][:] = [current(p) for p in group["params"]]  # LBFGS keeps the list
    state: dict[Any, Any] = optimizer.state
    for moved in [p for p in state if current(p) is not p]:
        state[current(moved)] = state.pop(moved)


# Modules that lay out what they load.
_LOADING: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

# An object that the caller holds, and the DTensor in its place.
Moved = tuple[torch.nn.Parameter, torch.nn.Parameter]


def adopt(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    mesh: DeviceMesh,
    precision: Precision | None = None,
) -> list[Moved]:
    """Make a model's plain parameters replicated DTensors, also those in the optimizer, and buffers
    and tensor attributes that the caller computed from sharded parameters (masks) whole.

    Parameters without values become `DeferredParameter`s.

    Args:
        precision: has the dtypes of parameters at rest.

    Returns:
        what changed, for `restore`.

    Raises:
        EngineError: a parameter has no values yet, and another dtype than at rest.
    """
    new: dict[int, Any] = {}
    moved: list[Moved] = []
    for name, p in model.named_parameters():
        if isinstance(p, UninitializedParameter):  # until the first batch
            continue
        if isinstance(p, MovedParameter):  # put back into the model by the caller
            new[id(p)] = current(p)
        elif not isinstance(p, ShardedParameter):
            dtype = p.dtype if precision is None else precision.at_rest(p)
            new[id(p)] = _dtensor_for(p, mesh, name, dtype)
            moved.append((p, new[id(p)]))
    _exchange(model, optimizer, new)
    for old, dtensor in moved:
        _move(old, dtensor, mesh)
    for module in model.modules():
        if module not in _LOADING and any(True for _ in module.parameters(recurse=False)):
            module.register_load_state_dict_pre_hook(_lay_out_loaded)
            _LOADING.add(module)
        for held in (module._buffers, module.__dict__):
            for name, x in held.items():
                if isinstance(x, DTensor) and not isinstance(x, ShardedParameter):
                    held[name] = x.full_tensor().detach()
    return moved


def _lay_out_loaded(module: torch.nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give a module its shards of whole tensors that it is about to load."""
    parameters: dict[str, Any] = module._parameters
    for name, p in parameters.items():
        value = state.get(prefix + name)
        if not isinstance(value, torch.Tensor) or isinstance(value, DTensor):
            continue
        if isinstance(p, ShardedParameter) and value.shape == p.shape:
            state[prefix + name] = laid_out_like(value, p)


def restore(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, moved: Sequence[Moved]
) -> None:
    """Undo `adopt`, if no layout was put in force since."""
    _exchange(model, optimizer, {id(new): old for old, new in moved})
    for old, new in moved:
        if isinstance(old, MovedParameter):
            old.__class__ = new.__dict__.pop("_autopar_class")
            if type(old) is torch.nn.Parameter:  # a deferred tensor has no memory
                old.data = new._local_tensor.detach().to(old.dtype)  # type: ignore[attr-defined]
        _hand_over(new, old)
        if new.grad is not None:
            local = new.grad.to_local()  # type: ignore[attr-defined]
            old.grad, new.grad = local.to(old.dtype), None


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
        group["params"][:] = [new.get(id(p), current(p)) for p in group["params"]]
    state: dict[Any, Any] = optimizer.state
    for trained in [p for p in state if id(p) in new]:
        p = new[id(trained)]
        state[p] = {name: _state_of(x, trained, p) for name, x in state.pop(trained).items()}


def _state_of(x: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    """An entry of an optimizer's state, in the dtype of its parameter if it was in that before."""
    like = isinstance(x, torch.Tensor) and x.dtype == old.dtype and x.shape == old.shape
    return x.to(new.dtype) if like and x.ndim else x


def _dtensor_for(
    p: torch.nn.Parameter, mesh: DeviceMesh, name: str, dtype: torch.dtype
) -> ShardedParameter:
    """The DTensor in the place of a parameter; the same one again after `restore`."""
    known = p.__dict__.pop("_autopar_parameter", None)
    if has_no_values(p):
        if dtype != p.dtype:
            raise EngineError(
                f"the precision policy keeps parameters in {dtype}, and {name} has no values yet "
                f"and is {p.dtype}; build the model in {dtype}, or pass "
                "precision=Precision(parameters=None, ...)"
            )
        again = isinstance(known, DeferredParameter)
        return known if again else deferred_parameter(p, mesh, name)
    values: Any = p.detach().to(dtype)
    if not isinstance(p, DTensor):
        values = _replicated(values, mesh)
    if known is None:
        return ShardedParameter.of_values(values, p.requires_grad)
    known.grad = None
    known.lay_out(values)
    known._handles = []  # to be laid out by a plan, again
    return known.requires_grad_(p.requires_grad)


def _replicated(x: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    x = x if x.device.type == mesh.device_type else x.to(mesh.device_type)
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)


@torch.no_grad()
def _move(old: torch.nn.Parameter, new: torch.nn.Parameter, mesh: DeviceMesh) -> None:
    """Let an object stand for the parameter in its place."""
    if old.grad is not None:
        new.grad, old.grad = _replicated(old.grad.to(new.dtype), mesh), None
    _hand_over(old, new)
    if type(old) is torch.nn.Parameter or isinstance(old, DeferredTensor):
        # others have a layout of their own
        old.requires_grad_(False)
        if type(old) is torch.nn.Parameter:
            old.data = torch.empty(0, dtype=old.dtype, device="meta" if old.is_meta else "cpu")
        old.__dict__.pop("_deferred", None)
        new.__dict__["_autopar_class"] = type(old)
        old._autopar_parameter = new  # type: ignore[attr-defined]
        old.__class__ = MovedParameter
    elif isinstance(old, DTensor):  # loaded by assignment
        old.__dict__["_autopar_parameter"] = new


def _hand_over(old: torch.nn.Parameter, new: torch.nn.Parameter) -> None:
    """Let a parameter take over another one's flag, hooks and attributes."""
    new.requires_grad_(old.requires_grad)
    new.__dict__.update(old.__dict__)
    if old._backward_hooks:
        new._backward_hooks = old._backward_hooks
    hooks = getattr(old, "_post_accumulate_grad_hooks", None)
    if hooks:
        new._post_accumulate_grad_hooks = hooks


def check_state(optimizer: torch.optim.Optimizer | None) -> None:
    """Refuse state on the meta device, whose values are lost (Adagrad makes its state at once).

    Raises:
        EngineError: naming the entry.
    """
    for entries in optimizer.state.values() if optimizer is not None else ():
        for name, x in entries.items():
            if isinstance(x, torch.Tensor) and x.is_meta:
                raise EngineError(
                    f"the state {name!r} of {type(optimizer).__name__} is on the meta device and "
                    "has no values; build the model within autopar.deferred_init(), or pass "
                    "example_inputs= to auto_engine and make the optimizer after it"
                )


def has_state_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """False of one that does not call `Optimizer.__init__`, as it wraps another one (Lookahead of
    timm): the state is that of the other."""
    return hasattr(optimizer, "_optimizer_state_dict_pre_hooks")


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
    if not has_state_hooks(optimizer):
        raise EngineError(
            f"{type(optimizer).__name__} does not call Optimizer.__init__, so its state cannot be "
            "laid out; pass the optimizer that it wraps to auto_engine, and wrap what comes back"
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
