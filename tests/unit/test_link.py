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
    # each byte for another node leaves by the port of its rank
    all_to_all = flat.links[0].collective_us("all_to_all", 64, 64e9)
    assert all_to_all == pytest.approx(1e6 * 56e9 * outside.beta, rel=1e-2)


def test_a_tree_of_nodes_has_few_hops_between_them():
    inside, alpha, beta = Link(1e-6, 1 / 200e9), 1e-5, 1 / 20e9
    link = Link(alpha, beta, ports=8.0, node_ranks=8, inside=inside)
    ring = 2 * 511 * (alpha + 7e-6) / 8
    assert link.collective_us("all_reduce", 512, 8) < 1e6 * ring / 5
    assert link.collective_us("all_reduce", 512, 8) == pytest.approx(
        1e6 * (2 * 7e-6 + 2 * 6 * alpha), rel=1e-4
    )
    # large messages: the ring's bandwidth
    assert link.collective_us("all_reduce", 64, 1e10) == pytest.approx(
        1e6 * 2e10 * 63 / 64 * beta / 8, rel=1e-2
    )


def test_switches_add_up_in_one_pass():
    """As measured by nccl-tests on eight H100: 275 GB/s, of 211 by a ring of 370."""
    (link,) = ClusterInfo.of("8", "H100").links
    ring = Link(link.alpha, link.beta)
    ratio = ring.collective_us("all_reduce", 8, 4e9) / link.collective_us("all_reduce", 8, 4e9)
    assert ratio == pytest.approx(275 / (370 * 8 / 14), rel=0.02)
    assert link.collective_us("all_gather", 8, 4e9) == ring.collective_us("all_gather", 8, 4e9)
    assert link.collective_us("all_reduce", 2, 4e9) == ring.collective_us("all_reduce", 2, 4e9)
    assert ClusterInfo.of("8", "A100-80G").links[0].switch_beta is None


def test_a_curve_goes_before_the_formula():
    assert MEASURED.collective_us("all_gather", 4, 1e6) == pytest.approx(1e4)
    # nothing is faster than the smallest message that was measured
    assert MEASURED.collective_us("all_gather", 4, 8) == pytest.approx(1e2)
    formula = LINK.collective_us("reduce_scatter", 4, 1e6)
    assert MEASURED.collective_us("reduce_scatter", 4, 1e6) == formula


def test_links_survive_yaml(tmp_path):
    path = tmp_path / "cluster.yaml"
    cluster = ClusterInfo.of("2x4", "H100", node_size=2)
    assert cluster.links[1].inside is not None and cluster.links[0].inside is None
    cluster = ClusterInfo(cluster.mesh, cluster.device, (MEASURED, cluster.links[1]))
    path.write_text(cluster.to_yaml())
    assert ClusterInfo.load(path) == cluster
    for wrong, message in (
        ({"alpha": 1e-5}, "must have alpha and beta"),
        ({"alpha": 1e-5, "beta": 1e-9, "gamma": 1}, "must have alpha and beta"),
        ({"alpha": 1e-5, "beta": 1e-9, "node_ranks": 2}, "needs inside"),
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
