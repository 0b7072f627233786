"""The profile, made from the graph alone, against what torch counts on the real eager run."""

import functools
import random

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn

from autopar import ColoTracer
from autopar.cluster.cluster import ClusterInfo, parse_bytes, parse_mesh
from autopar.cluster.device import device
from autopar.cluster.link import Link
from autopar.cluster.local import as_cluster, named_gpu
from autopar.planner.planner import trainable_inputs
from autopar.profiler.memory import memory_timeline
from autopar.profiler.model import largest, profile_model, substitute
from autopar.profiler.profile import profile_graph
from autopar.profiler.tape import maximum
from benchmarks.profile_accuracy import measure
from tests.models import CASES, LanguageModel


def profiled(model, *args, sums_in_place=False, **kwargs):
    graph = ColoTracer().trace(model, args, kwargs)
    return profile_model(graph, trainable_inputs(graph, model), sums_in_place=sums_in_place)


def assert_exact(model, *args, **kwargs):
    """FLOPs, saved bytes and peak equal those of the real run."""
    predicted = profiled(model, *args, **kwargs)
    real = measure(model, lambda: model(*args, **kwargs))
    assert predicted.flops == real.flops
    assert predicted.saved_bytes == real.saved_bytes
    assert predicted.peak_bytes == real.peak_bytes
    return predicted, real


class Program(nn.Module):
    """Runs a function of itself and the input; parameters as given."""

    def __init__(self, run, **shapes):
        super().__init__()
        torch.manual_seed(0)
        self.run = run
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return self.run(self, x)


# models


@pytest.mark.parametrize("name", ["mlp", "resnet", "vit"])
def test_models_are_exact(name):
    case = CASES[name]
    predicted, _ = assert_exact(case.build(), **case.batch(0))
    assert predicted.flops > 0


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_language_models_are_exact(dropout):
    # attention with dropout is another kernel; Python keeps the logits until the loss returns
    model, batch = LanguageModel(2, dropout).train(), CASES["gpt2"].batch(0)
    predicted = profiled(model, **batch)
    real = measure(model, lambda: model(**batch))
    assert predicted.flops == real.flops
    # captured, the last token has logits that are ignored (`tracer/token_loss.py`)
    ids = batch["input_ids"]
    further = len(ids) * (4 * model.gpt2.config.vocab_size + 8)
    assert predicted.saved_bytes == real.saved_bytes + further
    assert predicted.peak_bytes == pytest.approx(real.peak_bytes, rel=0.03)


def test_a_frozen_model_saves_less():
    case = CASES["mlp"]
    model = case.build()
    complete, _ = assert_exact(model, **case.batch(0))
    for p in (*model.up.parameters(), *model.norm.parameters()):
        p.requires_grad_(False)
    frozen, _ = assert_exact(model, **case.batch(0))
    assert frozen.flops < complete.flops
    assert frozen.saved_bytes < complete.saved_bytes


def view_requires_grad(self, x):
    h = x[:, None]
    h.requires_grad = True
    return ((h @ self.w) * h).sum()


def value_requires_grad(self, x):
    h = x.tanh().requires_grad_()
    return (h.sin() @ self.w).sum()


def input_requires_grad(self, x):
    x.requires_grad_(True)
    return (x @ self.w).exp().sum()


def detached_value_requires_grad(self, x):
    h = (x @ self.w).tanh().detach().requires_grad_()
    return (h @ self.v).sum()


LEAVES = [
    view_requires_grad, value_requires_grad, input_requires_grad, detached_value_requires_grad,
]  # fmt: skip


@pytest.mark.parametrize("run", LEAVES, ids=lambda f: f.__name__)
def test_gradients_of_values_that_the_forward_makes_leaves(run):
    model, x = Program(run, w=(16, 16), v=(16, 16)), torch.randn(64, 16)
    graph = ColoTracer().trace(model, (x,))
    predicted = profile_model(graph, graph.parameters, sums_in_place=False)

    def fresh():
        x.grad = None
        return model(x.requires_grad_(False))

    real = measure(model, fresh)
    assert predicted.flops == real.flops
    assert predicted.saved_bytes == real.saved_bytes
    assert predicted.peak_bytes == real.peak_bytes
    # the captured graph asks for no such gradient
    planned = profile_model(graph, graph.parameters, eager=False)
    assert planned.flops < predicted.flops


# what makes a figure differ from a sum over operators


def relu_in_place(self, x):
    return F.relu(x @ self.w, inplace=True).sum()


def relu_in_place_on_a_view(self, x):
    return F.relu((x @ self.w).view(8, 8, 16), inplace=True).exp().sum()


def relu_in_place_on_a_linear(self, x):
    return F.relu(F.linear(x.view(1, 8, 8, 16), self.w, self.b), inplace=True).exp().sum()


def sum_in_place_on_a_view(self, x):
    h = (x @ self.w).t()
    h += self.c.t()
    return h.cos().sum()


def silu_in_place(self, x):
    return F.silu(x @ self.w, inplace=True).sum()


def dropped(self, x):
    return F.dropout(x @ self.w, 0.5).sum()


def dropped_by_nothing(self, x):
    return (F.dropout(x @ self.w, 0.0) * self.b).sum()


def expanded(self, x):
    return (self.b.expand(64, 16).exp() + x @ self.w).sum()


def tied(self, x):
    return F.linear(torch.tanh(x @ self.w), self.w).exp().sum()


def same_operand_twice(self, x):
    h = x @ self.w
    return (h * h).sum()


def shared_gradient(self, x):
    return (x @ self.w + self.b + self.c).sum()


def parameter_gradient_is_passed_on(self, x):
    return (self.w + self.v).sum() + x.sum()


def cast(self, x):
    return (x.double() @ self.w.double()).float().sum()


def views(self, x):
    h = x @ self.w
    first, second = h.chunk(2, dim=1)
    return (first.t().exp() * second.t().sin()).sum() + h[0].cos().sum()


def copies_in_backward(self, x):
    return ((x @ self.w).view(8, 8, 16).transpose(0, 1).reshape(64, 16) @ self.w).sum()


def statistics(self, x):
    h = x @ self.w
    return ((h - h.mean(0)) / h.var(0).sqrt()).softmax(-1).pow(2).sum()


def looked_up(self, x):
    rows = (x[:, 0] > 0).long()
    return F.cross_entropy(F.embedding(rows, self.w) @ self.w, rows)


def detached(self, x):
    return (torch.tanh(x @ self.w).exp().detach() * self.b).sum()


def several_results(self, x):
    h = x @ self.w
    return {"h": h.exp(), "g": h.sin()}


PROGRAMS = [
    relu_in_place, relu_in_place_on_a_view, relu_in_place_on_a_linear, sum_in_place_on_a_view,
    silu_in_place, dropped, dropped_by_nothing, expanded, tied, same_operand_twice,
    shared_gradient, parameter_gradient_is_passed_on, cast, views, copies_in_backward, statistics,
    looked_up, several_results,
]  # fmt: skip


@pytest.mark.parametrize("run", PROGRAMS, ids=lambda f: f.__name__)
def test_programs_are_exact(run):
    model = Program(run, w=(16, 16), v=(16, 16), b=(16,), c=(64, 16))
    assert_exact(model, torch.randn(64, 16))


def test_what_no_gradient_reaches_is_given_up_in_forward():
    model = Program(detached, w=(16, 16), b=(16,))
    predicted, _ = assert_exact(model, torch.randn(64, 16))
    assert not predicted.backward.flops


def test_in_place_is_what_the_module_does_not_what_was_captured():
    model = Program(relu_in_place, w=(16, 16))
    graph = ColoTracer().trace(model, (torch.randn(64, 16),))

    def forward_peak(eager):
        profiles = profile_graph(graph, graph.parameters, eager=eager)
        timeline = memory_timeline(graph, profiles, graph.parameters)
        steps = zip(timeline.changes, timeline.live_bytes, strict=True)
        return max(live for change, live in steps if change.phase == "forward")

    value = 64 * 16 * 4
    assert (forward_peak(eager=True), forward_peak(eager=False)) == (value + 4, 2 * value)


def test_gradients_that_meet_are_summed_in_place_without_a_mode():
    model = Program(lambda self, x: (self.w.sin() + self.w.cos() + x).sum(), w=(64, 16))
    x = torch.randn(64, 16)
    _, real = assert_exact(model, x)
    in_place = profiled(model, x, sums_in_place=True)
    assert in_place.peak_bytes == real.allocated_bytes

    def allocated(profile):
        return sum(max(c.delta_bytes, 0) for c in profile.timeline.changes)

    assert allocated(profiled(model, x)) - allocated(in_place) == 64 * 16 * 4


def test_a_gradient_that_is_a_view_is_never_summed_into():
    model, x = Program(tied, w=(16, 512)), torch.randn(2, 16)
    _, real = assert_exact(model, x)
    assert profiled(model, x, sums_in_place=True).peak_bytes == real.allocated_bytes


class Random(nn.Module):
    """A random program; every value is dropped after its last use, as a graph does."""

    UNARY = (torch.exp, torch.tanh, F.relu, F.gelu, torch.neg, lambda t: t.t().contiguous().t())
    BINARY = (torch.add, torch.mul, torch.matmul, lambda a, b: torch.cat([a, b])[: len(a)])

    def __init__(self, seed, size=8):
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(size, size)) for _ in range(3))
        steps = []
        for number in range(4, 18):
            kind = draw.choice((self.UNARY, self.BINARY))
            arity = 1 if kind is self.UNARY else 2
            recent = [*range(4), *range(max(4, number - 4), number)]
            steps.append((draw.choice(kind), draw.choices(recent, k=arity), number))
        self.steps, self.last = [], {steps[-1][2]: len(steps)}
        for function, used, number in reversed(steps):
            if number in self.last:  # what nothing needs is not captured
                self.last = dict.fromkeys(used, number) | self.last
                self.steps.insert(0, (function, used, number))

    def forward(self, x):
        values = {0: x, **{i + 1: w for i, w in enumerate(self.weights)}}
        del x
        for function, used, number in self.steps:
            values[number] = function(*(values[u] for u in used))
            for u in {*used}:
                if self.last[u] == number:
                    del values[u]
        return values[self.steps[-1][2]].sum()


@pytest.mark.parametrize("seed", range(12))
def test_random_programs_are_exact(seed):
    model, x = Random(seed), torch.randn(8, 8)
    if model(x).requires_grad:
        assert_exact(model, x)


# the shape of the profile


def test_identical_layers_are_profiled_once():
    def distinct(layers):
        graph = ColoTracer().trace(LanguageModel(layers), (), CASES["gpt2"].batch(0))
        profiles = profile_graph(graph, graph.parameters)
        return len({id(p) for p in profiles.values()}), len(profiles)

    (shallow, few), (deep, many) = distinct(2), distinct(5)
    assert deep == shallow
    assert many > 1.5 * few


def test_bytes_and_transients_of_an_operator():
    model = Program(lambda self, x: F.linear(x, self.w, self.b).sum(), w=(16, 8), b=(16,))
    graph = ColoTracer().trace(model, (torch.randn(4, 8),))
    profiles = {n.name: p for n, p in profile_graph(graph, graph.parameters).items()}
    linear = profiles["linear"]
    assert linear.forward.read_bytes == 4 * (4 * 8 + 16 * 8 + 16)
    assert linear.forward.written_bytes == 4 * 4 * 16
    assert (linear.forward.flops, linear.backward.flops) == (2 * 4 * 8 * 16, 2 * 4 * 8 * 16)
    assert (linear.tape.saved_operands, linear.tape.saved_results) == ((0,), ())
    assert linear.tape.saved_own_bytes == 0
    assert linear.differentiable and not linear.aliases_input
    # the gradient of a sum is one number: nothing else is read of it
    assert profiles["sum_1"].backward.written_bytes == 0


def test_modules_add_up():
    profile = profiled(LanguageModel(2), **CASES["gpt2"].batch(0))
    rows = {row.path: row for row in profile.modules()}
    model_row = rows[""]
    assert (model_row.forward, model_row.backward) == (profile.forward, profile.backward)
    assert model_row.saved_bytes == profile.saved_bytes
    assert model_row.parameters == sum(p.numel() for p in LanguageModel(2).parameters())
    blocks = [rows[f"gpt2.transformer.h.{i}"] for i in range(2)]
    assert blocks[0].forward.flops == blocks[1].forward.flops
    assert blocks[0].parameters == blocks[1].parameters
    parts = [
        r for r in rows.values() if r.path.startswith("gpt2.transformer.h.0.") and r.depth == 5
    ]
    assert sum(r.parameters for r in parts) == blocks[0].parameters
    # tied: in both modules, once in the model
    assert rows["gpt2.lm_head"].parameters == rows["gpt2.transformer.wte"].parameters > 0


# symbolic


@functools.cache
def formulas_of(name):
    case = CASES[name]
    model = case.build()
    graph = ColoTracer(dynamic=True).trace(model, (), case.batch(0))
    return profile_model(graph, trainable_inputs(graph, model), symbolic=True)


@pytest.mark.parametrize("name", ["mlp", "resnet", "gpt2"])
def test_symbolic_profiles_equal_numeric_ones(name):
    model, batch, formulas = CASES[name].build(), CASES[name].batch(0), formulas_of(name)
    names = ["batch", "sequence"] if name == "gpt2" else ["batch"]
    assert names == [*formulas.symbols]
    at = dict(zip(names, (5, 7), strict=False))
    cut = {k: v[tuple(map(slice, at.values()))].clone() for k, v in batch.items()}
    numeric = profiled(model, sums_in_place=True, **cut)
    profile = substitute(formulas, at)
    assert not profile.symbols
    assert profile.forward.flops == numeric.forward.flops
    assert profile.backward.flops == numeric.backward.flops
    # where sizes are symbols, the last token has no logits (`tracer/token_loss.py`)
    row = 8 * 5 * model.gpt2.config.vocab_size if name == "gpt2" else 0
    label = 8 * 5 if name == "gpt2" else 0
    assert profile.saved_bytes + row + label == numeric.saved_bytes
    assert profile.peak_bytes + 3 * row == numeric.peak_bytes  # also logits, and their gradient
    if name == "mlp":  # others are captured with fewer no-ops where sizes are known
        assert (profile.forward, profile.backward) == (numeric.forward, numeric.backward)
        deltas = [[c.delta_bytes for c in p.timeline.changes] for p in (profile, numeric)]
        assert deltas[0] == deltas[1]
        formula = formulas.peak_bytes.subs({formulas.symbols[n]: size for n, size in at.items()})
        assert formula == numeric.peak_bytes


def test_a_dynamic_graph_is_profiled_for_its_example():
    batch, formulas = CASES["mlp"].batch(0), formulas_of("mlp")
    example = profile_model(formulas.graph, formulas.graph.parameters)
    assert example.symbols == {}
    assert example.flops == substitute(formulas, {"batch": len(batch["x"])}).flops


def test_the_largest_batch_that_fits():
    formulas, budget = formulas_of("gpt2"), 10_000_000
    batch = largest(formulas, "batch", budget, {"sequence": 16})
    at = [substitute(formulas, {"batch": n, "sequence": 16}).peak_bytes for n in (batch, batch + 1)]
    assert at[0] <= budget < at[1]
    assert largest(formulas, "batch", 10, {"sequence": 16}) == 0
    with pytest.raises(ValueError, match=r"also depends on .*sequence"):
        largest(formulas, "batch", budget)
    with pytest.raises(ValueError, match=r"no dynamic size is called 'length'.*batch"):
        substitute(formulas, {"length": 3})
    fixed = ColoTracer().trace(CASES["mlp"].build(), (), CASES["mlp"].batch(0))
    with pytest.raises(ValueError, match="dynamic=True"):
        profile_model(fixed, fixed.parameters, symbolic=True)


def test_the_maximum_of_formulas_leaves_out_what_is_never_the_largest():
    a, b = sympy.symbols("a b", integer=True, positive=True)
    assert maximum([3, 7, 5]) == 7
    assert maximum([a * b, 2 * a * b, a]) == 2 * a * b
    assert maximum([a - 1, a * b, sympy.Integer(1)]) == a * b
    assert maximum([a, b, 0]) == sympy.Max(a, b)


# clusters


def test_sizes_and_meshes_parse():
    assert parse_bytes("40GiB") == 40 * 2**30
    assert parse_bytes("512 MB") == 512e6
    assert parse_bytes("0.5", of=100.0) == 50.0
    assert parse_bytes("40B") == 40.0
    assert parse_bytes("1B", of=100.0) == 1.0
    assert parse_bytes(1, of=100.0) == 100.0
    for bare in (40, 2.0, "40"):
        with pytest.raises(ValueError, match=r"did you mean '\d+GiB'"):
            parse_bytes(bare, of=100.0)
    assert parse_mesh("2x4") == ((2, 4), ())
    assert parse_mesh("node=2, gpu=4") == ((2, 4), ("node", "gpu"))
    for bad in ["40 potatoes", "-1GiB", "0"]:
        with pytest.raises(ValueError, match=r"memory size"):
            parse_bytes(bad)
    for bad in ["", "2x", "0x2", "two", "node=2,4", "node=2xgpu=4", "node=0", "1st=2"]:
        with pytest.raises(ValueError, match="mesh"):
            parse_mesh(bad)


def test_clusters_round_trip_through_yaml(tmp_path):
    import yaml

    cluster = ClusterInfo.of("2x8", "H100").with_memory("60GiB")
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(cluster.to_dict()))
    assert as_cluster(path) == cluster
    assert cluster.links[0] != cluster.links[1]  # between nodes, inside a node
    named = as_cluster("node=2,gpu=8")
    path.write_text(named.to_yaml())
    assert as_cluster(path) == named
    assert named.axis_names == ("node", "gpu") and named.mesh == (2, 8)
    assert [cluster.coords(r) for r in (0, 1, 8)] == [(0, 0), (0, 1), (1, 0)]


@pytest.mark.parametrize(
    ("called", "gib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "H100"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "A100-80G"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "A100-40G"),
        ("NVIDIA GeForce RTX 4090", 23.6, "4090"),
        ("Tesla K80", 11.2, "Tesla K80"),
    ],
)
def test_gpus_by_the_name_that_the_driver_gives(called, gib, name, caplog):
    gpu = named_gpu(called, gib * 2**30)
    assert gpu.name == name
    assert gpu.kind == "cuda"
    assert gpu.memory_bytes == gib * 2**30
    assert ("autopar cluster" in caplog.text) is (name == called)


def test_bad_clusters_are_refused():
    with pytest.raises(ValueError, match=r"unknown device 'H1OO'.*H100"):
        device("H1OO")
    with pytest.raises(ValueError, match=r"links\[0\].beta must be positive"):
        ClusterInfo((2,), device("cpu"), (Link(1e-6, float("nan")),))
    with pytest.raises(ValueError, match="one link per axis"):
        ClusterInfo((2, 2), device("cpu"), (Link(1e-6, 1e-9),))
    with pytest.raises(ValueError, match="a different name for each of its 2 axes, got gpu, gpu"):
        ClusterInfo.of("gpu=2,gpu=2")
    with pytest.raises(ValueError, match="does not exist"):
        as_cluster("nowhere.yaml")
    with pytest.raises(ValueError, match=r"unknown keys \['meshes'\]"):
        ClusterInfo.from_dict({"meshes": [2], "mesh": [2], "device": "cpu"})
