"""Clusters on which sharding pays even for tiny models, so that the solver's plan is a real one."""

from dataclasses import replace

from autopar import ClusterInfo
from autopar.cluster.link import Link


def eager_to_shard(mesh: str, *, overlaps: bool | None = None) -> ClusterInfo:
    """Slow devices and fast links: the solver splits whatever it can.

    Args:
        overlaps: collectives run beside compute, as on GPUs. By default on meshes of several axes,
            and not on others, so that both ways are tried.
    """
    cluster = ClusterInfo.of(mesh, "cpu")
    overlaps = len(cluster.mesh) > 1 if overlaps is None else overlaps
    slow = replace(
        cluster.device, peak_flops={"float32": 1e6, "float64": 1e6}, bandwidth=1e7, launch_us=0.01,
        overlaps=overlaps,
    )  # fmt: skip
    return replace(cluster, device=slow, links=tuple(Link(1e-9, 1e-12) for _ in cluster.mesh))
