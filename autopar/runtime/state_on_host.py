"""An optimizer whose state is on the host while the model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor


class StateOnHost:
    """Moves the state of an optimizer to the host, and back for its step and its `state_dict`.

    The tensors stay the same objects; their storages are emptied meanwhile, so that whoever holds
    them finds them filled again after `back`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._away: list[tuple[torch.Tensor, torch.Tensor]] = []  # the bytes here, and there
        self._stepping = False
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_state_dict_pre_hook(lambda _: self.back())
        optimizer.register_load_state_dict_pre_hook(lambda *_: self.back())

    def leave(self) -> None:
        """Empty the state on the device; what it holds is on the host. Not amid a step, whose
        closure may run the model."""
        if self._away or self._stepping:
            return
        for entries in self._optimizer.state.values():
            for value in entries.values():
                if isinstance(value, torch.Tensor) and value.ndim:
                    self._leave(value.to_local() if isinstance(value, DTensor) else value)

    def _leave(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        here = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        there = torch.empty(len(here), dtype=torch.uint8, pin_memory=tensor.is_cuda)
        there.copy_(here)
        storage.resize_(0)
        self._away.append((here, there))

    def back(self) -> None:
        """Fill the state again."""
        for here, there in self._away:
            here.untyped_storage().resize_(len(there))
            here.copy_(there, non_blocking=True)
        self._away.clear()

    def _before_step(self, *_: Any) -> None:
        self._stepping = True
        self.back()

    def _after_step(self, *_: Any) -> None:
        self._stepping = False
