"""Records how the modules of a model on the meta device initialize themselves."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch

from autopar.errors import EngineError
from autopar.runtime.deferred_init import deferred_init
from autopar.runtime.deferred_tensors import Deferred, DeferredTensor

_REMEDY = (
    "build the model within autopar.deferred_init() instead of torch.device('meta'), or pass "
    "weights= to auto_engine"
)


def record_initialization(model: torch.nn.Module, names: Collection[str]) -> dict[str, Deferred]:
    """How tensors get their values if the model were allocated on the CPU now (`to_empty`) and then
    initialized: by `initialize_weights()`, which models of transformers have, else by the
    `reset_parameters()` of one module after the other, in the order of `modules()`.

    Random numbers are drawn from the default generator, as they would be then. The model's tensors
    stay as they are.

    Args:
        names: of parameters and buffers on the meta device; of tied ones, any.

    Returns:
        a record per name.

    Raises:
        EngineError: a module cannot initialize a tensor of its own.
    """
    if not names:
        return {}
    places = {name: _place(model, name) for name in names}
    before = {name: held[own] for name, (_, held, own) in places.items()}
    flagged = [m for m in model.modules() if "_is_hf_initialized" not in m.__dict__]
    try:
        with deferred_init():
            _allocate(places.values())
            _initialize(model, {id(places[n][0]): n for n in reversed(list(places))})
        return {
            name: _record(name, module, held[own]) for name, (module, held, own) in places.items()
        }
    finally:
        for name, (_, held, own) in places.items():
            held[own] = before[name]
        for module in flagged:  # transformers would not initialize it a second time
            module.__dict__.pop("_is_hf_initialized", None)


# A module, its parameters or buffers, and a name among them.
_Place = tuple[torch.nn.Module, dict[str, Any], str]


def _place(model: torch.nn.Module, name: str) -> _Place:
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    held: Any = module._parameters if own in module._parameters else module._buffers
    return module, held, own


def _allocate(places: Collection[_Place]) -> None:
    """Put empty deferred tensors in place; tied ones stay tied."""
    empty: dict[int, torch.Tensor] = {}
    for _, held, own in places:
        x = held[own]
        if id(x) not in empty:
            new = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
            parameter = isinstance(x, torch.nn.Parameter)
            empty[id(x)] = torch.nn.Parameter(new, x.requires_grad) if parameter else new
        held[own] = empty[id(x)]


def _initialize(model: torch.nn.Module, owners: dict[int, str]) -> None:
    """Run what initializes the modules that own tensors.

    Args:
        owners: by id of the module, the name of one of its tensors.
    """
    if hasattr(model, "initialize_weights") and hasattr(model, "_init_weights"):
        real = [
            n
            for n, x in (*model.named_parameters(), *model.named_buffers())
            if not isinstance(x, DeferredTensor) and not x.is_meta
        ]
        if real:
            raise EngineError(
                f"{next(iter(owners.values()))} is on the meta device, but {real[0]} has values, "
                f"which initialize_weights() of {type(model).__name__} would change; {_REMEDY}"
            )
        initialize: Any = model.initialize_weights
        initialize()
        return
    for path, module in model.named_modules():
        if id(module) not in owners:
            continue
        others = [n for n, x in _own(module) if not isinstance(x, DeferredTensor)]
        reset: Any = getattr(module, "reset_parameters", None)
        name, kind = owners[id(module)], type(module).__name__
        if reset is None:
            raise EngineError(
                f"{name} is on the meta device and has no values, and its module "
                f"({path or 'the model'}, {kind}) has no reset_parameters() to compute them; "
                f"{_REMEDY}"
            )
        if others:
            raise EngineError(
                f"{name} is on the meta device, but {others[0]} of the same module "
                f"({path or 'the model'}, {kind}) has values, which reset_parameters() would "
                f"change; {_REMEDY}"
            )
        reset()


def _own(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for held in (module._parameters, module._buffers):
        yield from ((name, x) for name, x in held.items() if x is not None)


def _record(name: str, module: torch.nn.Module, x: Any) -> Deferred:
    if isinstance(x, DeferredTensor) and x._deferred.is_written:
        return x._deferred
    raise EngineError(
        f"{name} is on the meta device and has no values, and the initialization of its module "
        f"({type(module).__name__}) does not compute them (only its constructor may); {_REMEDY}"
    )
