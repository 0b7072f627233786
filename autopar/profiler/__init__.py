"""Static costs: what every node computes, moves and saves, and the cluster it runs on."""

from autopar.profiler.cluster import DEVICES, ClusterInfo, Device, Link, as_cluster, parse_bytes
from autopar.profiler.profile import NodeProfile, profile_graph

__all__ = [
    "DEVICES",
    "ClusterInfo",
    "Device",
    "Link",
    "NodeProfile",
    "as_cluster",
    "parse_bytes",
    "profile_graph",
]
