"""Recordings to programs, each made once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from autopar.cluster.cluster import ClusterInfo
from autopar.optim.layout import Layout
from autopar.optim.lazy_tensor import CannotPlan
from autopar.optim.local_program import LocalProgram, local_program
from autopar.optim.recording import Recording
from autopar.optim.step_plan import best_plan

log = logging.getLogger(__name__)

# A step that is another one each time gets no use of them.
_MOST = 64


class Programs:
    """The programs that recordings have become."""

    def __init__(self) -> None:
        self._by_key: dict[Any, LocalProgram] = {}
        self._refused: dict[Any, CannotPlan] = {}

    @property
    def all(self) -> list[LocalProgram]:
        """In the order in which they were made."""
        return list(self._by_key.values())

    def run(
        self, mesh: DeviceMesh, recording: Recording, inputs: Sequence[Any],
        wanted: Sequence[int], whole: frozenset[int],
    ) -> Sequence[tuple[Any, Layout]]:  # fmt: skip
        """Run a recording; the arguments are those of `recorder.Run`.

        Raises:
            CannotPlan: it does not run on shards.
        """
        key = recording.key(), tuple(wanted), whole
        if key in self._refused:
            raise self._refused[key]
        program = self._by_key.get(key)
        if program is None:
            try:
                program = _made(mesh, recording, wanted, whole)
            except CannotPlan as error:
                log.warning("a part of a step runs on DTensors, one by one: %s", error)
                self._refused[key] = error
                raise
            if len(self._by_key) >= _MOST:
                self._by_key.clear()
            self._by_key[key] = program
        return program(inputs, recording.numbers)


def _made(
    mesh: DeviceMesh, recording: Recording, wanted: Sequence[int], whole: frozenset[int]
) -> LocalProgram:
    sizes, coords = tuple(mesh.shape), mesh.get_coordinate()
    assert coords is not None, "the mesh is over all processes"
    # not by this rank's own device: all ranks decide by the same figures
    cluster = ClusterInfo.of(sizes, "cpu" if mesh.device_type == "cpu" else "A100-40G")
    numbers = len(recording.numbers)
    plan = best_plan(recording, wanted, whole, sizes, cluster)
    device = torch.device(mesh.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    return local_program(plan, numbers, sizes, tuple(coords), device)
