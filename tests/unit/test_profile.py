"""The static profile against what torch counts on the real run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from autopar import ColoTracer
from autopar.profiler import ClusterInfo, parse_bytes, profile_graph
from autopar.profiler.cluster import Link, as_cluster, device, parse_mesh
from tests.models import CASES


@pytest.mark.parametrize("name", list(CASES))
def test_flops_equal_the_flop_counter(name):
    case = CASES[name]
    model, batch = case.build(), case.batch(0)
    graph = ColoTracer().trace(model, (), batch)
    profile = profile_graph(graph, set(graph.parameters))
    total = sum(p.forward_flops + p.backward_flops for p in profile.values())
    # attention written out: torch's counter does not know the CPU's fused kernel
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter:
        model(**batch).backward()
    assert total == pytest.approx(counter.get_total_flops(), rel=0.02 if name in "gpt2 vit" else 0)


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_saved_bytes_equal_what_autograd_saves(name):
    case = CASES[name]
    model, batch = case.build(), case.batch(0)
    graph = ColoTracer().trace(model, (), batch)
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held |= {b.untyped_storage().data_ptr() for b in model.buffers()}
    held |= {t.untyped_storage().data_ptr() for t in batch.values()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**batch)
    measured = sum(s.nbytes() for k, s in saved.items() if k not in held)
    from autopar.estimate import estimate_memory
    from autopar.sharding.sites import Workload
    from autopar.sharding.space import SearchSpace

    space = SearchSpace(graph, ClusterInfo.of("1"), Workload(frozenset(graph.parameters)))
    predicted = estimate_memory(space, [0] * len(space.sites)).activations_bytes
    assert predicted == pytest.approx(measured, rel=0.03)


def test_sizes_and_meshes_parse():
    assert parse_bytes("40GiB") == 40 * 2**30
    assert parse_bytes("512 MB") == 512e6
    assert parse_bytes("0.5", of=100.0) == 50.0
    assert parse_mesh("2x4") == (2, 4)
    for bad in ["40 potatoes", "-1GiB", "0"]:
        with pytest.raises(ValueError, match=r"memory size"):
            parse_bytes(bad)
    for bad in ["", "2x", "0x2", "two"]:
        with pytest.raises(ValueError, match="mesh"):
            parse_mesh(bad)


def test_clusters_round_trip_through_yaml(tmp_path):
    import yaml

    cluster = ClusterInfo.of("2x8", "H100").with_memory("60GiB")
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(cluster.to_dict()))
    assert as_cluster(path) == cluster
    assert cluster.links[0] != cluster.links[1]  # between nodes, inside a node
    assert [cluster.coords(r) for r in (0, 1, 8)] == [(0, 0), (0, 1), (1, 0)]


def test_bad_clusters_are_refused():
    with pytest.raises(ValueError, match=r"unknown device 'H1OO'.*H100"):
        device("H1OO")
    with pytest.raises(ValueError, match=r"links\[0\].beta must be positive"):
        ClusterInfo((2,), device("cpu"), (Link(1e-6, float("nan")),))
    with pytest.raises(ValueError, match="one link per axis"):
        ClusterInfo((2, 2), device("cpu"), (Link(1e-6, 1e-9),))
    with pytest.raises(ValueError, match="does not exist"):
        as_cluster("nowhere.yaml")
    with pytest.raises(ValueError, match=r"unknown keys \['meshes'\]"):
        ClusterInfo.from_dict({"meshes": [2], "mesh": [2], "device": "cpu"})
