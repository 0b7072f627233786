"""The process group and device mesh that the engine runs on; started if the user has not."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autopar.cluster.cluster import ClusterInfo
from autopar.comm.groups import forget_groups, register_mesh
from autopar.errors import EngineError, MeshError

DEFAULT_TIMEOUT = timedelta(minutes=5)

# Process groups are threads and sockets: engines on the same mesh share them.
_MESHES: dict[Any, DeviceMesh] = {}
_STAGE_GROUPS: dict[Any, dist.ProcessGroup] = {}


def device_for(cluster: ClusterInfo) -> torch.device:
    """This process's device."""
    if cluster.device.kind == "cuda":
        if not torch.cuda.is_available():
            raise MeshError(
                f"the cluster describes {cluster.device.name} devices but this process sees no "
                "CUDA device; give a mesh string or a ClusterInfo of the 'cpu' device to run here"
            )
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def start(cluster: ClusterInfo, device: torch.device) -> DeviceMesh:
    """The mesh over the running world; starts the process group under torchrun, or for one process.

    Raises:
        MeshError: the mesh does not have as many devices as the world has processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized():
        world = dist.get_world_size()
    if world != cluster.world_size:
        raise MeshError(
            f"mesh {cluster.mesh_text} needs {cluster.world_size} processes but the world has "
            f"{world}; run `torchrun --nproc-per-node {cluster.world_size} ...` or give a mesh of "
            f"{world}"
        )
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if "MASTER_ADDR" in os.environ:
            with _explained_restart():
                dist.init_process_group(backend, timeout=DEFAULT_TIMEOUT)
        else:
            dist.init_process_group(
                backend,
                store=torch._C._distributed_c10d.HashStore(),
                rank=0,
                world_size=1,
                timeout=DEFAULT_TIMEOUT,
            )
    if not _MESHES:
        atexit.register(stop)
    key = (dist.group.WORLD, device.type, cluster.mesh, cluster.axis_names)
    if key not in _MESHES:
        names = cluster.axis_names or tuple(f"axis{i}" for i in range(len(cluster.mesh)))
        _MESHES[key] = init_device_mesh(device.type, cluster.mesh, mesh_dim_names=names)
    return _MESHES[key]


def process_groups(mesh: DeviceMesh) -> tuple[str, ...]:
    """Names of this rank's process groups along the axes of a mesh over all processes."""
    world = dist.group.WORLD
    coords = mesh.get_coordinate()
    assert world is not None
    assert coords is not None, "the mesh is over all processes"
    names = [mesh.get_group(axis).group_name for axis in range(mesh.ndim)]
    return register_mesh(tuple(mesh.shape), tuple(coords), names, world.group_name)


def stage_group(mesh: DeviceMesh, pipe_axis: int) -> dist.ProcessGroup:
    """The group of the ranks of this rank's pipeline stage; all ranks call it."""
    key = "stages", id(mesh), pipe_axis
    if key not in _STAGE_GROUPS:
        mine: Any = None
        for ranks in mesh.mesh.movedim(pipe_axis, 0).flatten(1).tolist():
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                mine = group
        _STAGE_GROUPS[key] = mine
    return _STAGE_GROUPS[key]


@contextmanager
def _explained_restart() -> Iterator[None]:
    """Say why ranks that torchrun has started again do not find each other: its store still has the
    addresses of those that died."""
    try:
        yield
    except RuntimeError as error:
        shared = os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0") != "1"
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not shared:
            raise
        raise EngineError(
            f"the ranks were started again and do not find each other: {error}\n"
            "  torchrun keeps the addresses of the ranks that died; start it as "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --max-restarts ..."
        ) from error


def store() -> Any:
    """The world's key-value store. `_get_default_store` is private to torch; tested with 2.11 and
    2.13."""
    return dist.distributed_c10d._get_default_store()


def stop() -> None:
    """End the process group, and let go of all that holds it: a thread of Gloo's that is still
    there when the interpreter shuts down may abort the process."""
    for mesh in _MESHES.values():
        _forget_process_groups(mesh)
    _MESHES.clear()
    _STAGE_GROUPS.clear()
    forget_groups()
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def _forget_process_groups(mesh: DeviceMesh) -> None:
    """DTensor's caches keep meshes, and a mesh keeps its groups (a field that is private to torch;
    tested with 2.13)."""
    getattr(mesh, "_pg_registry", {}).clear()


# What Gloo's errors say; NCCL's have a type.
_TRANSPORT_ERRORS = ("gloo", "Connection closed by peer", "Connection reset", "Timed out waiting")


class _ExplainedFailures:
    """Of collectives; one object serves all, as every step enters it several times."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, RuntimeError):
            return
        message = str(error)
        if not isinstance(error, dist.DistError) and not any(
            part in message for part in _TRANSPORT_ERRORS
        ):
            return
        raise EngineError(
            f"rank {dist.get_rank()}: a collective failed: {message.splitlines()[0]}\n  Another "
            "rank has died, or runs a different program; look for the first error among the other "
            "ranks' output."
        ) from error


_EXPLAINED = _ExplainedFailures()


def explained_failures() -> AbstractContextManager[None]:
    """Explain a failed collective: nearly always, another rank is gone.

    Raises:
        EngineError: in the place of the transport's own error.
    """
    return _EXPLAINED
