"""Measuring the machine, and the time model that its figures go into."""

import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from autopar.cluster.cluster import ClusterInfo
from autopar.cluster.curve import Curve
from autopar.cluster.data import plain
from autopar.cluster.device import Device, device
from autopar.cluster.link import Link
from autopar.errors import EngineError, MeshError
from autopar.ir.spec import ShardingSpec
from autopar.plan import ShardingPlan
from autopar.profiler.clock import seconds_of
from autopar.profiler.counting import Work
from autopar.profiler.measure import QUICK, measure_device
from autopar.profiler.measure_links import fit_link, measure_cluster, run_local
from autopar.profiler.model import profile_model
from autopar.profiler.profile import profile_graph
from autopar.profiler.time_model import Kernel, kernels_of, node_us
from autopar.progress import Bar
from autopar.sharding.conversion.converter import LayoutConverter
from autopar.tracer import ColoTracer
from tests.commands import run

CPU = ClusterInfo.of("1", "cpu").device
MEASURED = replace(
    CPU,
    flops_by_size={"matmul.float32": Curve((1e6, 1e9), (1e10, 4e10))},
    bytes_by_size={"read": Curve.constant(2e10), "write": Curve.constant(1e10)},
    extra_ns={"function": 1.0, "random": 5.0, "index": 2.0},
)


# -- fits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_alpha_and_beta_are_recovered(noise):
    random = np.random.default_rng(0)
    rows = [(p * 3.0, p * 0.75 * n) for p in (1, 2) for n in 2.0 ** np.arange(10, 25)]
    truth = np.array([2e-5, 1e-9])
    times = np.array(rows) @ truth * random.uniform(1 - noise, 1 + noise, len(rows))
    link, errors = fit_link(rows, times.tolist())
    assert np.allclose((link.alpha, link.beta), truth, rtol=0.01 + noise)
    assert np.abs(errors).max() <= 0.01 + 2.5 * noise


def test_a_fit_is_never_negative():
    # larger messages that take less time, and messages that cost nothing to start
    for times in ([1e-3, 0.5e-3], [1e-9, 1e-3]):
        link, _ = fit_link([(1.0, 1e3), (1.0, 1e9)], times)
        assert link.alpha > 0
        assert link.beta > 0


def test_the_fit_predicts_in_the_planners_formula():
    cluster = ClusterInfo((4,), CPU, (Link(1e-4, 1e-9),))
    nbytes, k = 4 * 1024 * 1024, 4
    converter, shape = LayoutConverter(cluster), (1024, 1024)
    split, replicated = ShardingSpec.parse("S0R"), ShardingSpec.parse("RR")
    forward, _ = converter.step_us(shape, 4, converter.path(shape, 4, split, replicated)[0])
    seconds = (k - 1) * 1e-4 + nbytes * (k - 1) / k * 1e-9
    assert forward == pytest.approx(1e6 * seconds + CPU.launch_us)


def test_curves():
    curve = Curve.fit([1e3, 1e6, 1e4], [1e-6, 1e-4, 1.1e-6])
    assert curve.sizes == (1e3, 1e4, 1e6)
    times = curve.us(np.logspace(0, 9, 50))
    assert (np.diff(times) > 0).all()
    assert curve.us(1e4) == pytest.approx(1.1, rel=1e-3)
    assert curve.us(1e8) == pytest.approx(1e4, rel=1e-3)
    # a smaller kernel that was disturbed takes as long as the larger one
    assert Curve.fit([1e3, 2e3], [5e-6, 1e-6]).us(1e3) == pytest.approx(1, rel=1e-3)
    assert Curve.of(curve.to_list()) == curve
    for points, message in (
        ([], "needs a rate per size"),
        ([[1, 0]], "must be positive"),
        ([[1, 1], [2, 10]], "must ascend"),
        ([[2, 1], [1, 1]], "must ascend"),
        (3, "is a list of"),
    ):
        with pytest.raises(ValueError, match=message):
            Curve.of(points)


# -- files --------------------------------------------------------------------------------------


def test_a_measured_cluster_survives_yaml(tmp_path):
    cluster = ClusterInfo(
        (2, 2), MEASURED, (Link(1e-4, 1e-9),) * 2, None, Link(1e-5, 5e-11), 2.0**35
    )
    path = tmp_path / "cluster.yaml"
    path.write_text(cluster.to_yaml())
    assert ClusterInfo.load(path) == cluster
    assert ClusterInfo.load(path).with_memory("1GiB").host_link == cluster.host_link


def test_files_without_the_new_fields():
    old = {
        "mesh": [2],
        "device": {
            "name": "x", "kind": "cpu", "peak_flops": {"float32": 1e9}, "memory_bytes": 1e9,
            "bandwidth": 1e9, "launch_us": 1.0,
        },
        "links": [{"alpha": 1e-5, "beta": 1e-9}],
    }  # fmt: skip
    cluster = ClusterInfo.from_dict(old | {"memory_bytes": None})
    assert not cluster.device.measured
    assert cluster.host_link is None
    assert cluster.to_dict() == old


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("extra_ns", {"magic": 1.0}, "extra_ns has .'magic'.; it takes function"),
        ("extra_ns", {"random": -1.0}, r"extra_ns\[random\] must be zero or positive"),
        ("bytes_by_size", {"up": [[1, 1]]}, "it takes read, write"),
        ("flops_by_size", {"fft.float32": [[1, 1]]}, "it takes matmul"),
        ("flops_by_size", {"matmul.float32": [[1, -1]]}, "must be positive"),
    ],
)
def test_bad_figures_are_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        Device.from_dict(plain(CPU) | {key: value})


# -- the time model -----------------------------------------------------------------------------


class Everything(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(1000, 64)
        self.linear = torch.nn.Linear(64, 64)
        self.norm = torch.nn.BatchNorm1d(64)

    def forward(self, ids):
        x = torch.nn.functional.gelu(self.linear(self.table(ids)))
        return (torch.dropout(self.norm(x), 0.1, True) ** 2).softmax(-1).sum()


def profiled(rows: int = 32):
    graph = ColoTracer().trace(Everything(), (torch.zeros(rows, dtype=torch.long),))
    return profile_graph(graph, set(graph.parameters))


def test_expensive_elements_are_counted_by_taking_kernels_apart():
    n = 32 * 64
    extras = {}
    for node, profile in profiled().items():
        forward, backward = kernels_of(node, profile, MEASURED)
        assert sum(k.work.kernels for k in forward) == profile.forward.kernels
        assert sum(k.work.kernels for k in backward) == profile.backward.kernels
        name = str(node.target).split(".")[1]
        extras[name] = [
            {k: v for x in ks for k, v in x.extra.items()} for ks in (forward, backward)
        ]
        if name == "embedding":  # only what is looked up is read
            assert forward[0].work.read_bytes < profile.forward.read_bytes / 2
    assert extras["gelu"] == [{"function": n}, {"function": 2 * n}]
    assert extras["native_dropout"][0] == {"random": n}
    assert extras["softmax"][0] == {"function": n, "reduction": 2 * n}
    assert extras["embedding"][0] == {"index": 32}
    assert extras["pow"][0] == {}
    assert extras["linear"] == [{}, {}]
    norm = next(v for k, v in extras.items() if "batch_norm" in k)
    assert norm[0]["variance"] == n


def test_table_devices_keep_their_roofline():
    for node, profile in profiled().items():
        kernels = [k for ks in kernels_of(node, profile, CPU) for k in ks]
        share = np.array([1.0, 0.5, 0.25])
        expected = sum(
            np.maximum(
                1e6 * w.flops * share / 5e10, 1e6 * (w.read_bytes + w.written_bytes) * share / 8e9
            )
            + 5.0 * w.kernels
            for w in (profile.forward, profile.backward)
        )
        assert np.allclose(node_us(kernels, CPU, share, share), expected)


def test_more_work_takes_longer():
    small, large = profiled(32), profiled(4096)
    for (a, p), (b, q) in zip(small.items(), large.items(), strict=True):
        less, more = (
            sum(float(node_us(k, MEASURED)) for k in kernels_of(n, profile, MEASURED))
            for n, profile in ((a, p), (b, q))
        )
        if q.forward.written_bytes > p.forward.written_bytes:
            assert less < more, a
        kernels = [k for ks in kernels_of(b, q, MEASURED) for k in ks]
        share = np.array([1.0, 0.5, 0.25, 0.125])
        assert (np.diff(node_us(kernels, MEASURED, share, share)) < 0).all() or not kernels


def test_small_products_run_at_a_lower_rate():
    def us(n: int) -> float:
        work = profiled()  # any: only its type is needed
        one = next(iter(work.values())).forward
        return float(Kernel(replace(one, flops=n, read_bytes=0), "float32").us(MEASURED))

    launch = MEASURED.launch_us
    assert us(10**9) - launch == pytest.approx(1e15 / 4e10)
    assert us(10**6) - launch == pytest.approx(1e12 / 1e10)


# -- measuring ----------------------------------------------------------------------------------

TINY = replace(
    QUICK, bytes=(16384, 2**20), sides=(32, 64), channels=(8,), lengths=(32,), seconds=0.001
)


def test_a_gpu_is_launched_for_while_it_computes():
    known = device("L4")  # without curves
    gpu = replace(known, bytes_by_size={"read": Curve.constant(known.bandwidth)})
    small, large = (Kernel(Work(1, n, n, 1), "float32") for n in (1_000, 10**9))
    assert node_us([small], gpu) == gpu.launch_us
    assert node_us([large], gpu) == pytest.approx(2e15 / gpu.bandwidth)
    for other in (CPU, known):
        us = other.launch_us + 2e15 / other.bandwidth
        assert node_us([large], other) == pytest.approx(us)


@pytest.mark.parametrize(("words", "slower"), [(1000, 1), (1001, 4)])
def test_rows_that_are_not_aligned_take_longer(words, slower):
    curves = {"matmul.float16": Curve.constant(1e12), "unaligned.float16": Curve.constant(2.5e11)}
    gpu = replace(device("A100-80G"), flops_by_size=curves)
    model = torch.nn.Linear(64, words, bias=False).half()
    graph = ColoTracer().trace(model, (torch.randn(4096, 64).half(),), {})
    ((node, profile),) = (
        (n, p) for n, p in profile_graph(graph, set(graph.parameters)).items() if p.forward.flops
    )
    forward, backward = kernels_of(node, profile, gpu)
    us = 2 * 4096 * 64 * words / 1e6
    assert node_us(forward, gpu) == pytest.approx(slower * us)
    assert node_us(backward, gpu) == pytest.approx(slower * us)  # of the weight alone


def test_this_device_is_measured():
    measured = measure_device(torch.device("cpu"), TINY)
    assert measured.measured
    assert measured.kind == "cpu"
    assert {"matmul.float32", "convolution.float32"} <= set(measured.flops_by_size)
    assert set(measured.peak_flops) == {"float32", "float64", "bfloat16"}
    assert 1e8 < measured.flops_per_s("float32") < 1e14
    assert 1e8 < measured.bandwidth < 1e13
    assert 0 < measured.launch_us < 1e4
    assert measured.extra_ns["random"] > measured.extra_ns["reduction"] / 10
    again = ClusterInfo((1,), measured, (Link(1e-5, 1e-9),))
    assert ClusterInfo.from_dict(yaml.safe_load(again.to_yaml())) == again


def test_sizes_that_take_longer_than_the_time_are_left_out():
    """The least one is always measured, and rounds end with the time."""
    effort = replace(TINY, sides=(32, 64, 4096), rounds=10_000, device_s=2.0)
    lines = []
    start = time.monotonic()
    measured = measure_device(torch.device("cpu"), effort, say=lines.append)
    assert time.monotonic() - start < 20  # the large products alone take longer
    assert measured.flops_by_size["matmul.float64"].sizes == (2.0 * 32**3, 2.0 * 64**3)
    assert not any("round 10000" in line for line in lines)
    none = measure_device(torch.device("cpu"), replace(effort, device_s=0.0))
    assert none.flops_by_size["matmul.float32"].sizes == (2.0 * 32**3,)


def test_a_bar_says_how_far_a_measurement_is():
    lines = []
    bar = Bar(lines.append, 4)
    bar("first")
    bar.at(2, "third")
    bar("fourth")
    bar("more than were expected")
    assert lines[0] == f"[{' ' * 20}]   0%  first"
    assert lines[1] == f"[{'=' * 10}{' ' * 10}]  50%  third"
    assert lines[2].endswith("75%  fourth")
    assert lines[3].startswith(f"[{'=' * 20}] 100%")


def test_a_core_is_shared_by_the_ranks_of_a_host(monkeypatch):
    """A call takes its processor time as often as there are ranks that take turns."""

    def call():
        end = time.process_time() + 0.002
        while time.process_time() < end:
            pass
        time.sleep(0.01)

    cpu = torch.device("cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert seconds_of(call, cpu, 0.01) >= 0.012
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    assert seconds_of(call, cpu, 0.01) == pytest.approx(3 * 0.002, rel=0.25)


def test_a_cluster_is_measured_and_planned_for(tmp_path):
    path, model = tmp_path / "out" / "cluster.yaml", tmp_path / "model.py"
    result = run("cluster", "--mesh", "2x1", "--quick", "--device", "cpu", "-o", str(path))
    assert "alpha us" in result.stdout
    assert "%  collectives of axis 0, 1 KiB ..." in result.stderr  # by the process that measures
    assert f"written to {path}" in result.stdout.replace("\n", "")
    cluster = ClusterInfo.load(path)
    assert cluster.mesh == (2, 1)
    assert cluster.device.measured
    assert cluster.links[0] != cluster.links[1]
    assert path.read_text().startswith("# measured by autopar cluster on ")
    model.write_text(
        "import torch\n"
        "def build_model(): return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU())\n"
        "def example_inputs(): return (torch.zeros(8, 64),)\n"
    )
    arguments = ("plan", str(model), "--cluster", str(path), "--no-baselines", "--json")
    plan = ShardingPlan.from_json(run(*arguments).stdout)
    assert ClusterInfo.from_dict(plan.cluster) == cluster


def _dies(rank: int, size: int) -> None:
    if rank == 1:
        os._exit(7)
    time.sleep(60)


def test_a_process_that_dies_ends_the_others():
    start = time.monotonic()
    with pytest.raises(
        EngineError, match=r"process 1 of 2 died .*exit code 7.*others were stopped"
    ):
        run_local(_dies, 2, ())
    assert time.monotonic() - start < 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mesh", "2xx"), "cannot read mesh '2xx'"),
        (("--device", "tpu"), "cannot measure a device 'tpu'; it is cpu or cuda"),
        (("--quick", "--thorough"), "a measurement is --quick or --thorough, not both"),
    ],
)
def test_bad_options(arguments, message):
    result = run("cluster", *arguments, code=2)
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_no_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MeshError, match="sees no CUDA device"):
        measure_cluster("1", "cuda")


def test_the_backward_of_a_grouped_convolution_costs_two_forwards():
    model = torch.nn.Conv2d(64, 64, 3, padding=1, groups=64)
    graph = ColoTracer().trace(model, (torch.zeros(2, 64, 16, 16),))
    profile = profile_model(graph, graph.parameters).nodes
    (node,) = profile
    forward, backward = kernels_of(node, profile[node], device("A100-80G"))
    assert sum(k.work.flops for k in backward) <= 2 * sum(k.work.flops for k in forward)


class CausalAttention(torch.nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.causal, self.q = causal, torch.nn.Parameter(torch.zeros(1, 2, 64, 8))

    def forward(self):
        q = self.q
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=self.causal)


@pytest.mark.parametrize("cluster", [MEASURED, device("A100-80G")])
def test_causal_attention_takes_half_the_flops(cluster):
    """Torch counts the pairs of a query and a later key, and kernels leave them out."""
    flops = {}
    for causal in (False, True):
        graph = ColoTracer().trace(CausalAttention(causal), ())
        profile = profile_model(graph, graph.parameters).nodes
        (node,) = (n for n in profile if "dot_product" in str(n.target))
        both = kernels_of(node, profile[node], cluster)
        flops[causal] = [sum(k.work.flops for k in kernels) for kernels in both]
    share = 65 / 128
    assert flops[True] == [int(share * n) for n in flops[False]]
