"""Peak memory against added FLOPs: autopar's schedules, checkpointing, torch's partitioner.

One training step (forward, backward, gradients made) in float32 on the CPU, without dropout. Per
method, from real runs:

* peak: live bytes (`autopar.testing.live_memory.LiveMemory`: tensors made in the step, without
  gradients of parameters), divided by eager PyTorch's.
* added FLOPs: percent of eager's forward and backward. Operators without a formula (norms,
  activations, sums) count one per element, so that recomputing them is not free.

autopar gets ten budgets, and the peak of every other method: there it must not add more FLOPs than
that method. `known` are points of an earlier study, whose models are not known in every detail
(vocabulary, batch).
"""

from __future__ import annotations

import copy
import gc
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.subplots
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import nn
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from autopar import ClusterInfo, autoplan
from autopar.comm.groups import planning_groups
from autopar.ir.aliasing import tensors_of
from autopar.passes.apply_sharding import apply_sharding
from autopar.passes.lower import TracedStep, lower, trace_step
from autopar.passes.pipeline import LowerOptions
from autopar.profiler.counting import Recorder
from autopar.runtime.program import bind, boxed
from autopar.schedule.order import in_order
from autopar.schedule.pareto import ScheduleFront, SchedulePoint
from autopar.schedule.program import Schedule
from benchmarks import common
from benchmarks.common import Row, console
from tests.memory import LiveActivations, without_gradients

BUDGETS = (0.8, 0.65, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.12, 0.1)
TORCH_BUDGETS = (1.0, 0.75, 0.5, 0.25, 0.1, 0.0)
SOLVE_S = 10.0
_COLORS = ("#3b6ea5", "#d9822b", "#b0aba3", "#b3261e")
_SAVED = ("mm", "addmm", "bmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu")

logging.getLogger("transformers").setLevel(logging.ERROR)


class LanguageModel(nn.Module):
    """A causal language model and its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, labels=input_ids).loss


class Classifier(nn.Module):
    """An image classifier and its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.model(x), y)


@dataclass(frozen=True)
class Case:
    """A model with one batch.

    Args:
        make: the model.
        batch: its arguments.
        blocks: paths of the lists whose modules are checkpointed.
        known: (peak over eager's, added FLOPs in percent).
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[torch.Tensor, ...]]
    blocks: tuple[str, ...]
    known: tuple[tuple[float, float], ...] = ()


def gpt2(layers: int, vocabulary: int, length: int, width: int = 768) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=layers, vocab_size=vocabulary, n_positions=length, n_embd=width,
        n_head=width // 64, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LanguageModel(GPT2LMHeadModel(config))


def llama(layers: int, vocabulary: int, length: int, width: int = 1024) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=width // 64, vocab_size=vocabulary, max_position_embeddings=length,
        use_cache=False,
    )  # fmt: skip
    return LanguageModel(LlamaForCausalLM(config))


def images(name: str, **options: Any) -> nn.Module:
    import timm

    return Classifier(timm.create_model(name, **options))


def _text(vocabulary: int, length: int) -> tuple[torch.Tensor, ...]:
    return (torch.randint(0, vocabulary, (1, length)),)


def _pictures(size: int, classes: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 3, size, size), torch.randint(0, classes, (2,))


_GPT2, _LLAMA = ("model.transformer.h",), ("model.model.layers",)
_RESNET = tuple(f"model.layer{k}" for k in range(1, 5))
_GPT2_KNOWN = ((0.494, 1.4), (0.321, 12.4), (0.188, 20.8), (0.142, 21.9))
_LLAMA_KNOWN = ((0.590, 0.3), (0.450, 8.2), (0.179, 24.3))
_RESNET_KNOWN = ((0.535, 0.4), (0.445, 2.1), (0.380, 3.6), (0.315, 8.5))
CASES = (
    Case("GPT-2", partial(gpt2, 12, 50257, 512), partial(_text, 50257, 512), _GPT2),
    Case(
        "GPT-2, vocabulary 1000", partial(gpt2, 12, 1000, 512), partial(_text, 1000, 512),
        _GPT2, _GPT2_KNOWN,
    ),
    Case(
        "Llama-style", partial(llama, 8, 1000, 512), partial(_text, 1000, 512),
        _LLAMA, _LLAMA_KNOWN,
    ),
    Case(
        "ResNet-50", partial(images, "resnet50"), partial(_pictures, 224, 1000),
        _RESNET, _RESNET_KNOWN,
    ),
    Case(
        "ViT-B/16", partial(images, "vit_base_patch16_224"), partial(_pictures, 224, 1000),
        ("model.blocks",),
    ),
)  # fmt: skip
QUICK = (
    Case("GPT-2, 4 layers", partial(gpt2, 4, 500, 64, 128), partial(_text, 500, 64), _GPT2),
    Case(
        "ResNet-18", partial(images, "resnet18", num_classes=10), partial(_pictures, 64, 10),
        _RESNET,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One step.

    Args:
        peak_bytes: live, without gradients of parameters.
        flops: of forward and backward.
    """

    peak_bytes: int
    flops: float


class StepFlops(Recorder):
    """Counts the FLOPs of what is dispatched, as `Op.flops` does.

    Attributes:
        total: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        work, _ = self.take()
        if work.kernels:
            elements = max((t.numel() for t in tensors_of((args, kwargs, out))), default=0)
            self.total += float(work.flops or elements)
        return out


def measure(run: Callable[[], torch.Tensor], parameters: Sequence[torch.Tensor]) -> Measured:
    """Each figure from a step of its own, as the counters would disturb each other."""
    for p in parameters:
        p.grad = None
    gc.collect()
    with LiveActivations() as live:
        loss = run()
        live.start_backward()
        loss.backward()
    peak = live.peak_without_gradients(parameters)
    for p in parameters:
        p.grad = None
    with StepFlops() as counter:
        run().backward()
    return Measured(peak, counter.total)


class _Segment(nn.Module):
    """Blocks that are checkpointed as one."""

    def __init__(self, blocks: Sequence[nn.Module], **options: Any) -> None:
        super().__init__()
        self.blocks, self.options = nn.ModuleList(blocks), options

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        def run(x: Any) -> Any:
            for block in self.blocks:
                x = block(x, *args, **kwargs)
            return x

        return checkpoint(run, x, use_reentrant=False, **self.options)


def checkpointed(model: nn.Module, case: Case, group: int, every: int = 1, **options: Any) -> Any:
    """A copy in which segments of `group` blocks are checkpointed, of those every `every`-th."""
    model = copy.deepcopy(model)
    for path in case.blocks:
        parent, _, name = path.rpartition(".")
        blocks = list(model.get_submodule(path))
        segments = [blocks[k : k + group] for k in range(0, len(blocks), group)]
        parts = [_Segment(s, **options) if k % every == 0 else s[0] for k, s in enumerate(segments)]
        kind = type(model.get_submodule(path))
        segmented = nn.ModuleList(parts) if kind is nn.ModuleList else nn.Sequential(*parts)
        setattr(model.get_submodule(parent), name, segmented)
    return model


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = getattr(op, "_opname", "") in _SAVED
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_policies(model: nn.Module, case: Case) -> list[tuple[str, nn.Module]]:
    """Common uses of `torch.utils.checkpoint`."""
    count = sum(len(list(model.get_submodule(path))) for path in case.blocks)
    root = max(1, round(math.sqrt(count)))
    selective = partial(create_selective_checkpoint_contexts, _policy)
    return [
        ("checkpoint every block", checkpointed(model, case, 1)),
        ("checkpoint every second block", checkpointed(model, case, 1, every=2)),
        (f"checkpoint segments of {root}", checkpointed(model, case, root)),
        ("selective checkpointing", checkpointed(model, case, 1, context_fn=selective)),
    ]


class Captured:
    """The program of one device, as `auto_engine` runs it."""

    def __init__(self, model: nn.Module, batch: Sequence[torch.Tensor]) -> None:
        cluster = ClusterInfo.of("1", "cpu").with_memory("1024GiB")
        planned = autoplan(model, batch, cluster=cluster)
        graph = planned.graph
        groups = planning_groups((1,), (0,))
        program = apply_sharding(graph, planned.plan, coords=(0,), groups=groups)
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        self.gm = program.gm
        self.arguments = [
            *(parameters[n] for n in graph.parameters.values()),
            *(buffers[n] for n in graph.buffers.values()),
            *graph.constants.values(),
            *batch,
        ]
        self.loss = len(graph.mutations)

    def traced(self) -> TracedStep:
        """The step, for schedules to be made of."""
        return trace_step(self.gm, self.arguments, LowerOptions(scheduled=True))

    def scheduled(self, schedule: Schedule) -> Callable[[], torch.Tensor]:
        """The step with a schedule of autopar's."""
        step = bind(lower(self.traced(), schedule))
        return lambda: step(*self.arguments)[self.loss]

    def partitioned(self, budget: float) -> Callable[[], torch.Tensor]:
        """The step as torch's partitioner splits it."""

        def compiled(gm: torch.fx.GraphModule, _: Any) -> Any:
            call = boxed(gm)
            call._boxed_call = True  # type: ignore[attr-defined]
            return call

        function = aot_function(
            self.gm, fw_compiler=compiled, bw_compiler=compiled,
            partition_fn=min_cut_rematerialization_partition,
        )  # fmt: skip
        with torch._functorch.config.patch(activation_memory_budget=budget):
            function(*self.arguments)[self.loss].backward()
        return lambda: function(*self.arguments)[self.loss]


@dataclass(frozen=True)
class MethodResult:
    """A method on a model: peak over eager's, added FLOPs in percent; predicted for autopar."""

    method: str
    peak: float
    added: float
    predicted: float | None = None


def compare(case: Case, torch_budgets: Sequence[float]) -> tuple[list[MethodResult], list[Row]]:
    """All methods on one model."""
    torch.manual_seed(0)
    model, batch = case.make().train(), case.batch()
    parameters = list(model.parameters())
    eager = measure(lambda: model(*batch), parameters)
    results = [MethodResult("eager", 1.0, 0.0)]

    def add(method: str, step: Measured, predicted: float | None = None) -> MethodResult:
        share = step.peak_bytes / eager.peak_bytes
        result = MethodResult(method, share, 100 * (step.flops / eager.flops - 1), predicted)
        results.append(result)
        return result

    for method, other in checkpoint_policies(model, case):
        add(method, measure(partial(other, *batch), list(other.parameters())))
    captured = Captured(model, batch)
    for budget in torch_budgets:
        add(f"torch, budget {budget:g}", measure(captured.partitioned(budget), parameters))
    others = results[1:]
    shares = [*BUDGETS, *(result.peak for result in others), *(peak for peak, _ in case.known)]
    points, seconds = solve(captured, [share * eager.peak_bytes for share in shares])
    rows = [Row(case.name, "solve", seconds, "s", SOLVE_S)]
    measured: dict[Schedule, MethodResult] = {}
    worst = 0.0
    for share, point in zip(shares, points, strict=True):
        if point is None:
            continue
        if point.schedule not in measured:
            step = measure(captured.scheduled(point.schedule), parameters)
            predicted = point.peak_bytes / eager.peak_bytes
            measured[point.schedule] = add(f"autopar, budget {share:.3f}", step, predicted)
        result = measured[point.schedule]
        worst = max(worst, 100 * abs(result.predicted / result.peak - 1))
    rows.append(Row(case.name, "predicted peak off by", worst, "%", 3.0))
    bars = [(result.method, result.peak, result.added) for result in others]
    bars += [("known", peak, added) for peak, added in case.known]
    for (method, peak, added), point in zip(bars, points[len(BUDGETS) :], strict=True):
        own = math.inf if point is None else measured[point.schedule].added
        rows.append(
            Row(case.name, f"at {peak:.3f} of {method}", own, "% added", round(added + 5e-3, 2))
        )
    return results, rows


def solve(captured: Captured, budgets: Sequence[float]) -> tuple[list[SchedulePoint | None], float]:
    """The Pareto front at the budgets, by FLOPs, and the seconds that took."""
    program = captured.traced().program
    start = time.perf_counter()
    program = in_order(without_gradients(program))
    front = ScheduleFront(program, {i: op.flops for i, op in enumerate(program.ops)})
    points = list(front.solve(budgets))
    return points, time.perf_counter() - start


def show(case: Case, results: Sequence[MethodResult]) -> None:
    """The table of a model."""
    table = Table(title=case.name, title_justify="left", box=None, header_style="dim")
    table.add_column("method", no_wrap=True)
    for column in ("peak / eager's", "predicted", "added FLOPs"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        predicted = "" if result.predicted is None else f"{result.predicted:.3f}"
        table.add_row(result.method, f"{result.peak:.3f}", predicted, f"{result.added:.2f}%")
    console.print(table)


def plot(measured: Sequence[tuple[Case, Sequence[MethodResult]]]) -> go.Figure:
    """A chart per model: peak memory across, added FLOPs up; autopar's measured points joined."""
    figure = plotly.subplots.make_subplots(
        rows=len(measured), cols=1, subplot_titles=[case.name for case, _ in measured]
    )
    for row, (case, results) in enumerate(measured, start=1):
        own = sorted((x for x in results if x.method.startswith("autopar")), key=lambda x: x.peak)
        families: dict[str, list[MethodResult]] = {
            "autopar": own,
            "torch's partitioner": [x for x in results if x.method.startswith("torch")],
            "checkpointing": [x for x in results if not x.method.startswith(("autopar", "torch"))],
            "earlier study": [MethodResult("earlier study", *point) for point in case.known],
        }
        for (name, points), color in zip(families.items(), _COLORS, strict=True):
            figure.add_scatter(
                row=row, col=1, name=name, legendgroup=name, showlegend=row == 1,
                x=[p.peak for p in points], y=[p.added for p in points],
                mode="lines+markers" if name == "autopar" else "markers",
                marker={"size": 8, "color": color}, line={"color": color},
                text=[p.method for p in points],
                hovertemplate="%{text}<br>peak %{x:.3f}, +%{y:.2f}%<extra></extra>",
            )  # fmt: skip
    figure.update_xaxes(title="peak / eager's", rangemode="tozero")
    figure.update_yaxes(title="added FLOPs, %", rangemode="tozero")
    figure.update_layout(template="plotly_white", height=420 * len(measured))
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="models whose name has this")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a chart (HTML) here")
    options = parser.parse_args(arguments)
    cases = QUICK if options.quick else CASES
    if options.only:
        cases = tuple(c for c in cases if any(name in c.name for name in options.only))
    console.print(common.machine(), markup=False)
    rows: list[Row] = []
    charts: list[tuple[Case, Sequence[MethodResult]]] = []
    for case in cases:
        results, case_rows = compare(case, TORCH_BUDGETS[2:3] if options.quick else TORCH_BUDGETS)
        show(case, results)
        rows += case_rows
        charts.append((case, results))
    if options.plot is not None:
        plot(charts).write_html(options.plot)
    bars = [r for r in rows if r.unit == "% added"]
    headline = (
        f"at the peak of every other method autopar adds no more FLOPs in "
        f"{sum(bool(r.ok) for r in bars)} of {len(bars)} cases"
    )
    return common.finish("Peak memory against added FLOPs", rows, headline, options.json)


if __name__ == "__main__":
    sys.exit(main())
