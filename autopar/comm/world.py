"""The process group and device mesh the engine runs on; started where the user has not."""

from __future__ import annotations

import atexit
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autopar.cluster.cluster import ClusterInfo
from autopar.comm import async_result as late
from autopar.comm import groups
from autopar.comm.groups import DEFAULT_TIMEOUT, Group, ProcessGroup
from autopar.errors import MeshError


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
            dist.init_process_group(backend, timeout=DEFAULT_TIMEOUT)
        else:
            dist.init_process_group(
                backend,
                store=torch._C._distributed_c10d.HashStore(),
                rank=0,
                world_size=1,
                timeout=DEFAULT_TIMEOUT,
            )
        atexit.register(stop)
    # process groups are threads and sockets: engines on the same mesh share them
    key = (dist.group.WORLD, device.type, cluster.mesh)
    if key not in _MESHES:
        names = tuple(f"axis{i}" for i in range(len(cluster.mesh)))
        _MESHES[key] = init_device_mesh(device.type, cluster.mesh, mesh_dim_names=names)
    return _MESHES[key]


_MESHES: dict[Any, DeviceMesh] = {}


def process_groups(mesh: DeviceMesh) -> tuple[str, ...]:
    """Groups on the process groups of a `DeviceMesh` over all processes, named after its shape;
    called by all of them. Engines on the same mesh share them."""
    shape = tuple(mesh.shape)
    prefix = f"{mesh.device_type}:{'x'.join(map(str, shape))}"

    def make(name: str, group: dist.ProcessGroup) -> Group:
        known = groups.registered(name)
        if isinstance(known, ProcessGroup) and known.group is group:
            return known
        return ProcessGroup(name, group)

    world = dist.group.WORLD
    assert world is not None
    return groups.axis_groups(
        prefix, shape,
        lambda name, axis: make(name, mesh.get_group(axis)),
        lambda name: make(name, world),
    )  # fmt: skip


def stop() -> None:
    """End the process group, and let go of all that holds it: one that lives on aborts the process
    when the interpreter shuts down."""
    late.finish_at_exit()
    _MESHES.clear()
    groups.forget_groups()
    if dist.is_initialized():
        dist.destroy_process_group()
