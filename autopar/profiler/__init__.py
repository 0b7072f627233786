"""Static costs: what every node computes, moves and saves, and the cluster it runs on."""

from autopar.profiler.cluster import DEVICES, ClusterInfo, Device, Link, parse_bytes
from autopar.profiler.local import as_cluster, local_device
from autopar.profiler.model import ModelProfile, largest, profile_model, substitute
from autopar.profiler.profile import NodeProfile, profile_graph

__all__ = [
    "DEVICES",
    "ClusterInfo",
    "Device",
    "Link",
    "ModelProfile",
    "NodeProfile",
    "as_cluster",
    "largest",
    "local_device",
    "parse_bytes",
    "profile_graph",
    "profile_model",
    "substitute",
]
