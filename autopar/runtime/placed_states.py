"""Puts training states where a plan has them: on the host, and the optimizer's on a drive."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from autopar.cluster.cluster import ClusterInfo
from autopar.cluster.tiers import NVME, on_this_host, process_directory, tier_named
from autopar.comm.ranks import Ranks
from autopar.errors import EngineError
from autopar.optim.elementwise import ELEMENTWISE
from autopar.runtime.chunk_files import ChunkFiles, Version
from autopar.runtime.sharded_values import ShardedGradient, ShardedParameter
from autopar.runtime.step_on_shards import StepOnShards


def looked_at(cluster: ClusterInfo, rank: int, ranks: Ranks, *, resume: bool) -> ClusterInfo:
    """The cluster with the drive of this host as it is.

    Args:
        resume: a run goes on from the states on it.

    Raises:
        MeshError: on all ranks, if the drive of one cannot be used.
        EngineError: the drive has states of another run, which is not resumed.
    """
    drive = tier_named(cluster.tiers, NVME)
    if drive is None:
        if resume:
            raise EngineError(
                f"resume=True goes on from states on a drive, and the cluster has no tier {NVME!r}"
            )
        return cluster

    def look() -> ClusterInfo:
        seen = on_this_host(drive)
        directory = process_directory(seen, rank)
        done = max(ChunkFiles(directory).versions, default=0)
        if done and not resume:
            raise EngineError(
                f"{directory} has the states of a run after step {done}; pass resume=True to "
                "auto_engine to go on from them, or remove them"
            )
        return replace(cluster, tiers=tuple(seen if t is drive else t for t in cluster.tiers))

    return ranks.together(look)


def resumed_steps(cluster: ClusterInfo, rank: int, ranks: Ranks) -> int:
    """Steps of the states from which a run goes on; 0 if there are none.

    Raises:
        EngineError: on all ranks: the ranks have no version in common.
    """
    drive = tier_named(cluster.tiers, NVME)
    assert drive is not None, "it was looked at"
    version = _common(ChunkFiles(process_directory(drive, rank)), ranks)
    return 0 if version is None else version.steps


def place_states(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, states_on: str,
    cluster: ClusterInfo, rank: int, ranks: Ranks, *, resume: bool, room_bytes: float = 0.0,
) -> None:  # fmt: skip
    """Let an optimizer step where the states are.

    Args:
        room_bytes: of the host, for second versions of chunks that are stepped beside the backward.

    Raises:
        EngineError: on all ranks: there is nothing to resume, or it is of other parameters.
    """
    names: dict[torch.Tensor, str] = {}
    files, version = None, None
    if states_on == NVME:
        drive = tier_named(cluster.tiers, NVME)
        assert drive is not None, "the plan is of this cluster"
        files = ranks.together(lambda: _owned(process_directory(drive, rank)))
        version = _common(files, ranks) if resume else None
    elif resume:
        raise EngineError(
            f"resume=True goes on from states on a drive, and this plan has them on the "
            f"{states_on or 'device'}; leave it out"
        )
    if states_on:
        _move_to_host(model)
        names = {p: name for name, p in model.named_parameters()}
        if type(optimizer) in ELEMENTWISE:
            stepped = StepOnShards.of(optimizer)
            ranks.together(lambda: stepped.run_on_host(names, files, version, room_bytes))


def _owned(directory: Path) -> ChunkFiles:
    files = ChunkFiles(directory)
    files.own()
    return files


@torch.no_grad()
def _move_to_host(model: torch.nn.Module) -> None:
    """Let parameters be on the host, in memory that a GPU reads at the speed of its link."""
    for p in model.parameters():
        if isinstance(p, ShardedParameter) and p.device.type != "cpu":
            shard = p._local_tensor
            host = torch.empty_strided(
                shard.size(), shard.stride(), dtype=shard.dtype, pin_memory=True
            ).copy_(shard)
            grad, p.grad = p.grad, None
            p.lay_out(ShardedParameter.of(host, p._spec))
            if grad is not None:
                p.grad = ShardedGradient.of(grad._local_tensor.cpu(), grad._spec)


def _common(files: ChunkFiles, ranks: Ranks) -> Version | None:
    """The last version that all ranks have; None if no rank has made a step.

    Raises:
        EngineError: there is none.
    """
    of_all = [sorted(map(int, steps)) for steps in ranks.of_all(sorted(files.versions))]
    if not any(max(steps, default=0) for steps in of_all):
        return None
    common = set.intersection(*map(set, of_all))
    if not common:
        raise EngineError(
            f"the ranks have no version of their states in common: they are after steps {of_all}; "
            "begin anew, in another directory"
        )
    return files.versions[max(common)]
