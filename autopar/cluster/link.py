"""`Link`: the time of collectives along one mesh axis, by formula or as measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from autopar.cluster.curve import Curve
from autopar.cluster.data import curves_from

# Passes over the ring. An all-reduce is a reduce-scatter and an all-gather.
PASSES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "all_to_all": 1, "exchange": 1}


@dataclass(frozen=True)
class Link:
    """The network link of one mesh axis.

    A collective over k ranks on a buffer of n bytes (on the unsplit side) takes, unless it was
    measured,

        ring, per pass    (k - 1) alpha + n (k - 1) / k beta / ports
        tree, all-reduce  2 ceil(log2 k) alpha + 2 n beta, if that is less
        all-to-all        (k - 1) alpha + n (k - 1) / k beta
        exchange          alpha + n beta: most of it goes to one other rank

    A rank runs its collectives one after another. All groups of an axis communicate at the same
    time; beta includes that they share ports.

    Args:
        alpha: seconds per message.
        beta: seconds per byte through one port.
        ports: number of ports through which a ring leaves a node. A ring visits all its ranks in
            the node, each with a port of its own. An all-to-all sends a rank's bytes through that
            rank's port alone.
        ring_alpha: seconds per hop of a ring, on average, where most of its hops are within nodes;
            alpha if None.
        curves: measured bytes/s by bytes of the buffer, per collective.
    """

    alpha: float
    beta: float
    ports: float = 1.0
    ring_alpha: float | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not set(self.curves) <= set(PASSES):
            raise ValueError(
                f"a link's curves are of {', '.join(PASSES)}, not {sorted(self.curves)}"
            )

    def bucketed_us(
        self, kind: str, ranks: int, nbytes: np.ndarray | float, message_bytes: float
    ) -> np.ndarray:
        """Microseconds for a weight. Small weights share a message, and each takes its share.

        Args:
            message_bytes: size of a shared message.
        """
        size = np.asarray(nbytes, float)
        share = np.minimum(1.0, size / message_bytes)
        return share * self.collective_us(kind, ranks, np.maximum(size, message_bytes))

    def collective_us(self, kind: str, ranks: int, nbytes: np.ndarray | float) -> np.ndarray:
        """Microseconds of a collective, without its launch.

        Args:
            kind: a key of `PASSES`.
            ranks: size of the group.
            nbytes: bytes of the local buffer, on the unsplit side.
        """
        size = np.asarray(nbytes, float)
        if kind == "exchange":
            return 1e6 * (self.alpha + size * self.beta)
        curve = self.curves.get(kind)
        if curve is not None:
            return curve.us(np.maximum(size, curve.sizes[0]))
        beta = self.beta if kind == "all_to_all" else self.beta / self.ports
        share = size * (ranks - 1) / ranks
        alpha = self.alpha
        if kind != "all_to_all" and self.ring_alpha is not None:
            alpha = self.ring_alpha
        ring = PASSES[kind] * ((ranks - 1) * alpha + share * beta)
        if kind == "all_reduce":
            tree = 2 * (math.ceil(math.log2(ranks)) * self.alpha + size * beta)
            ring = np.minimum(ring, tree)
        return 1e6 * ring

    @staticmethod
    def from_dict(key: str, data: Any) -> Link:
        """Inverse of `data.plain`.

        Raises:
            ValueError: the data is not a link; the message calls it by the key.
        """
        known = {f.name for f in fields(Link)}
        if not isinstance(data, Mapping) or not {"alpha", "beta"} <= set(data) <= known:
            raise ValueError(
                f"ClusterInfo: {key} must have alpha and beta (and may have ports and curves), "
                f"got {data!r}"
            )
        curves = curves_from(f"ClusterInfo: {key}.curves", data.get("curves", {}))
        return Link(**{**data, "curves": curves})
