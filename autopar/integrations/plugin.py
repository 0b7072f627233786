"""What the integrations share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.cluster.cluster import ClusterInfo
from autopar.cluster.local import as_cluster
from autopar.errors import EngineError
from autopar.runtime.auto_engine import auto_engine
from autopar.runtime.engine import Engine


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
    """A state dict with whole CPU tensors in the place of shards, of which entries of one parameter
    (tied weights) share one. All ranks call this."""
    whole: dict[Any, torch.Tensor] = {}

    def gather(x: DTensor) -> torch.Tensor:
        shard = x.to_local()
        key = shard.untyped_storage()._cdata, shard.storage_offset(), x.shape, x.placements
        if key not in whole:
            whole[key] = x.full_tensor().detach().cpu()
        return whole[key]

    return pytree.tree_map_only(DTensor, gather, state)
