"""How well the time model ranks and predicts operators on this machine's CPU or GPU.

The device is measured as in `autopar cluster`. Then three models are captured for training: GPT-2
(width 768, 4 sequences of 128 tokens), ResNet-50 and ViT-B/16 (8 images of 224 pixels). The
transformers have one layer, because all layers are the same. Every distinct operator call runs
alone, forward and backward, on the values it gets in the model. A GPU gets 16 sequences of 1024
tokens and 64 images, the transformers in bfloat16. Calls that launch no kernel (views) are left
out.

The time of a call is the median of its best times over rounds through the whole model, so that a
disturbance hits one round and not one operator. The headline is Spearman's rank correlation of
predicted and measured times, because a planner compares times.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.fx as fx
from rich.table import Table
from torch.utils import _pytree as pytree

from autopar.cluster.device import Device
from autopar.ir.aliasing import tensors_of
from autopar.ir.graph import ModelGraph, operands
from autopar.profiler.clock import seconds_of
from autopar.profiler.measure import effort_for, measure_device
from autopar.profiler.profile import NodeProfile, profile_graph
from autopar.profiler.time_model import kernels_of, node_us
from autopar.tracer import ColoTracer
from benchmarks import common
from benchmarks.common import Row, console

TARGET = 0.95
Built = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass
class Sample:
    """One distinct operator call.

    Args:
        name: of its node.
        operator: ATen's name.
        count: number of such calls in the graph.
        predicted_us: forward, backward.
        measured_us: per round forward, backward.
    """

    name: str
    operator: str
    count: int
    predicted_us: tuple[float, float]
    measured_us: list[tuple[float, float]] = field(default_factory=list)

    @property
    def predicted(self) -> float:
        return sum(self.predicted_us)

    @property
    def measured(self) -> float:
        return sum(self.each_way)

    @property
    def each_way(self) -> tuple[float, float]:
        """Medians over the rounds, forward and backward."""
        forward, backward = zip(*self.measured_us, strict=True)
        return statistics.median(forward), statistics.median(backward)


def gpt2(size: str) -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = GPT2Config(
        n_layer=1, vocab_size=1009 if size == "quick" else 50257, use_cache=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    batch, length = {"quick": (1, 128), "cpu": (4, 128), "cuda": (16, 1024)}[size]
    ids = torch.randint(0, config.vocab_size, (batch, length))
    return _half(GPT2LMHeadModel(config), size), (), {"input_ids": ids, "labels": ids}


def resnet50(size: str) -> Built:
    import timm

    batch, side = {"quick": (2, 64), "cpu": (8, 224), "cuda": (64, 224)}[size]
    return timm.create_model("resnet50"), (torch.randn(batch, 3, side, side),), {}


def vit(size: str) -> Built:
    import timm

    batch = {"quick": 1, "cpu": 8, "cuda": 64}[size]
    model = _half(timm.create_model("vit_base_patch16_224", depth=1), size)
    return model, (torch.randn(batch, 3, 224, 224, dtype=next(model.parameters()).dtype),), {}


def _half(model: torch.nn.Module, size: str) -> torch.nn.Module:
    """The model in bfloat16 on a GPU."""
    return model.bfloat16() if size == "cuda" else model


MODELS: dict[str, Callable[[str], Built]] = {"GPT-2": gpt2, "ResNet-50": resnet50, "ViT": vit}


# -- measuring ----------------------------------------------------------------------------------


class _Timed(fx.Interpreter):
    """Runs the graph on real tensors, and times every call of `samples`.

    Args:
        samples: by the first node of each distinct call.
        profiles: of all calls.
        budget_s: seconds per call, forward and backward.
    """

    def __init__(
        self,
        graph: ModelGraph,
        samples: dict[fx.Node, Sample],
        profiles: dict[fx.Node, NodeProfile],
        budget_s: float,
        device: torch.device,
    ) -> None:
        super().__init__(graph.gm)
        self.samples, self.profiles, self.budget_s = samples, profiles, budget_s
        self.device = device
        x = torch.zeros(1, device=device, requires_grad=True)
        one = torch.ones_like(x)
        with torch.enable_grad():
            y = x.view_as(x)
        # entering the autograd engine, which a training step does once
        self.entry_s = seconds_of(lambda: torch.autograd.grad(y, x, one, retain_graph=True), device)

    def run_node(self, n: fx.Node) -> Any:
        if n in self.samples:
            self.samples[n].measured_us.append(self.timed(n))
        return super().run_node(n)

    def timed(self, node: fx.Node) -> tuple[float, float]:
        """Microseconds forward and backward."""
        profile = self.profiles[node]
        trainable = {operands(node)[e.operand] for e in profile.tape.emitted}
        inputs = {}
        for n in node.all_input_nodes:
            inputs[n] = self.env[n]
            if isinstance(inputs[n], torch.Tensor):
                inputs[n] = inputs[n].detach().requires_grad_(n in trainable)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), inputs.__getitem__)

        def forward() -> Any:
            return node.target(*args, **kwargs)  # type: ignore[operator]

        with torch.enable_grad():
            forward_s = seconds_of(forward, self.device, self.budget_s)
            if not profile.backward.kernels:
                return 1e6 * forward_s, 0.0
            result = next(t for t in tensors_of(forward()) if t.requires_grad)
            leaves = [x for n, x in inputs.items() if n in trainable]
            seed = torch.randn_like(result)

            def backward() -> Any:
                return torch.autograd.grad(
                    result, leaves, seed, retain_graph=True, allow_unused=True
                )

            backward_s = seconds_of(backward, self.device, self.budget_s) - self.entry_s
        return 1e6 * forward_s, 1e6 * max(backward_s, 0.1 * (backward_s + self.entry_s))


def sampled(built: Built, device: Device, rounds: int, budget_s: float) -> list[Sample]:
    """Capture a model, and predict and measure its distinct operator calls."""
    where = torch.device(device.kind)
    model = built[0].train().to(where)
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(where), built[1:])
    graph = ColoTracer(device.kind).trace(model, args, kwargs)
    profiles = profile_graph(graph, set(graph.parameters))
    samples: dict[fx.Node, Sample] = {}
    first: dict[int, Sample] = {}
    for node, profile in profiles.items():
        if id(profile) in first:
            first[id(profile)].count += 1
        elif profile.forward.kernels:
            forward, backward = kernels_of(node, profile, device)
            us = float(node_us(forward, device)), float(node_us(backward, device))
            samples[node] = first[id(profile)] = Sample(node.name, str(node.target), 1, us)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    names = (*graph.parameters.values(), *graph.buffers.values())
    inputs = [tensors[n].detach().clone() for n in names]
    inputs += [t.to(where) for t in graph.constants.values()]
    inputs += pytree.tree_leaves((args, kwargs))
    for _ in range(rounds):
        with torch.no_grad():
            _Timed(graph, samples, profiles, budget_s, where).run(*inputs)
    return list(samples.values())


# -- judging ------------------------------------------------------------------------------------


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1. Equal values share the mean of their ranks."""
    _, which, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's correlation of the ranks."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def rows_of(case: str, samples: Sequence[Sample], target: float | None) -> Iterator[Row]:
    """Rank correlation and errors. The target of the correlation becomes one of 1 - correlation."""
    predicted, measured = [s.predicted for s in samples], [s.measured for s in samples]
    errors = [abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)]
    rho = spearman(predicted, measured)
    yield Row(case, "distinct operator calls", len(samples), "")
    yield Row(case, "Spearman", rho, "")
    bound = None if target is None else round(1 - target, 6)
    yield Row(case, "1 - Spearman", 1 - rho, "", bound)
    for k, way in enumerate(("forward", "backward")):
        pairs = [(s.predicted_us[k], s.each_way[k]) for s in samples if s.each_way[k]]
        if len(pairs) > 1:
            yield Row(case, f"Spearman {way}", spearman(*zip(*pairs, strict=True)), "")
    yield Row(case, "median relative error", 100 * statistics.median(errors), "%")
    total = sum(s.count * s.measured for s in samples)
    step = sum(s.count * s.predicted for s in samples)
    yield Row(case, "all calls, predicted / measured", step / total, "")


def print_worst(case: str, samples: Sequence[Sample], count: int) -> None:
    """The calls whose errors weigh most in a step."""
    table = Table(title=f"{case}: furthest off", title_justify="left", box=None, pad_edge=False)
    for column in ("node", "operator"):
        table.add_column(column, no_wrap=True)
    for column in ("calls", "measured us", "predicted us", "forward", "backward"):
        table.add_column(column, justify="right", no_wrap=True)
    by_weight = sorted(samples, key=lambda s: -s.count * abs(s.predicted - s.measured))
    for s in by_weight[:count]:
        ways = (
            f"{p / m:.2f} x" if m else "" for p, m in zip(s.predicted_us, s.each_way, strict=True)
        )
        figures = (str(s.count), f"{s.measured:.0f}", f"{s.predicted:.0f}")
        table.add_row(s.name, s.operator, *figures, *ways)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--worst", type=int, default=8, help="calls to list per model")
    parser.add_argument(
        "--rounds", type=int, default=None, help="rounds through each model; 3 by default"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="[default: the GPU, if there is one]"
    )
    options = parser.parse_args(arguments)
    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    console.print(common.machine(), markup=False)
    rounds = options.rounds or (1 if options.quick else 3)
    start = time.perf_counter()
    device = measure_device(
        torch.device(kind), effort_for(kind, "quick" if options.quick else "thorough")
    )
    console.print(
        f"measured {device.name} in {time.perf_counter() - start:.0f} s; {rounds} round(s) through "
        "each model; calls that launch no kernel are left out",
        markup=False,
    )
    rows: list[Row] = []
    everything: list[Sample] = []
    target = None if options.quick else TARGET
    budget_s = 0.15 if kind == "cpu" and not options.quick else 0.02
    for case, build in MODELS.items():
        start = time.perf_counter()
        samples = sampled(build("quick" if options.quick else kind), device, rounds, budget_s)
        console.print(f"{case}: {len(samples)} calls, {time.perf_counter() - start:.0f} s")
        print_worst(case, samples, options.worst)
        rows += rows_of(case, samples, target)
        everything += samples
    rows += rows_of("all", everything, target)
    headline = "Spearman of predicted and measured operator times: " + ", ".join(
        f"{row.case} {row.value:.3f}" for row in rows if row.metric == "Spearman"
    )
    return common.finish("Operator times", rows, headline, options.json)


if __name__ == "__main__":
    sys.exit(main())
