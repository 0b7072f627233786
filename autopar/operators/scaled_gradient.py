"""A gradient that was computed ahead, for 1, times what the backward brings.

Where nothing else holds it, it is scaled in place: the gradient of a head's weight is as large as
the weight. It is held elsewhere if the backward may run again (`retain_graph=True`).

Private to torch here: `_use_count` of tensors and `_storage_Use_Count`, as CUDA graph trees use it.
Tested with 2.11 and 2.13.
"""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("autopar", "FRAGMENT")
_LIBRARY.define("scaled_gradient(Tensor gradient, Tensor factor) -> Tensor")

# Holders of a tensor and of its storage while an operator runs on it, if there are no others than
# the caller, and the objects that are asked.
_HOLDERS = 2


def _scaled(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """
    Args:
        gradient: of any shape.
        factor: []
    """
    storage = gradient.untyped_storage()
    shared = torch._C._storage_Use_Count(storage._cdata) > _HOLDERS
    if shared or gradient._use_count() > _HOLDERS:  # type: ignore[attr-defined]
        return gradient * factor
    return gradient.mul_(factor)


def _fake(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(gradient)


for key in ("CPU", "CUDA"):
    _LIBRARY.impl("scaled_gradient", _scaled, key)
torch.library.register_fake("autopar::scaled_gradient", _fake, lib=_LIBRARY)

scaled_gradient = torch.ops.autopar.scaled_gradient.default
