"""State dicts of an optimizer whose state is sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.runtime.distribute import laid_out_like
from autopar.runtime.sharded_values import SavedShard


def handle_state_dicts(optimizer: torch.optim.Optimizer) -> None:
    """Let state dicts hold `SavedShard`s, and take these and whole tensors."""

    def save(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return pytree.tree_map_only(DTensor, SavedShard.of_dtensor, state)

    def load(loaded: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        parameters = [p for group in loaded.param_groups for p in group["params"]]
        entries = {
            k: {name: _as_state(x, parameters[k]) for name, x in entry.items()}
            for k, entry in state["state"].items()
            if k < len(parameters)
        }
        return {**state, "state": {**state["state"], **entries}}

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)


def _as_state(x: Any, p: torch.Tensor) -> Any:
    if isinstance(x, SavedShard):
        return DTensor.__new__(DTensor, x._local_tensor, x._spec, requires_grad=False)
    whole = isinstance(x, torch.Tensor) and not isinstance(x, DTensor)
    return laid_out_like(x, p) if whole and x.ndim and x.shape == p.shape else x
