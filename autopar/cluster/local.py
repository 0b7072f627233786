"""The device of this process, and the clusters that `auto_engine` is given by name."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import torch

from autopar.cluster.cluster import DEVICES, ClusterInfo, Device, device
from autopar.errors import MeshError

log = logging.getLogger(__name__)

_UNKNOWN = "A100-40G"  # whose arithmetic stands for that of GPUs which the table does not have


def local_device() -> Device:
    """What a process here runs on: its GPU, with the figures of the table and the memory that it
    has, or else the CPU."""
    if not torch.cuda.is_available():
        return device("cpu")
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return named_gpu(found.name, float(found.total_memory))


def named_gpu(name: str, memory_bytes: float) -> Device:
    """The table's GPU that the driver calls so ("NVIDIA A100-SXM4-80GB"); of those of one name, the
    one whose memory is nearest."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    alike = [d for key, d in DEVICES.items() if d.kind == "cuda" and key.split("-")[0] in words]
    if not alike:
        log.warning(
            "no figures for %r: planning with those of %s; `autopar cluster` measures it",
            name, _UNKNOWN,
        )  # fmt: skip
        return replace(device(_UNKNOWN), name=name, memory_bytes=memory_bytes)
    nearest = min(alike, key=lambda d: abs(d.memory_bytes - memory_bytes))
    return replace(nearest, memory_bytes=memory_bytes)


def as_cluster(cluster: ClusterInfo | str | Path) -> ClusterInfo:
    """What `auto_engine` accepts: a `ClusterInfo`, the path of its YAML, or a mesh string, which is
    of devices such as this process has."""
    if isinstance(cluster, ClusterInfo):
        return cluster
    text = str(cluster)
    if text.endswith((".yaml", ".yml")):
        if not Path(text).exists():
            raise MeshError(f"cluster file {text} does not exist; run in its folder or give a mesh")
        return ClusterInfo.load(text)
    return ClusterInfo.of(text, local_device())
