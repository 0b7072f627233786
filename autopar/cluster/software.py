"""`Software`: what the framework that runs a step adds to the times of the devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from autopar.cluster.data import check_number
from autopar.cluster.device import Device


@dataclass(frozen=True)
class Software:
    """A framework, as numbers.

    A device computes while the host launches ahead. A pass over a model (forward, or backward)
    takes the longer of what the device and what the host needs for it.

    Args:
        name: for reports.
        forward_us: of the host per operator of the forward: Python, dispatch and launch.
        backward_us: per operator of the backward, which autograd launches.
        wait_us: of the host per collective, for every rank of its group in a node but the first:
            processes of a node share its CPUs and are late at random, and a collective waits for
            the last.
        skew_us: of the device per collective on activations, whose ranks reach it at random times
            because they began at random times. A step whose launches are ahead has none.
        gap_us: idle time of the device between two kernels.
        traffic: bytes moved per byte of the graph's operands and results: casts under autocast and
            temporaries of eager kernels that the graph does not have.
        attention: speed of its fused attention, as a share of the device's.
        hides: share of a collective that a product beside it hides, or attention in steps; parts of
            a product are less efficient than the whole, and copies take processors and bandwidth.
        fuses: neighbouring operators without products are one kernel, as a compiler makes them.
        source: where the numbers come from.
    """

    name: str
    forward_us: float = 0.0
    backward_us: float = 0.0
    wait_us: float = 0.0
    skew_us: float = 0.0
    gap_us: float = 0.0
    traffic: float = 1.0
    attention: float = 1.0
    hides: float = 1.0
    fuses: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        for key in ("forward_us", "backward_us", "wait_us", "skew_us", "gap_us"):
            check_number(f"software {self.name}: {key}", getattr(self, key), zero=True)
        for key in ("traffic", "attention", "hides"):
            check_number(f"software {self.name}: {key}", getattr(self, key))

    def on(self, device: Device) -> Device:
        """The device as kernels of this framework find it."""
        flops = {
            key: curve.scaled(self.attention if key.startswith("attention.") else 1.0)
            for key, curve in device.flops_by_size.items()
        }
        moves = {key: c.scaled(1 / self.traffic) for key, c in device.bytes_by_size.items()}
        return replace(device, flops_by_size=flops, bytes_by_size=moves, gap_us=self.gap_us)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Software:
        """Inverse of `data.plain`.

        Raises:
            ValueError: a key is missing or unknown, or a number is not legal.
        """
        known = {f.name for f in fields(Software)}
        if not {"name"} <= set(data) <= known:
            raise ValueError(
                f"ClusterInfo: software takes {', '.join(sorted(known))} and needs a name, got "
                f"{dict(data)!r}"
            )
        return Software(**data)


# `benchmarks.published_steps` fits and tests the numbers; docs/accuracy.md has the rows of each.
SOFTWARE: dict[str, Software] = {
    s.name: s
    for s in (
        *(
            Software(
                name, 41.7, 101.5, 45.5, skew_us, 12.3, traffic=1.18, hides=0.47,
                source="half of vTrain",
            )
            for name, skew_us in (
                ("Megatron-DeepSpeed", 0.0),
                ("Megatron-DeepSpeed, layers timed alone", 244.5),
            )
        ),
        Software(
            "Megatron-LM", 20.0, 20.0, gap_us=4.0, hides=0.47,
            source="assumed, but for what products hide, as of Megatron-DeepSpeed",
        ),
        Software(
            "Composer", 20.0, 20.0, gap_us=19.7, traffic=1.85, attention=0.57,
            source="half of MPT-llm-foundry; its attention is Triton's first flash attention",
        ),
        Software(
            "torchtitan, eager", 20.0, 20.0, gap_us=4.0, source="half of torchtitan's bf16 rows"
        ),
        Software(
            "torchtitan, compiled", 10.0, 20.0, gap_us=2.0, hides=0.45, fuses=True,
            source="half of torchtitan's bf16 rows",
        ),
        Software(
            "Megatron-Bridge", 10.0, 20.0, gap_us=2.0, attention=1.7, hides=0.8, fuses=True,
            source="assumed, but for the H100's share in float8, from half of its rows",
        ),
    )
}  # fmt: skip
