"""Initializes lazy modules (`nn.LazyLinear`) from the first batch, as eager PyTorch does.

`LazyModuleMixin._infer_parameters` is private to torch; tested with 2.11 and 2.13.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, cast

import torch
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils import _pytree as pytree

from autopar.errors import EngineError

_UNINITIALIZED = (UninitializedParameter, UninitializedBuffer)


def initialize_lazy_modules(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Give the parameters of lazy modules their shapes and values, in the order of the forward.

    A copy of the model on the meta device finds the shapes, so that nothing of the forward happens
    twice. The values are drawn from the default generator.

    Args:
        args, kwargs: of the forward.

    Raises:
        EngineError: a parameter still has no shape.
    """
    if not _without_shape(model):
        return
    failure: Exception | None = None
    try:
        _initialize(model, args, kwargs)
    except Exception as error:  # of the user's forward
        failure = error
    missing = _without_shape(model)
    if missing:
        why = "" if failure is None else f" ({type(failure).__name__}: {failure})"
        raise EngineError(
            f"parameter {missing[0]} of a lazy module has no shape yet, and the first batch does "
            f"not tell it{why}; run one batch through the model before auto_engine"
        ) from failure


def _without_shape(model: torch.nn.Module) -> list[str]:
    named = (*model.named_parameters(), *model.named_buffers())
    return [name for name, x in named if isinstance(x, _UNINITIALIZED)]


@torch.no_grad()
def _initialize(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    twin = _on_meta_device(model)
    originals = dict(model.named_modules())

    for name, module in twin.named_modules():
        _forget_hooks(module)
        if not isinstance(module, LazyModuleMixin):
            continue

        def initialize(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
            if not _without_shape(module):  # called before
                return
            original: Any = originals[name]
            original._infer_parameters(original, args, kwargs)
            with torch.random.fork_rng(devices=[]):
                module._infer_parameters(module, args, kwargs)
            module.to("meta")

        cast(torch.nn.Module, module).register_forward_pre_hook(initialize, with_kwargs=True)
    inputs = pytree.tree_map_only(torch.Tensor, _meta, (args, kwargs))
    twin(*inputs[0], **inputs[1])


def _meta(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, device="meta")


def _on_meta_device(model: torch.nn.Module) -> torch.nn.Module:
    """A copy without values."""
    memo: dict[int, Any] = {}
    for x in (*model.parameters(), *model.buffers()):
        if isinstance(x, UninitializedBuffer):  # which torch does not copy
            make: Any = UninitializedBuffer
            memo[id(x)] = make(device=x.device, dtype=x.dtype)
        elif not isinstance(x, UninitializedParameter):
            plain = torch.empty(x.shape, dtype=x.dtype, device="meta")
            is_parameter = isinstance(x, torch.nn.Parameter)
            memo[id(x)] = torch.nn.Parameter(plain, x.requires_grad) if is_parameter else plain
    return copy.deepcopy(model, memo)


def _forget_hooks(module: torch.nn.Module) -> None:
    """Remove hooks, which are the user's; those of lazy modules are called by name."""
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
        setattr(module, hooks, OrderedDict())
