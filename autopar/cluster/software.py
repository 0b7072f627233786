"""`Software`: what the framework that runs a step adds to the times of the devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from autopar.cluster.data import check_number


@dataclass(frozen=True)
class Software:
    """A framework, as numbers.

    A device computes while the host launches ahead. A pass over a model (forward, or backward)
    takes the longer of what the device and what the host needs for it.

    Args:
        name: for reports.
        forward_us: of the host per operator of the forward: Python, dispatch and launch.
        backward_us: per operator of the backward, which autograd launches.
        source: where the numbers come from.
    """

    name: str
    forward_us: float = 0.0
    backward_us: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        for key in ("forward_us", "backward_us"):
            check_number(f"software {self.name}: {key}", getattr(self, key), zero=True)

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


SOFTWARE: dict[str, Software] = {
    s.name: s
    for s in (
        Software("Megatron-DeepSpeed", 60.0, 30.0),
        Software("Megatron-LM", 20.0, 10.0),
        Software("Composer", 20.0, 10.0),
        Software("torchtitan, eager", 20.0, 10.0),
        Software("torchtitan, compiled", 10.0, 10.0),
    )
}
