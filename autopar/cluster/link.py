"""`Link`: how long a collective along one mesh axis takes, by algorithm or as measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from autopar.cluster.curve import Curve

# Passes over the ring: an all-reduce is a reduce-scatter and an all-gather.
PASSES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "all_to_all": 1}

# Weights, and their gradients, that are smaller share messages (`passes/bucket.py`). Beyond it,
# copying into the message and out of it costs more than the message that it saves.
BUCKET_MEMBER_BYTES = 2**20
# Nobody waits for a sum of so few bytes where it stands, if it is only returned (`passes/async_sums.py`).
ASYNC_SUM_BYTES = 1024


@dataclass(frozen=True)
class Link:
    """One mesh axis. Where nothing was measured of a collective over k ranks on a buffer of n bytes
    (on the side that is not split), it takes

        ring, per pass    (k - 1) alpha + n (k - 1) / k beta / ports
        tree, all-reduce  2 ceil(log2 k) alpha + 2 n beta / ports, where that is less
        all-to-all        (k - 1) alpha + n (k - 1) / k beta

    Collectives of one rank run one after another, and all groups of an axis at the same time; so
    what shares a port is the groups of one axis, which is in beta.

    Args:
        alpha: seconds per message.
        beta: seconds per byte through one port.
        ports: through which a ring leaves a node. It passes all ranks that it has there, each with
            a port of its own, while an all-to-all sends all of a rank's bytes through that rank's.
        curves: bytes/s by bytes of the buffer, per collective, as measured.
    """

    alpha: float
    beta: float
    ports: float = 1.0
    curves: Mapping[str, Curve] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not set(self.curves) <= set(PASSES):
            raise ValueError(
                f"a link's curves are of {', '.join(PASSES)}, not {sorted(self.curves)}"
            )

    def bucketed_us(
        self, kind: str, ranks: int, nbytes: np.ndarray | float, full: float = BUCKET_MEMBER_BYTES
    ) -> np.ndarray:
        """`collective_us` of a weight: one that is small takes its share of a message.

        Args:
            full: bytes of that message.
        """
        size = np.asarray(nbytes, float)
        share = np.minimum(1.0, size / full)
        return share * self.collective_us(kind, ranks, np.maximum(size, full))

    def collective_us(self, kind: str, ranks: int, nbytes: np.ndarray | float) -> np.ndarray:
        """Microseconds without the launch.

        Args:
            kind: of `PASSES`.
            ranks: of the group.
            nbytes: of the local buffer, on the side that is not split.
        """
        size = np.asarray(nbytes, float)
        curve = self.curves.get(kind)
        if curve is not None:
            return curve.us(np.maximum(size, curve.sizes[0]))
        beta = self.beta if kind == "all_to_all" else self.beta / self.ports
        share = size * (ranks - 1) / ranks
        ring = PASSES[kind] * ((ranks - 1) * self.alpha + share * beta)
        if kind == "all_reduce":
            tree = 2 * (math.ceil(math.log2(ranks)) * self.alpha + size * beta)
            ring = np.minimum(ring, tree)
        return 1e6 * ring

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without what is as usual."""
        data: dict[str, Any] = {"alpha": self.alpha, "beta": self.beta}
        if self.ports != 1.0:
            data["ports"] = self.ports
        if self.curves:
            data["curves"] = {kind: curve.to_list() for kind, curve in self.curves.items()}
        return data

    @staticmethod
    def from_dict(key: str, data: Any) -> Link:
        """Inverse of `to_dict`; `key` names it in errors.

        Raises:
            ValueError: not a link.
        """
        known = {"alpha", "beta", "ports", "curves"}
        if not isinstance(data, Mapping) or not {"alpha", "beta"} <= set(data) <= known:
            raise ValueError(
                f"ClusterInfo: {key} must have alpha and beta (and may have ports and curves), "
                f"got {data!r}"
            )
        curves = {}
        for kind, points in data.get("curves", {}).items():
            try:
                curves[kind] = Curve.of(points)
            except ValueError as error:
                raise ValueError(f"ClusterInfo: {key}.curves[{kind}]: {error}") from error
        return Link(data["alpha"], data["beta"], data.get("ports", 1.0), curves)
