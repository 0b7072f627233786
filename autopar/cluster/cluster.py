"""`ClusterInfo`: what the plan is made for: mesh shape, device model, links.

A new device is one row of `DEVICES`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from autopar.cluster.curve import Curve
from autopar.cluster.link import Link as Link
from autopar.errors import MeshError

GiB = 2**30

# Arithmetic that libraries do, and what else can take longer than moving the bytes.
LIBRARIES = ("matmul", "unaligned", "convolution", "depthwise", "attention")
EXTRAS = ("function", "random", "reduction", "variance", "index", "strided", "scalar")


def check_number(key: str, value: Any, *, zero: bool = False) -> None:
    """Raises ValueError, with the key, where a cost is no number that a cost can be."""
    if isinstance(value, bool) or not isinstance(value, Real):
        hint = "; YAML reads 6e-6 as text, write 6.0e-6" if isinstance(value, str) else ""
        raise ValueError(f"{key} must be a number, got {value!r}{hint}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        wanted = "zero or positive" if zero else "positive"
        raise ValueError(f"{key} must be {wanted} and finite, got {value}")


def _curve(key: str, points: Any) -> Curve:
    try:
        return Curve.of(points)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


@dataclass(frozen=True)
class Device:
    """What one device can do.

    The last three are measured by `autopar cluster`; where they are missing, arithmetic runs at
    `peak_flops` and bytes move at `bandwidth`, whatever the size.

    Args:
        name: as printed in reports.
        kind: torch device type, `"cuda"` or `"cpu"`.
        peak_flops: achievable FLOP/s by dtype name (`"float32"`, `"bfloat16"`, ...).
        memory_bytes: device memory.
        bandwidth: device memory bandwidth, bytes/s.
        launch_us: overhead of one operator, microseconds; on a GPU, which is launched for while it
            computes, the least that one takes.
        flops_by_size: FLOP/s of one kernel by its FLOPs; keys are a library and a dtype, such as
            `"matmul.float32"` or `"convolution.float32"`; `"unaligned"` are matrix products with
            rows that do not begin at multiples of 16 bytes.
        bytes_by_size: bytes/s of one kernel by its bytes; keys are `"read"` and `"write"`.
        extra_ns: nanoseconds that an element costs beyond being read and written, by what is done
            to it: an elementary `function`, a `random` draw, a `reduction` along the way, the
            `variance` across rows, a look-up by `index`, a `strided` read, or a `scalar`
            instruction of its own (a comparison).
        overlaps: collectives and copies run beside compute; if None, on GPUs alone, as what
            CPUs communicate by takes their cores, and their memory is the host's own.
    """

    name: str
    kind: str
    peak_flops: Mapping[str, float]
    memory_bytes: float
    bandwidth: float
    launch_us: float
    flops_by_size: Mapping[str, Curve] = field(default_factory=dict)
    bytes_by_size: Mapping[str, Curve] = field(default_factory=dict)
    extra_ns: Mapping[str, float] = field(default_factory=dict)
    overlaps: bool | None = None

    def __post_init__(self) -> None:
        what = f"device {self.name}: "
        for key, rate in self.peak_flops.items():
            check_number(f"{what}peak_flops[{key}]", rate)
        if "float32" not in self.peak_flops:
            raise ValueError(f"{what}peak_flops lacks float32, the rate of what is not listed")
        check_number(f"{what}memory_bytes", self.memory_bytes)
        check_number(f"{what}bandwidth", self.bandwidth)
        check_number(f"{what}launch_us", self.launch_us, zero=True)
        for key, ns in self.extra_ns.items():
            check_number(f"{what}extra_ns[{key}]", ns, zero=True)
        libraries = {key.split(".")[0] for key in self.flops_by_size}
        for which, given, known in (
            ("flops_by_size", libraries, LIBRARIES),
            ("bytes_by_size", self.bytes_by_size, ("read", "write")),
            ("extra_ns", self.extra_ns, EXTRAS),
        ):
            if not set(given) <= set(known):
                raise ValueError(
                    f"{what}{which} has {sorted(set(given) - set(known))}; "
                    f"it takes {', '.join(known)}"
                )

    @property
    def runs_beside(self) -> bool:
        """Whether collectives and copies run beside compute."""
        return self.kind != "cpu" if self.overlaps is None else self.overlaps

    def flops_per_s(self, dtype: str) -> float:
        """Peak for a dtype; one that is not listed runs at the float32 rate."""
        return self.peak_flops.get(dtype, self.peak_flops["float32"])

    @property
    def measured(self) -> bool:
        """Whether anything is known beyond the peaks."""
        return bool(self.flops_by_size or self.bytes_by_size or self.extra_ns)

    def flops_curve(self, library: str, dtype: str) -> Curve:
        """FLOP/s by FLOPs of a kernel; matrix products stand in for what was not measured."""
        found = self.flops_by_size.get(f"{library}.{dtype}")
        found = found or self.flops_by_size.get(f"matmul.{dtype}")
        return found or Curve.constant(self.flops_per_s(dtype))

    def bytes_curve(self, direction: str) -> Curve:
        """Bytes/s by bytes that a kernel moves in a direction, `"read"` or `"write"`."""
        return self.bytes_by_size.get(direction) or Curve.constant(self.bandwidth)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what was not measured is left out."""
        data: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        data["peak_flops"], data["extra_ns"] = dict(self.peak_flops), dict(self.extra_ns)
        for key in ("flops_by_size", "bytes_by_size"):
            data[key] = {name: curve.to_list() for name, curve in data[key].items()}
        optional = ("flops_by_size", "bytes_by_size", "extra_ns")
        return {k: v for k, v in data.items() if v is not None and (v or k not in optional)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Device:
        """Inverse of `to_dict`.

        Raises:
            TypeError: a key is missing or unknown.
            ValueError: a curve is not one.
        """
        given = dict(data)
        for key in ("flops_by_size", "bytes_by_size"):
            if key in given:
                given[key] = {
                    name: _curve(f"device {given.get('name')}: {key}[{name}]", points)
                    for name, points in given[key].items()
                }
        return Device(**given)


def _gpu(name: str, gib: float, bandwidth: float, fp32: float, tf: float, fp64: float) -> Device:
    """Vendor peaks, derated to 70%: what large matrix products reach in practice."""
    peak = {"float64": fp64, "float32": fp32, "bfloat16": tf, "float16": tf}
    return Device(
        name, "cuda", {k: 0.7e12 * v for k, v in peak.items()}, gib * GiB, 0.8 * bandwidth, 4.0
    )


# Public data sheets, dense: memory GiB, bandwidth B/s, TFLOP/s in fp32 (TF32 off), bf16, fp64.
DEVICES: dict[str, Device] = {
    d.name.lower(): d
    for d in (
        _gpu("A100-40G", 40, 1.555e12, 19.5, 312, 19.5),
        _gpu("A100-80G", 80, 2.039e12, 19.5, 312, 19.5),
        _gpu("H100", 80, 3.35e12, 67, 989, 67),
        _gpu("H200", 141, 4.8e12, 67, 989, 67),
        _gpu("B200", 180, 8.0e12, 80, 2250, 40),
        _gpu("L4", 24, 0.3e12, 30.3, 121, 0.47),
        _gpu("4090", 24, 1.008e12, 82.6, 165, 1.29),
        # One core of a server CPU, as a Gloo rank with one thread sees it.
        Device("cpu", "cpu", {"float32": 5e10, "float64": 2.5e10}, 6 * GiB, 8e9, 5.0),
    )
}


def device(name: str) -> Device:
    """Look a device up in the table.

    Raises:
        ValueError: no such device; the message names the nearest.
    """
    found = DEVICES.get(name.lower())
    if found is None:
        near = get_close_matches(name.lower(), DEVICES, n=1, cutoff=0.3)
        hint = f"; did you mean {DEVICES[near[0]].name}?" if near else ""
        known = ", ".join(d.name for d in DEVICES.values())
        raise ValueError(f"unknown device {name!r}{hint} Known: {known}")
    return found


# Inside a node (NVLink), between nodes (one 400 Gb/s port per GPU), and Gloo over loopback.
NVLINK = Link(alpha=6e-6, beta=1 / 300e9)
INFINIBAND = Link(alpha=15e-6, beta=1 / 40e9)
PCIE = Link(alpha=12e-6, beta=1 / 20e9)
LOOPBACK = Link(alpha=150e-6, beta=1 / 0.8e9)

NODE_SIZE = 8


def parse_mesh(text: str) -> tuple[int, ...]:
    """`"2x4"` to `(2, 4)`.

    Raises:
        MeshError: not a mesh.
    """
    if not re.fullmatch(r"\d+([x,]\d+)*", text.strip()):
        raise MeshError(f"cannot read mesh {text!r}; write sizes joined by x, such as '8' or '2x4'")
    shape = tuple(int(part) for part in re.split("[x,]", text.strip()))
    if 0 in shape:
        raise MeshError(
            f"mesh {text!r} has an axis of size 0; every axis needs at least one device"
        )
    return shape


_UNITS = {"": 1, "B": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS |= {f"{k}B": v for k, v in _UNITS.items() if k not in ("", "B")}
_UNITS |= {f"{k}iB": 1024**i for i, k in enumerate("KMGT", start=1)}


def parse_bytes(value: str | float, *, of: float | None = None) -> float:
    """`"40GiB"`, `"512 MB"`, a number of bytes, or a share such as `0.5` of `of`.

    Raises:
        ValueError: not a size, or not positive.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([A-Za-z]*)\s*", value)
        units = {k.lower(): v for k, v in _UNITS.items()}
        if match is None or match[2].lower() not in units:
            raise ValueError(f"cannot read memory size {value!r}; write '40GiB', '512MB' or '0.5'")
        value = float(match[1]) * units[match[2].lower()]
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"memory size must be positive and finite, got {value}")
    return value * of if of is not None and value <= 1 else float(value)


@dataclass(frozen=True)
class ClusterInfo:
    """The devices a plan is made for.

    Args:
        mesh: size of each mesh axis, outermost (slowest link) first.
        device: the device model, alike on every rank.
        links: one `Link` per mesh axis.
        memory_bytes: budget per device; the device's memory where None.
        host_link: copies between device and host, where they have different memory.
        host_memory_bytes: host memory per device, for what is offloaded.
    """

    mesh: tuple[int, ...]
    device: Device
    links: tuple[Link, ...]
    memory_bytes: float | None = field(default=None)
    host_link: Link | None = None
    host_memory_bytes: float | None = None

    def __post_init__(self) -> None:
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
        links = {f"links[{i}]": link for i, link in enumerate(self.links)}
        if self.host_link is not None:
            links["host_link"] = self.host_link
        for name, link in links.items():
            check_number(f"ClusterInfo: {name}.alpha", link.alpha, zero=True)
            check_number(f"ClusterInfo: {name}.beta", link.beta)
            check_number(f"ClusterInfo: {name}.ports", link.ports)
        if self.host_memory_bytes is not None:
            check_number("ClusterInfo: host_memory_bytes", self.host_memory_bytes)
        if self.memory_bytes is not None:
            check_number("ClusterInfo: memory_bytes", self.memory_bytes)

    @property
    def world_size(self) -> int:
        return math.prod(self.mesh)

    @property
    def budget_bytes(self) -> float:
        return self.device.memory_bytes if self.memory_bytes is None else self.memory_bytes

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
    ) -> ClusterInfo:
        """A cluster of a table device with customary links: the innermost axes that fit into one
        node are NVLink (PCIe for L4 and 4090, loopback for CPUs), the others InfiniBand. An axis
        that has several ranks in each node has their ports, up to what NVLink feeds."""
        shape = parse_mesh(mesh) if isinstance(mesh, str) else tuple(mesh)
        dev = device(device_name) if isinstance(device_name, str) else device_name
        links: list[Link] = []
        span = 1
        inside = PCIE if dev.name in ("L4", "4090") else NVLINK
        for size in reversed(shape):
            together = min(size, max(1, node_size // span))
            span *= size
            if dev.kind == "cpu":
                links.append(LOOPBACK)
            elif span > node_size:
                ports = max(1.0, min(float(together), INFINIBAND.beta / inside.beta))
                links.append(replace(INFINIBAND, ports=ports))
            else:
                links.append(inside)
        return ClusterInfo(shape, dev, tuple(reversed(links)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; a host that was not measured is left out."""
        host = {
            "host_link": None if self.host_link is None else self.host_link.to_dict(),
            "host_memory_bytes": self.host_memory_bytes,
        }
        return {
            "mesh": list(self.mesh),
            "device": self.device.to_dict(),
            "links": [link.to_dict() for link in self.links],
            "memory_bytes": self.memory_bytes,
            **{key: value for key, value in host.items() if value is not None},
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ClusterInfo:
        """Inverse of `to_dict`; `device` may also be the name of a table entry.

        Raises:
            ValueError: a key is missing or unknown.
        """
        known = {f.name for f in fields(ClusterInfo)}
        unknown = set(data) - known
        if unknown or not {"mesh", "device"} <= set(data):
            raise ValueError(
                f"ClusterInfo: unknown keys {sorted(unknown)}, "
                f"missing {sorted({'mesh', 'device'} - set(data))}; it takes {sorted(known)}"
            )
        mesh = str(data["mesh"]) if isinstance(data["mesh"], int) else data["mesh"]
        shape = parse_mesh(mesh) if isinstance(mesh, str) else tuple(int(n) for n in mesh)
        dev = data["device"]
        dev = device(dev) if isinstance(dev, str) else Device.from_dict(dev)
        links = data.get("links")
        default = ClusterInfo.of(shape, dev)
        memory, host_memory = data.get("memory_bytes"), data.get("host_memory_bytes")
        host = data.get("host_link")
        return ClusterInfo(
            shape,
            dev,
            tuple(Link.from_dict(f"links[{i}]", link) for i, link in enumerate(links))
            if links
            else default.links,
            None if memory is None else parse_bytes(memory),
            None if host is None else Link.from_dict("host_link", host),
            None if host_memory is None else parse_bytes(host_memory),
        )

    @staticmethod
    def load(path: str | Path) -> ClusterInfo:
        """Read a YAML file as `to_dict` writes it."""
        data = yaml.safe_load(Path(path).read_text())
        if not isinstance(data, Mapping):
            raise ValueError(f"{path}: expected a mapping with mesh, device and links")
        return ClusterInfo.from_dict(data)

    def to_yaml(self) -> str:
        """The text that `load` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=100)
