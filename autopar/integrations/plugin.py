"""What the integrations share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from autopar.cluster.cluster import ClusterInfo
from autopar.cluster.local import as_cluster
from autopar.errors import EngineError
from autopar.runtime.auto_engine import auto_engine
from autopar.runtime.engine import Engine
from autopar.runtime.full_state import gather_state


@dataclass
class AutoparPlugin:
    """How models are distributed.

    Args:
        cluster: a mesh such as "2x2", a `ClusterInfo`, or the path of its YAML.
        options: of `auto_engine`, such as `{"memory": "40GiB"}`.
    """

    cluster: ClusterInfo | str | Path
    options: Mapping[str, Any] = field(default_factory=dict)

    def engine(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> Engine:
        """The engine of a model."""
        options = {"batch": "local", **self.options}
        engine, _ = auto_engine(model, optimizer, self.cluster, **options)
        assert isinstance(engine, Engine)
        return engine

    def check_processes(self, count: int) -> None:
        """Refuse a library that has started another number of processes than the mesh needs.

        Raises:
            EngineError: it has.
        """
        cluster = as_cluster(self.cluster)
        if count != cluster.world_size:
            raise EngineError(
                f"the mesh {cluster.mesh} needs {cluster.world_size} processes, and there are "
                f"{count}; start the script by torchrun --nproc-per-node={cluster.world_size}, or "
                "give another mesh"
            )


RANDOM_STATES = "autopar_random.pt"


def save_random_states(models: Sequence[torch.nn.Module], folder: str | Path) -> None:
    """Write the states from which engines draw (dropout), on rank 0."""
    if dist.get_rank() == 0:
        states = [m.get_random_state() for m in models if isinstance(m, Engine)]
        torch.save(states, Path(folder) / RANDOM_STATES)


def load_random_states(models: Sequence[torch.nn.Module], folder: str | Path) -> None:
    """Let engines draw from the states in a folder on. A checkpoint of one process has none."""
    file = Path(folder) / RANDOM_STATES
    if file.exists():
        engines = [m for m in models if isinstance(m, Engine)]
        for engine, state in zip(engines, torch.load(file, weights_only=True), strict=True):
            engine.set_random_state(state)


def whole_tensors(state: Any) -> Any:
    """A state dict as one process would save it, on all ranks. All ranks call this."""
    return gather_state(state, rank0_only=False, offload_to_cpu=True)
