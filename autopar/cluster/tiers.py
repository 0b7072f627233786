"""Memory beyond the device's: the host's, and directories on NVMe drives.

Tiers are rows of the cluster file:

    tiers:
    - {name: host, capacity: 512GiB, bandwidth: 25.0e9, latency: 12.0e-6, shared_by: 8}
    - {name: nvme, capacity: 3TB, bandwidth: 5.0e9, latency: 1.0e-4, directory: /local/states}
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from autopar.cluster.data import check_number
from autopar.cluster.link import Link
from autopar.errors import MeshError
from autopar.units import bytes_text

HOST, NVME = "host", "nvme"

# Bytes/s at which one process passes over a host's memory, if the cluster does not say.
_MEMORY_BANDWIDTH = 20e9


@dataclass(frozen=True)
class Tier:
    """One kind of memory, and the link to it.

    Args:
        name: "host" or "nvme".
        bandwidth: bytes/s of the link, in each direction, that one device has if all use it at
            once: between device and host, or between host and drive.
        latency: seconds per message.
        capacity: bytes, for all devices that share the tier; infinite if None.
        shared_by: devices that share the capacity.
        directory: of an NVMe tier, where its files are.
        memory_bandwidth: of the host, bytes/s at which an optimizer's step for one device reads and
            writes memory.
    """

    name: str
    bandwidth: float
    latency: float = 0.0
    capacity: float | None = None
    shared_by: int = 1
    directory: str | None = None
    memory_bandwidth: float | None = None

    def __post_init__(self) -> None:
        key = f"ClusterInfo: tier {self.name!r}"
        if self.name not in (HOST, NVME):
            raise ValueError(f"{key}: a tier is named {HOST!r} or {NVME!r}")
        check_number(f"{key}: bandwidth", self.bandwidth)
        check_number(f"{key}: latency", self.latency, zero=True)
        if self.capacity is not None:
            check_number(f"{key}: capacity", self.capacity)
        if self.memory_bandwidth is not None:
            check_number(f"{key}: memory_bandwidth", self.memory_bandwidth)
        if type(self.shared_by) is not int or self.shared_by < 1:
            raise ValueError(f"{key}: shared_by is a number of devices, got {self.shared_by!r}")
        if (self.name == NVME) != (self.directory is not None):
            raise ValueError(
                f"{key}: directory= is where states are written on a drive: "
                f"{NVME!r} needs one, {HOST!r} has none"
            )

    @property
    def link(self) -> Link:
        return Link(self.latency, 1 / self.bandwidth)

    @property
    def device_bytes(self) -> float:
        """The capacity that one device has."""
        return math.inf if self.capacity is None else self.capacity / self.shared_by

    @property
    def passes_per_s(self) -> float:
        """Bytes/s at which a step on the host moves its states."""
        return self.memory_bandwidth or _MEMORY_BANDWIDTH

    @staticmethod
    def from_dict(key: str, data: Any, size: Callable[[Any], float]) -> Tier:
        """Inverse of `data.plain`.

        Args:
            size: of a number of bytes as text ("512GiB", "25.0e9").

        Raises:
            ValueError: the data is not a tier; the message calls it by the key.
        """
        known = {f.name: f.default for f in fields(Tier)}
        needed = {name for name, default in known.items() if default is MISSING}
        if not isinstance(data, Mapping) or not needed <= set(data) <= set(known):
            raise ValueError(
                f"ClusterInfo: {key} must have {' and '.join(sorted(needed))} (and may have "
                f"{', '.join(sorted(set(known) - needed))}), got {data!r}"
            )
        data = dict(data)
        for name in ("capacity", "bandwidth", "memory_bandwidth"):
            value = data.get(name)
            if isinstance(value, str) or (name == "capacity" and value is not None):
                try:
                    data[name] = size(value)
                except ValueError as error:
                    raise ValueError(f"ClusterInfo: {key}.{name}: {error}") from error
        return Tier(**data)


def check_tiers(tiers: Sequence[Tier]) -> None:
    """Check that tiers make a hierarchy.

    Raises:
        ValueError: a name occurs twice, or there is a drive and no host to load it.
    """
    names = [tier.name for tier in tiers]
    if len(set(names)) < len(names):
        raise ValueError(f"ClusterInfo: tiers {', '.join(names)}: give each name once")
    if NVME in names and HOST not in names:
        raise ValueError(
            f"ClusterInfo: states on {NVME!r} are stepped on the host; add a tier {HOST!r}"
        )


def tier_named(tiers: Sequence[Tier], name: str) -> Tier | None:
    """The tier of a name, if there is one."""
    return next((tier for tier in tiers if tier.name == name), None)


def off_device_tiers(tiers: Sequence[Tier], kind: str, ranks: int) -> tuple[Tier, ...]:
    """The tiers that states can be on. None for several GPUs: their collectives (NCCL) take no
    tensors of the host, so norms and checkpoints of such shards would fail.

    Args:
        kind: of the devices.
        ranks: of the mesh.
    """
    return () if kind == "cuda" and ranks > 1 else tuple(tiers)


@dataclass(frozen=True)
class StateBytes:
    """What a device's states take. Bytes.

    Args:
        optimizer: what the optimizer keeps for its parameters.
    """

    parameters: float
    gradients: float
    optimizer: float

    def on_host(self, tier: str) -> float:
        """What the host holds of them."""
        states = self.parameters + self.gradients
        return states + self.optimizer if tier == HOST else states

    @property
    def on_drive(self) -> float:
        """Two versions of what a step changes: the last one that is complete, and the next."""
        return 2 * (self.parameters + self.optimizer)

    def second_bytes(self, tier: str) -> float:
        """Of a second version of what a step changes, on the host."""
        return self.gradients + (self.optimizer if tier == HOST else 0.0)

    def step_us(self, tiers: Sequence[Tier], name: str) -> float:
        """Predicted time of the optimizer's step where the states are: each is read and written
        once; reads and writes of a drive run beside that, and beside each other."""
        return self._passing_us(tiers, name, 2 * self._changed + self.gradients)

    def second_step_us(self, tiers: Sequence[Tier], name: str) -> float:
        """The same into a second version, to which states are copied first; of a drive, chunk after
        chunk is read, stepped and written."""
        us = self._passing_us(tiers, HOST, 4 * self._changed + self.gradients)
        drive = tier_named(tiers, NVME)
        if name == NVME and drive is not None:
            us += 1e6 * (self._changed + self.optimizer) / drive.bandwidth
        return us

    @property
    def _changed(self) -> float:
        return self.parameters + self.optimizer

    def _passing_us(self, tiers: Sequence[Tier], name: str, passes_bytes: float) -> float:
        host, drive = tier_named(tiers, HOST), tier_named(tiers, NVME)
        us = 1e6 * passes_bytes / (host.passes_per_s if host is not None else _MEMORY_BANDWIDTH)
        if name == NVME and drive is not None:
            us = max(us, 1e6 * self._changed / drive.bandwidth)
        return us

    def place(
        self, tiers: Sequence[Tier], steps_on: Sequence[str] = (HOST, NVME)
    ) -> str | None:  # fmt: skip
        """The nearest tier with room for the states; None if there is no host.

        Args:
            steps_on: the tiers that the optimizer can step on.

        Raises:
            ValueError: none has room; the message has the numbers.
        """
        host, drive = tier_named(tiers, HOST), tier_named(tiers, NVME)
        if host is None:
            return None
        if self.on_host(HOST) <= host.device_bytes:
            return HOST
        needs = (
            f"states of a device need {bytes_text(self.on_host(HOST))} on the host, which has "
            f"{bytes_text(host.device_bytes)} for it"
        )
        if NVME not in steps_on:
            raise ValueError(
                f"{needs}; give it more, as only an optimizer that treats each element by itself "
                f"(AdamW, SGD) steps on {NVME!r}"
            )
        if drive is None:
            raise ValueError(f"{needs}; give it more, or add a tier {NVME!r}")
        if self.on_host(NVME) > host.device_bytes:
            raise ValueError(
                f"{needs}; with the optimizer's states on {NVME!r}, parameters and gradients "
                f"still need {bytes_text(self.on_host(NVME))} there"
            )
        if self.on_drive > drive.device_bytes:
            raise ValueError(
                f"{needs}; on {NVME!r}, two versions of parameters and optimizer's states need "
                f"{bytes_text(self.on_drive)}, and it has {bytes_text(drive.device_bytes)} for a "
                "device"
            )
        return NVME


def on_this_host(tier: Tier) -> Tier:
    """A tier of a drive, after a look at the directory, which is made if it does not exist: its
    capacity is what is free there, if the cluster does not say less.

    Raises:
        MeshError: it cannot be written, or has not the capacity that the cluster says.
    """
    assert tier.directory is not None
    path = Path(tier.directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0")
        used = sum(f.stat().st_size for f in path.rglob("*.bin"))
        free = shutil.disk_usage(path).free + used
    except OSError as error:
        raise MeshError(
            f"the directory {path} of tier {NVME!r} cannot be written: "
            f"{error.strerror or error}; name one on a drive of this host"
        ) from error
    if tier.capacity is not None and free < tier.capacity:
        raise MeshError(
            f"the drive of {path} has {bytes_text(free)} free, and tier {NVME!r} of the cluster "
            f"says {bytes_text(tier.capacity)}; free some, name another directory, or say less"
        )
    return replace(tier, capacity=tier.capacity or max(1.0, float(free)), directory=str(path))


def process_directory(tier: Tier, rank: int) -> Path:
    """Where a process keeps its files."""
    assert tier.directory is not None
    return Path(tier.directory) / f"rank-{rank:05d}"
