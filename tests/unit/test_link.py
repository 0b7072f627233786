"""Links: what a collective takes, by algorithm or as measured, and small weights together."""

import math
from functools import partial

import numpy as np
import pytest

from autopar.cluster.cluster import ClusterInfo
from autopar.cluster.curve import Curve
from autopar.cluster.link import PASSES, Link
from autopar.comm.cost import BUCKET_MEMBER_BYTES
from autopar.ir.spec import ShardingSpec
from autopar.sharding.conversion.converter import LayoutConverter

LINK = Link(1e-5, 1e-9)
bucketed = partial(LINK.bucketed_us, message_bytes=BUCKET_MEMBER_BYTES)
MEASURED = Link(1e-5, 1e-9, curves={"all_gather": Curve.of([[1e3, 1e7], [1e6, 1e8]])})


def test_a_ring_carries_large_messages_and_a_tree_small_ones():
    for kind, passes in PASSES.items():
        large = passes * (15 * 1e-5 + 1e9 * 15 / 16 * 1e-9)
        if kind == "exchange":  # a message to another rank
            large = 1e-5 + 1e9 * 1e-9
        assert LINK.collective_us(kind, 16, 1e9) == pytest.approx(1e6 * large)
    small = 2 * (math.log2(16) * 1e-5 + 8e-9)
    assert LINK.collective_us("all_reduce", 16, 8) == pytest.approx(1e6 * small)


def test_a_ring_leaves_a_node_by_all_ports():
    flat, nodes = ClusterInfo.of("64", "H100"), ClusterInfo.of("8x8", "H100")
    inside, outside = nodes.links[1], nodes.links[0]
    assert outside.ports == inside.ports == 1
    assert flat.links[0].ports == pytest.approx(outside.beta / inside.beta)
    assert ClusterInfo.of("16x4", "H100").links[0].ports == 2
    gathered = [c.links[0].collective_us("all_gather", 64, 1e9) for c in (flat, nodes)]
    assert gathered[0] < gathered[1] / 5
    all_to_all = [c.links[0].collective_us("all_to_all", 64, 1e9) for c in (flat, nodes)]
    assert all_to_all[0] == all_to_all[1]


def test_a_curve_goes_before_the_formula():
    assert MEASURED.collective_us("all_gather", 4, 1e6) == pytest.approx(1e4)
    # nothing is faster than the smallest message that was measured
    assert MEASURED.collective_us("all_gather", 4, 8) == pytest.approx(1e2)
    formula = LINK.collective_us("reduce_scatter", 4, 1e6)
    assert MEASURED.collective_us("reduce_scatter", 4, 1e6) == formula


def test_links_survive_yaml(tmp_path):
    path = tmp_path / "cluster.yaml"
    cluster = ClusterInfo.of("2x4", "H100", node_size=2)
    cluster = ClusterInfo(cluster.mesh, cluster.device, (MEASURED, Link(1e-5, 1e-9, 2.0)))
    path.write_text(cluster.to_yaml())
    assert ClusterInfo.load(path) == cluster
    for wrong, message in (
        ({"alpha": 1e-5}, "must have alpha and beta"),
        ({"alpha": 1e-5, "beta": 1e-9, "gamma": 1}, "must have alpha and beta"),
        ({"alpha": 1e-5, "beta": 1e-9, "curves": {"gossip": [[1, 1]]}}, "curves are of all_gather"),
        ({"alpha": 1e-5, "beta": 1e-9, "curves": {"all_gather": [[1, 0]]}}, "must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            Link.from_dict("links[0]", wrong)


def test_small_weights_share_messages_and_large_ones_do_not():
    sizes = np.array([4.0, 1e3, BUCKET_MEMBER_BYTES, 1e8])
    for kind in PASSES:
        alone, together = (f(kind, 8, sizes) for f in (LINK.collective_us, bucketed))
        assert (together[:2] < alone[:2] / 2).all()
        assert together[2:] == pytest.approx(alone[2:])
        # as many as fill a message take as long as the message
        assert together[1] * BUCKET_MEMBER_BYTES / 1e3 == pytest.approx(float(together[2]))
    converter = LayoutConverter(ClusterInfo.of("8", "H100"))
    split, replicated = [ShardingSpec.parse("S0")], [ShardingSpec.parse("R")]
    alone, together = (
        converter.costs_us((1024,), 4, split, replicated, weight=weight)[0, 0]
        for weight in (False, True)
    )
    assert together < alone
