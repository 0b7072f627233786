"""The device of this process, and the clusters that `auto_engine` is given by name."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import torch

from autopar.cluster.cluster import ClusterInfo
from autopar.cluster.device import DEVICES, Device, device
from autopar.errors import MeshError

log = logging.getLogger(__name__)

_UNKNOWN = "A100-40G"  # stands in for GPUs that the table lacks


def local_device() -> Device:
    """The device of this process: its GPU, at the table's speed and with its own memory, or the
    CPU."""
    if not torch.cuda.is_available():
        return device("cpu")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return named_gpu(properties.name, float(properties.total_memory))


def named_gpu(name: str, memory_bytes: float) -> Device:
    """The table's GPU for a driver's name ("NVIDIA A100-SXM4-80GB"). If several have that name, it
    is the one whose memory is nearest; if none has, an older GPU's speed stands in for it."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    gpus = [d for key, d in DEVICES.items() if d.kind == "cuda" and key.split("-")[0] in words]
    if not gpus:
        log.warning(
            "no figures for %r: planning with those of %s; `autopar cluster` measures it",
            name, _UNKNOWN,
        )  # fmt: skip
        return replace(device(_UNKNOWN), name=name, memory_bytes=memory_bytes)
    nearest = min(gpus, key=lambda d: abs(d.memory_bytes - memory_bytes))
    return replace(nearest, memory_bytes=memory_bytes)


def as_cluster(cluster: ClusterInfo | str | Path) -> ClusterInfo:
    """The cluster that `auto_engine` was given: a `ClusterInfo`, the path of a YAML file, or a mesh
    such as `"2x8"` or `"node=2,gpu=8"` of devices like that of this process.

    Raises:
        MeshError: the file does not exist, or the text is not a mesh.
        ValueError: the file does not describe a cluster.
    """
    if isinstance(cluster, ClusterInfo):
        return cluster
    text = str(cluster)
    if text.endswith((".yaml", ".yml")):
        if not Path(text).exists():
            raise MeshError(f"cluster file {text} does not exist; run in its folder or give a mesh")
        return ClusterInfo.load(text)
    return ClusterInfo.of(text, local_device())
