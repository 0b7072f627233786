"""`ClusterInfo`: what a plan is made for: a mesh of devices and its links."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from autopar.cluster.data import check_number, plain
from autopar.cluster.device import Device, device
from autopar.cluster.link import Link
from autopar.cluster.software import Software
from autopar.cluster.tiers import HOST, Tier, check_tiers, off_device_tiers, tier_named
from autopar.errors import MeshError
from autopar.files import read_yaml
from autopar.units import mesh_text

# Inside a node: of the H100, not tested by published rows, of the A100, fitted to half of vTrain,
# and of Blackwell, with the share of the data sheet that the H100 has. Switches of the H100 add up
# 275 GB/s where its rings carry 370 (NVIDIA/nccl-tests, issue 212), here by the same share.
NVLINK = Link(alpha=6e-6, beta=1 / 300e9, switch_beta=1 / 223e9)
NVLINK_3 = Link(alpha=2.5e-6, beta=1 / 230e9)
NVLINK_5 = Link(alpha=6e-6, beta=1 / 650e9, switch_beta=1 / 483e9)
PCIE = Link(alpha=12e-6, beta=1 / 20e9)
# Gloo on one machine.
LOOPBACK = Link(alpha=150e-6, beta=1 / 0.8e9)
# Between nodes: one port of 400 Gb/s per GPU.
INFINIBAND = Link(alpha=15e-6, beta=1 / 40e9)
# Networks by the ports of a node of eight, as one GPU sees its share; that of four ports is fitted
# to half of vTrain-multi, the others have 80 to 85% of their rate.
NETWORKS = {
    "4x200G InfiniBand": Link(alpha=15e-6, beta=1 / 12.25e9),
    "8x200G InfiniBand": Link(alpha=15e-6, beta=1 / 21e9),
    "8x200G RoCE": Link(alpha=15e-6, beta=1 / 21e9),
    "8x400G InfiniBand": INFINIBAND,
    "8x400G RoCE": INFINIBAND,
    "8x400G RDMA": INFINIBAND,
    "8x800G InfiniBand": Link(alpha=15e-6, beta=1 / 80e9),
    # Ethernet with RDMA, and by the operating system's TCP
    "4x100G Ethernet": Link(alpha=25e-6, beta=1 / 5e9),
    "1x100G Ethernet, TCP": Link(alpha=60e-6, beta=1 / 1.25e9),
    "1x25G Ethernet, TCP": Link(alpha=60e-6, beta=1 / 0.31e9),
}

NODE_SIZE = 8

# The name of the mesh axis whose coordinates are pipeline stages.
PIPE = "pipe"

# What a tier of the host says as well.
_OF_HOST = ("host_link", "host_memory_bytes")

# A smaller number without a unit is no number of bytes: the unit was forgotten.
_FEW_BYTES = 1000

# Of a cluster, in bytes.
_SIZES = ("memory_bytes", "host_memory_bytes")


_AXIS = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<size>\d+)")


def parse_mesh(text: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Sizes and names of mesh axes: `"2x4"` to `((2, 4), ())`, `"node=2,gpu=4"` to
    `((2, 4), ("node", "gpu"))`.

    Raises:
        MeshError: the text is not a mesh.
    """
    named = "=" in text
    axes = [_AXIS.fullmatch(part.strip()) for part in re.split("," if named else "[x,]", text)]
    if not all(axis and bool(axis["name"]) == named for axis in axes):
        raise MeshError(
            f"cannot read mesh {text!r}; write sizes joined by x, such as '8' or '2x4', or name "
            "all axes, as in 'node=2,gpu=4'"
        )
    sizes = tuple(int(axis["size"]) for axis in axes if axis)
    if 0 in sizes:
        raise MeshError(
            f"mesh {text!r} has an axis of size 0; every axis needs at least one device"
        )
    return sizes, tuple(axis["name"] for axis in axes if axis) if named else ()


_UNITS = {"": 1, "B": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS |= {f"{k}B": v for k, v in _UNITS.items() if k not in ("", "B")}
_UNITS |= {f"{k}iB": 1024**i for i, k in enumerate("KMGT", start=1)}


def parse_bytes(value: str | float, *, of: float | None = None) -> float:
    """`"40GiB"`, `"512 MB"`, a number of bytes, or a share such as `0.5` of `of`.

    Raises:
        ValueError: not a size, or not positive; or a number above 1 and too small to be of bytes,
            as `40` is. `"40B"` is 40 bytes.
    """
    unit = ""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([A-Za-z]*)\s*", value)
        units = {k.lower(): v for k, v in _UNITS.items()}
        if match is None or match[2].lower() not in units:
            raise ValueError(f"cannot read memory size {value!r}; write '40GiB', '512MB' or '0.5'")
        unit = match[2]
        value = float(match[1]) * units[unit.lower()]
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"memory size must be positive and finite, got {value}")
    if 1 < value < _FEW_BYTES and not unit:
        raise ValueError(
            f"a memory of {value:g} would be {value:g} bytes; did you mean '{value:g}GiB'? Write "
            f"'{value:g}B' for bytes, or a share of the device's memory such as 0.8"
        )
    return value * of if of is not None and value <= 1 and not unit else float(value)


def _inside(dev: Device) -> Link:
    """The link between devices of a node."""
    if dev.name in ("L4", "4090"):
        return PCIE
    if dev.name in ("B200", "GB200", "B300", "GB300"):
        return NVLINK_5
    return NVLINK_3 if dev.name.startswith("A100") else NVLINK


@dataclass(frozen=True)
class ClusterInfo:
    """The devices that a plan is made for.

    Args:
        mesh: size of each mesh axis, outermost (slowest link) first.
        device: the device, the same on every rank.
        links: one network link per mesh axis.
        memory_bytes: budget per device; the device's memory if None.
        host_link: copies between device and host, if they have different memory.
        host_memory_bytes: host memory per device, for what is offloaded.
        axis_names: a name per mesh axis, for reports; empty if the axes have none.
        tiers: memory beyond the device's. That of the host gives `host_link` and
            `host_memory_bytes`.
        software: what the framework adds; nothing if None.
    """

    mesh: tuple[int, ...]
    device: Device
    links: tuple[Link, ...]
    memory_bytes: float | None = None
    host_link: Link | None = None
    host_memory_bytes: float | None = None
    axis_names: tuple[str, ...] = ()
    tiers: tuple[Tier, ...] = ()
    software: Software | None = None

    def __post_init__(self) -> None:
        check_tiers(self.tiers)
        host = tier_named(self.tiers, HOST)
        if host is not None:
            capacity = None if host.capacity is None else host.device_bytes
            object.__setattr__(self, "host_link", host.link)
            object.__setattr__(self, "host_memory_bytes", capacity)
        if len(self.links) != len(self.mesh):
            raise MeshError(
                f"mesh {self.mesh} has {len(self.mesh)} axes but {len(self.links)} links; "
                "give one link per axis"
            )
        for axis, size in enumerate(self.mesh):
            if not isinstance(size, int) or size < 1:
                raise MeshError(
                    f"ClusterInfo: mesh[{axis}] must be a number of devices, got {size!r}"
                )
        names = self.axis_names
        if names and not len(names) == len(set(names)) == len(self.mesh):
            raise MeshError(
                f"mesh {mesh_text(self.mesh)} needs a different name for each of its "
                f"{len(self.mesh)} axes, got {', '.join(names)}"
            )
        links = {f"links[{i}]": link for i, link in enumerate(self.links)}
        links |= {f"{k}.inside": link.inside for k, link in links.items() if link.inside}
        if self.host_link is not None:
            links["host_link"] = self.host_link
        for name, link in links.items():
            check_number(f"ClusterInfo: {name}.alpha", link.alpha, zero=True)
            keys = ["beta", "ports", "node_ranks"]
            keys += [] if link.switch_beta is None else ["switch_beta"]
            for key in keys:
                check_number(f"ClusterInfo: {name}.{key}", getattr(link, key))
        for name in ("host_memory_bytes", "memory_bytes"):
            if getattr(self, name) is not None:
                check_number(f"ClusterInfo: {name}", getattr(self, name))

    @property
    def world_size(self) -> int:
        return math.prod(self.mesh)

    @property
    def budget_bytes(self) -> float:
        return self.device.memory_bytes if self.memory_bytes is None else self.memory_bytes

    @property
    def off_device_tiers(self) -> tuple[Tier, ...]:
        """The tiers that states can be on."""
        return off_device_tiers(self.tiers, self.device.kind, self.world_size)

    @property
    def mesh_text(self) -> str:
        """`2x8`, or `node=2,gpu=8` if the axes have names."""
        return mesh_text(self.mesh, self.axis_names)

    def axis_label(self, axis: int) -> str:
        """`gpu`, or `axis 1` if the axes have no names."""
        return self.axis_names[axis] if self.axis_names else f"axis {axis}"

    @property
    def pipe_axis(self) -> int | None:
        """The axis of pipeline stages, by its name; None if there is none."""
        return self.axis_names.index(PIPE) if PIPE in self.axis_names else None

    @property
    def pipeline_ranks(self) -> int:
        """How many ranks a pipeline has: 1 without one."""
        return 1 if self.pipe_axis is None else self.mesh[self.pipe_axis]

    def of_a_stage(self) -> ClusterInfo:
        """The cluster of one stage: one rank on the axis of stages."""
        sizes = (1 if axis == self.pipe_axis else n for axis, n in enumerate(self.mesh))
        return replace(self, mesh=tuple(sizes))

    def with_stages(self, ranks: int) -> ClusterInfo:
        """The cluster of all stages, from that of one."""
        sizes = (ranks if axis == self.pipe_axis else n for axis, n in enumerate(self.mesh))
        return replace(self, mesh=tuple(sizes))

    @property
    def axes_text(self) -> str:
        """The numbers of axes in layouts: `0=node, 1=gpu`; empty if the axes have no names."""
        return ", ".join(f"{axis}={name}" for axis, name in enumerate(self.axis_names))

    def coords(self, rank: int) -> tuple[int, ...]:
        """Mesh coordinates of a rank (row-major, as `init_device_mesh` lays ranks out)."""
        coords = []
        for size in reversed(self.mesh):
            rank, index = divmod(rank, size)
            coords.append(index)
        return tuple(reversed(coords))

    def with_memory(self, memory: str | float | None) -> ClusterInfo:
        """The same cluster with another budget per device (`"40GiB"`, bytes, or a share <= 1)."""
        if memory is None:
            return self
        return replace(self, memory_bytes=parse_bytes(memory, of=self.device.memory_bytes))

    @staticmethod
    def of(
        mesh: str | Sequence[int],
        device_name: str | Device = "cpu",
        *,
        node_size: int = NODE_SIZE,
        network: Link | None = None,
        software: Software | None = None,
    ) -> ClusterInfo:
        """A cluster of one kind of device with the usual links.

        The innermost axes that fit into one node use NVLink (PCIe for L4 and 4090, loopback for
        CPUs), the others InfiniBand. Every device of a node has a port; an axis that has several
        ranks in each node uses their ports together, up to the rate of NVLink.

        Args:
            mesh: sizes, or text such as `"2x8"` or `"node=2,gpu=8"`.
            device_name: a device, or the name of one in `DEVICES`.
            node_size: devices per node.
            network: of a port between nodes; InfiniBand of 400 Gb/s if None.
            software: what the framework adds; the device is as its kernels find it.
        """
        shape, names = parse_mesh(mesh) if isinstance(mesh, str) else (tuple(mesh), ())
        dev = device(device_name) if isinstance(device_name, str) else device_name
        dev = dev if software is None else software.on(dev)
        links: list[Link] = []
        span = 1
        inside = _inside(dev)
        outside = network or INFINIBAND
        for size in reversed(shape):
            together = min(size, max(1, node_size // span))
            span *= size
            if dev.kind == "cpu":
                links.append(LOOPBACK)
            elif span > node_size:
                ports = max(1.0, min(float(together), outside.beta / inside.beta))
                within = inside if together > 1 else None
                links.append(replace(outside, ports=ports, node_ranks=together, inside=within))
            else:
                links.append(inside)
        return ClusterInfo(shape, dev, tuple(reversed(links)), axis_names=names, software=software)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without fields that have their default. A mesh with names is text."""
        data = plain(replace(self, axis_names=()))
        if tier_named(self.tiers, HOST) is not None:
            data = {k: v for k, v in data.items() if k not in _OF_HOST}
        for key in _SIZES:  # a number as small as this would be read as a slip
            if (value := data.get(key)) is not None and value < _FEW_BYTES:
                data[key] = f"{value:g}B"
        return data | {"mesh": self.mesh_text} if self.axis_names else data

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ClusterInfo:
        """Inverse of `to_dict`. `device` may be a name, and links that are missing are the usual
        ones.

        Raises:
            ValueError: a key is missing or unknown, or a value is not legal.
        """
        known = {f.name for f in fields(ClusterInfo)} - {"axis_names"}
        unknown, missing = set(data) - known, {"mesh", "device"} - set(data)
        if unknown or missing:
            raise ValueError(
                f"ClusterInfo: unknown keys {sorted(unknown)}, missing {sorted(missing)}; "
                f"it takes {sorted(known)}"
            )
        mesh, dev = data["mesh"], data["device"]
        usual = ClusterInfo.of(
            str(mesh) if isinstance(mesh, int | str) else tuple(int(size) for size in mesh),
            dev if isinstance(dev, str) else Device.from_dict(dev),
        )
        items = enumerate(data.get("links") or ())
        links = [Link.from_dict(f"links[{i}]", link) for i, link in items]
        memory: dict[str, Any] = {
            key: parse_bytes(data[key]) for key in _SIZES if data.get(key) is not None
        }
        host = data.get("host_link")
        host_link = None if host is None else Link.from_dict("host_link", host)
        rows = enumerate(data.get("tiers") or ())
        tiers = tuple(Tier.from_dict(f"tiers[{i}]", row, parse_bytes) for i, row in rows)
        if tier_named(tiers, HOST) is not None and not data.keys().isdisjoint(_OF_HOST):
            raise ValueError(
                f"ClusterInfo: a tier {HOST!r} has the link and the capacity of the host; leave "
                f"{' and '.join(_OF_HOST)} out"
            )
        software = data.get("software")
        return replace(
            usual, links=tuple(links) or usual.links, host_link=host_link, tiers=tiers,
            software=None if software is None else Software.from_dict(software), **memory,
        )  # fmt: skip

    @staticmethod
    def load(path: str | Path) -> ClusterInfo:
        """Read a YAML file that `to_yaml` wrote.

        Raises:
            OSError: it cannot be read.
            ValueError: it does not describe a cluster.
        """
        data = read_yaml(path)
        if not isinstance(data, Mapping):
            raise ValueError(f"{path}: expected a mapping with mesh, device and links")
        try:
            return ClusterInfo.from_dict(data)
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path} does not describe a cluster: {error}") from error

    def to_yaml(self) -> str:
        """The text that `load` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=100)
