"""Runs a recording that shards cannot run: its operators on DTensors, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autopar.errors import EngineError
from autopar.optim.inputs import is_known, whole_of
from autopar.optim.layout import Layout
from autopar.optim.lazy_tensor import CannotPlan, LazyTensor
from autopar.optim.recording import Recording, Ref, Slot, filled, traits, written_values


def run_on_dtensors(
    mesh: DeviceMesh,
    recording: Recording,
    tensors: Sequence[torch.Tensor],
    wanted: Sequence[int],
    whole: Sequence[int],
    error: CannotPlan,
) -> list[tuple[Any, Layout]]:
    """The results of a recording's operators, by DTensors.

    Raises:
        EngineError: views of sharded tensors would lose what is written to them.
    """
    written = {recording.roots[n] for c in recording.calls for n in written_values(c)}
    views = {recording.roots[n] for c in recording.calls if traits(c.op).view for n in c.results}
    if written & views:
        raise EngineError(
            f"this optimizer's step cannot run on shards: {error}, and writes a view. Compute "
            "the whole result and write it by p.copy_(...)"
        ) from error
    values: dict[int, Any] = {}
    for number, x in zip(recording.inputs, tensors, strict=True):
        values[number] = x.as_dtensor() if isinstance(x, LazyTensor) else x

    def fill(place: Any) -> Any:
        if type(place) is Ref:
            return values[place.number]
        if type(place) is Slot:
            return recording.numbers[place.number]
        return whole_of(values[place.number]).item()

    for call in recording.calls:
        made = call.op(*filled(call.args, fill), **{k: filled(v, fill) for k, v in call.kwargs})
        results = made if isinstance(made, list | tuple) else [made]
        values.update(zip(call.results, results, strict=False))
    return [_given(mesh, values[n], n in whole) for n in wanted]


def _given(mesh: DeviceMesh, x: torch.Tensor, whole: bool) -> tuple[torch.Tensor, Layout]:
    """A result's shard; whole if a rank needs that, or if layouts do not have it."""
    if isinstance(x, DTensor) and not whole and x.ndim:
        known = all(is_known(p) and not p.is_partial() for p in x.placements)
        if known and x.device_mesh == mesh:
            return x._local_tensor, Layout.of_placements(x.placements, x.ndim)
    return whole_of(x), Layout.replicated(x.ndim)
