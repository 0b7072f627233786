"""Bytes of optimizer state, measured by stepping a copy of the optimizer on small parameters; and
where an optimizer can step."""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.parameter import UninitializedParameter

from autopar.cluster.tiers import HOST, NVME
from autopar.optim.elementwise import ELEMENTWISE

log = logging.getLogger(__name__)

# Sizes of a probe's dims, all different, so that its state shows which dims it has.
_PROBE = (3, 5, 7, 11, 13, 17, 19, 23)

# Names for the command line.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "adafactor": torch.optim.Adafactor,
    "momentum": functools.partial(torch.optim.SGD, momentum=0.9),
    "sgd": torch.optim.SGD,
}


def named_state_ratio(name: str, model: torch.nn.Module) -> float:
    """`optimizer_state_ratio` of an optimizer by name, over all that a model trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return optimizer_state_ratio(OPTIMIZERS[name](trained, lr=1e-3)) if trained else 0.0


def named_step_tiers(name: str) -> tuple[str, ...]:
    """`step_tiers` of an optimizer by name."""
    return step_tiers(OPTIMIZERS[name]([torch.zeros(1)], lr=1e-3))


def step_tiers(optimizer: torch.optim.Optimizer | None) -> tuple[str, ...]:
    """The tiers that an optimizer can step on. On a drive, only a part of its state is in memory at
    a time, so it has to treat each element by itself."""
    if optimizer is None:
        return ()
    return (HOST, NVME) if type(optimizer) in ELEMENTWISE else (HOST,)


def optimizer_state_ratio(optimizer: torch.optim.Optimizer | None) -> float:
    """Bytes of state per byte of parameter, over all parameters.

    State may be smaller than its parameter: Adafactor's (Shazeer and Stern, 2018) has a number per
    row and per column. State of no dims (counters) is left out.
    """
    if isinstance(optimizer, torch.optim.LBFGS):  # its history, and what it compares with
        return 2.0 * optimizer.param_groups[0]["history_size"] + 3.0
    state = total = 0.0
    for group in optimizer.param_groups if optimizer is not None else ():
        twin = _twin_of(optimizer, group)
        for p in group["params"]:
            if p.requires_grad:
                # of a lazy module, a shape is not known yet
                shape = (1, 1) if isinstance(p, UninitializedParameter) else p.shape
                state += sum(
                    itemsize * math.prod(shape[dim] for dim in dims)
                    for dims, itemsize in twin(len(shape), p.dtype)
                )
                total += math.prod(shape) * p.dtype.itemsize
    return state / total if total else 0.0


def _twin_of(
    optimizer: Any, group: dict[str, Any]
) -> Callable[[int, torch.dtype], list[tuple[list[int], int]]]:
    """A function of a number of dims and a dtype: per tensor of the state of such a parameter, the
    parameter's dims that it has, and its bytes per element."""

    @functools.cache
    def state(ndim: int, dtype: torch.dtype) -> list[tuple[list[int], int]]:
        probe = torch.nn.Parameter(torch.zeros(_PROBE[:ndim], dtype=dtype))
        probe.grad = torch.zeros_like(probe)
        try:
            entries = _stepped(optimizer, group, probe)
        except Exception as error:  # whatever a user's own class may raise
            log.warning(
                "the state of %s is taken to be two numbers per element, as a step on one small "
                "parameter failed: %s", type(optimizer).__name__, error,
            )  # fmt: skip
            entries = dict.fromkeys("ab", probe)
        tensors = [v for v in entries.values() if isinstance(v, torch.Tensor) and v.ndim]
        return [([_PROBE.index(n) for n in v.shape if n > 1], v.element_size()) for v in tensors]

    return state


def _stepped(optimizer: Any, group: dict[str, Any], probe: torch.Tensor) -> Mapping[str, Any]:
    """The state of a parameter after a step of a copy of an optimizer on it."""
    options = {k: v for k, v in group.items() if k in optimizer.defaults}
    groups = [{"params": [probe], **options}]
    try:
        twin = type(optimizer)(groups)
    except TypeError:  # its class needs more than parameters
        twin = object.__new__(type(optimizer))
        twin.__dict__.update(vars(optimizer), param_groups=groups, state=defaultdict(dict))
    with torch.no_grad():
        inspect.unwrap(type(optimizer).step)(twin)
    entries: Mapping[str, Any] = twin.state[probe]
    return entries
