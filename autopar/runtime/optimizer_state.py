"""State of optimizers over sharded parameters, and their state dicts.

`register_optimizer_step_pre_hook` is for all optimizers of the process: one that is made after
`auto_engine` is not known to it before it steps.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils import _pytree as pytree

from autopar.comm.dtensor_rules import enter_step, leave_step
from autopar.runtime.adoption import has_state_hooks, train_current_parameters
from autopar.runtime.distribute import sharded_state
from autopar.runtime.gathered_part import steps
from autopar.runtime.recorded_step import record_later_optimizers, record_steps
from autopar.runtime.sharded_values import SavedShard, ShardedParameter
from autopar.runtime.step_on_shards import StepOnShards

_HANDLED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

# Per optimizer its state when it stepped last; loading puts another object in its place.
_STEPPED: weakref.WeakKeyDictionary[torch.optim.Optimizer, Any] = weakref.WeakKeyDictionary()


@functools.cache
def handle_later_optimizers() -> None:
    """Lay the state of optimizers that are made after `auto_engine` out when they step."""
    record_later_optimizers()
    register_optimizer_step_pre_hook(_lay_out_state)
    register_optimizer_step_pre_hook(enter_step)
    register_optimizer_step_post_hook(leave_step)


def _lay_out_state(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    steps.count += 1
    if _STEPPED.get(optimizer) is optimizer.state or not has_state_hooks(optimizer):
        return
    train_current_parameters(optimizer)
    for p, entry in optimizer.state.items():
        if isinstance(p, ShardedParameter):
            entry.update({name: sharded_state(x, p) for name, x in entry.items()})
    if any(isinstance(p, ShardedParameter) for g in optimizer.param_groups for p in g["params"]):
        handle_state_dicts(optimizer)
        StepOnShards.attach(optimizer)
        record_steps(optimizer)
    _STEPPED[optimizer] = optimizer.state


def handle_state_dicts(optimizer: torch.optim.Optimizer) -> None:
    """Let state dicts hold `SavedShard`s, and take these and whole tensors."""
    if optimizer in _HANDLED:
        return
    _HANDLED.add(optimizer)

    def save(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return pytree.tree_map_only(DTensor, SavedShard.of_dtensor, state)

    def load(loaded: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        # by the keys of its groups: numbers, or names (torch.distributed.checkpoint.state_dict)
        keys = [key for group in state["param_groups"] for key in group["params"]]
        parameters = [p for group in loaded.param_groups for p in group["params"]]
        owners = dict(zip(keys, parameters, strict=False))
        entries = {
            key: {name: sharded_state(x, owners[key]) for name, x in entry.items()}
            for key, entry in state["state"].items()
            if key in owners
        }
        return {**state, "state": {**state["state"], **entries}}

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)
