"""Clipping of gradients by the norm of all of them, in one all-reduce."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autopar.optim.lazy_tensor import LazyTensor
from autopar.optim.programs import Programs
from autopar.optim.recorder import Recorder

# Per mesh; a mesh is kept by its process groups anyway.
_RECORDERS: dict[int, Recorder] = {}


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> torch.Tensor:
    """As `torch.nn.utils.clip_grad_norm_`, with all norms in one all-reduce; all ranks call it.

    Returns:
        the norm before, a plain scalar that all ranks have.

    Raises:
        RuntimeError: the norm is not finite, and that is to be an error.
    """
    given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    grads = [p.grad for p in given if p.grad is not None]
    mesh: Any = next((g.device_mesh for g in grads if isinstance(g, DTensor)), None)
    clip = functools.partial(
        torch.nn.utils.clip_grad_norm_, given, max_norm, norm_type, error_if_nonfinite
    )
    if mesh is None or mesh.get_coordinate() is None:
        return clip()
    recorder = _RECORDERS.get(id(mesh))
    if recorder is None or recorder.mesh is not mesh:
        recorder = _RECORDERS[id(mesh)] = Recorder(mesh, functools.partial(Programs().run, mesh))
    with recorder:
        total = clip(foreach=True)
    recorder.flush()
    recorder.given.clear()
    if not isinstance(total, LazyTensor):
        return total.full_tensor() if isinstance(total, DTensor) else total
    assert total.shard is not None
    local = total.shard[0]
    assert local is not None, "all ranks have a scalar that is given out"
    return local
