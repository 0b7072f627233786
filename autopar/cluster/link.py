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
    measured, the time of the fastest algorithm that NCCL has for it:

        ring, per pass      (k - 1) alpha + n (k - 1) / k beta / ports
        tree, all-reduce    2 ceil(log2 k) alpha + 2 n beta
        switch, all-reduce  2 alpha + n switch_beta
        all-to-all          (k - 1) alpha + n (k - 1) / k beta
        exchange            alpha + n beta: most of it goes to one other rank

    Where m ranks of the axis share a node, one hop of a ring in m leaves the node; the others take
    inside.alpha. A tree is of nodes, with a chain or the switches within each. An all-to-all sends
    what is for ranks of the node within it:

        tree        2 (m - 1) inside.alpha + 2 ceil(log2 (k / m)) alpha, and the longer of
                    2 n beta / m and 2 n inside.beta (n switch_beta)
        all-to-all  (m - 1) inside.alpha + (k - m) alpha, and the longer of
                    n (k - m) / k beta and n (m - 1) / k inside.beta

    A rank runs its collectives one after another. All groups of an axis communicate at the same
    time; beta includes that they share ports.

    Args:
        alpha: seconds per message.
        beta: seconds per byte through one port.
        ports: number of ports through which a ring leaves a node. A ring visits all its ranks in
            the node, each with a port of its own. An all-to-all sends a rank's bytes through that
            rank's port alone.
        switch_beta: seconds per byte of an all-reduce within a node whose switches add up and send
            the sum to all (NVLink SHARP); None if they do not.
        node_ranks: ranks of the axis in a node, if it spans several nodes.
        inside: the link between these; None for one rank.
        curves: measured bytes/s by bytes of the buffer, per collective.
    """

    alpha: float
    beta: float
    ports: float = 1.0
    switch_beta: float | None = None
    node_ranks: int = 1
    inside: Link | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not set(self.curves) <= set(PASSES):
            raise ValueError(
                f"a link's curves are of {', '.join(PASSES)}, not {sorted(self.curves)}"
            )
        if (self.node_ranks > 1) != (self.inside is not None):
            raise ValueError(
                f"a link with node_ranks={self.node_ranks} needs inside, the link between the "
                "ranks of a node, if it has several there, and else none"
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
        if kind == "all_to_all":
            return 1e6 * self._all_to_all_s(ranks, size)
        ring = PASSES[kind] * (
            (ranks - 1) * self._hop_s + size * (ranks - 1) / ranks * self.beta / self.ports
        )
        if kind != "all_reduce":
            return 1e6 * ring
        fastest = np.minimum(ring, self._tree_s(ranks, size))
        if self.switch_beta is not None and ranks > 1:
            fastest = np.minimum(fastest, 2 * self.alpha + size * self.switch_beta)
        return 1e6 * fastest

    @property
    def _hop_s(self) -> float:
        """Of a ring, on average."""
        if self.inside is None:
            return self.alpha
        return (self.alpha + (self.node_ranks - 1) * self.inside.alpha) / self.node_ranks

    def _tree_s(self, ranks: int, size: np.ndarray) -> np.ndarray:
        """An all-reduce: up a tree, and down again."""
        if self.inside is None:
            return 2 * (math.ceil(math.log2(ranks)) * self.alpha + size * self.beta)
        nodes, inside = math.ceil(ranks / self.node_ranks), self.inside
        hops = (self.node_ranks - 1) * inside.alpha + math.ceil(math.log2(nodes)) * self.alpha
        within = 2 * inside.beta if inside.switch_beta is None else inside.switch_beta
        return 2 * hops + size * max(2 * self.beta / self.node_ranks, within)

    def _all_to_all_s(self, ranks: int, size: np.ndarray) -> np.ndarray:
        if self.inside is None:
            return (ranks - 1) * self.alpha + size * (ranks - 1) / ranks * self.beta
        near = min(self.node_ranks, ranks) - 1
        far = ranks - 1 - near
        longer = max(far * self.beta, near * self.inside.beta)
        return near * self.inside.alpha + far * self.alpha + size / ranks * longer

    @staticmethod
    def from_dict(key: str, data: Any) -> Link:
        """Inverse of `data.plain`.

        Raises:
            ValueError: the data is not a link; the message calls it by the key.
        """
        known = {f.name for f in fields(Link)}
        if not isinstance(data, Mapping) or not {"alpha", "beta"} <= set(data) <= known:
            raise ValueError(
                f"ClusterInfo: {key} must have alpha and beta (and may have "
                f"{', '.join(sorted(known - {'alpha', 'beta'}))}), got {data!r}"
            )
        curves = curves_from(f"ClusterInfo: {key}.curves", data.get("curves", {}))
        inside = data.get("inside")
        if inside is not None:
            inside = Link.from_dict(f"{key}.inside", inside)
        return Link(**{**data, "curves": curves, "inside": inside})
