"""How exact the profile is: predicted from the graph, measured on the user's module in eager
PyTorch.

Per model, on one training step (forward, backward, gradients made) with real tensors on the CPU:

* FLOPs: the count of torch's `FlopCounterMode`. Its table lacks attention on the CPU and the
  grouped product of mixtures of experts; both sides count those by the formulas of
  `autopar.profiler.counting`.
* saved: bytes of the distinct storages that `torch.autograd.graph.saved_tensors_hooks` sees,
  without parameters.
* peak: live bytes of storages that the step makes (`autopar.testing.live_memory.LiveMemory`).
  Under such a mode autograd sums gradients out of place, and so does the prediction that is
  compared with it. The peak of the CPU's allocator without a mode (torch.profiler; sums in place)
  is shown too. It includes the kernels' scratch space, which no profile of operators knows.

The last rows show the share of the forward FLOPs that a counter with module hooks (thop, ptflops)
counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from autopar import ColoTracer
from autopar.errors import CaptureError
from autopar.planner.planner import trainable_inputs
from autopar.profiler.counting import MISSING_FLOPS
from autopar.profiler.model import profile_model
from autopar.testing.live_memory import LiveMemory
from autopar.tracer.settings import apply_settings
from benchmarks import common
from benchmarks.common import Row, console
from tests.zoo import hf, timm_rows
from tests.zoo.family import Family

FAMILIES = (*hf.FAMILIES, *timm_rows.FAMILIES)
SAVED_TARGET, PEAK_TARGET = 1.0, 3.0  # percent
QUICK = ("gpt2", "llama", "bert", "vit", "resnet50")
HOOKED = ("gpt2", "llama", "vit", "swin", "resnet50", "mixer")

Run = Callable[[], Any]


def missing_flops() -> dict[Any, Callable[..., int]]:
    """Formulas that torch's table lacks, for `FlopCounterMode(custom_mapping=...)`."""
    formulas: dict[Any, Callable[..., int]] = {}
    for name, formula in MISSING_FLOPS.items():
        namespace, _, operator = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        if packet is not None:
            formulas[packet] = formula
    return formulas


@dataclass(frozen=True)
class Measured:
    """One training step. The module's docstring defines the figures."""

    flops: int
    saved_bytes: int
    peak_bytes: int
    allocated_bytes: int


def differentiate(returned: Any) -> None:
    """Run backward from the first scalar result, or from all results, as the profile assumes."""
    leaves = pytree.tree_leaves(returned)
    carrying = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
    roots = [t for t in carrying if not t.ndim][:1] or carrying
    torch.autograd.backward(roots, [torch.ones_like(t) for t in roots])


def measure(model: nn.Module, run: Run) -> Measured:
    """Measure each figure in a step of its own, because the counters disturb each other."""
    model.zero_grad()
    with FlopCounterMode(display=False, custom_mapping=missing_flops()) as counter:
        differentiate(run())
    model.zero_grad()
    saved = saved_bytes(model, run)
    model.zero_grad()
    with LiveMemory() as live:
        returned = run()
        differentiate(returned)
    del returned
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        returned = run()
        differentiate(returned)
    now = peak = 0
    for event in events.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return Measured(counter.get_total_flops(), saved, live.peak, peak)


def saved_bytes(model: nn.Module, run: Run) -> int:
    """Bytes that autograd saves in one forward."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    storages = []  # while they live, no other storage gets their addresses

    def pack(t: torch.Tensor) -> torch.Tensor:
        storages.append(t.untyped_storage())
        sizes[storages[-1].data_ptr()] = storages[-1].nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        returned = run()
    differentiate(returned)
    return sum(nbytes for key, nbytes in sizes.items() if key not in parameters)


def off(predicted: float, measured: float) -> float:
    """Relative difference in percent."""
    return 100 * abs(predicted - measured) / measured if measured else float(predicted != measured)


def compare(family: Family) -> list[Row]:
    """Capture, profile and measure one model.

    Raises:
        CaptureError: the model cannot be captured.
    """
    model = family.build(dropout=family.not_replayed is None)
    batch = family.batch(model)
    apply_settings(model)  # as the tracer does on its copy
    graph = ColoTracer().trace(model, (), batch)
    trainable = trainable_inputs(graph, model)
    predicted = profile_model(graph, trainable, sums_in_place=False)
    in_place = profile_model(graph, trainable)

    def run() -> Any:
        return model(**batch)

    real = measure(model, run)

    def row(metric: str, predicted: int, measured: int, target: float | None = None) -> Row:
        return Row(family.name, metric, off(predicted, measured), "%", target)

    return [
        row("FLOPs off by", predicted.flops, real.flops, 0.0),
        row("saved bytes", predicted.saved_bytes, real.saved_bytes, SAVED_TARGET),
        row("peak", predicted.peak_bytes, real.peak_bytes, PEAK_TARGET),
        row("allocator's peak", in_place.peak_bytes, real.allocated_bytes),
    ]


def hooked_flops(model: nn.Module, run: Run) -> int:
    """Forward FLOPs by module hooks: a formula per known module class."""
    total = 0

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += 2 * output.numel() * module.in_features
        elif isinstance(module, nn.Conv1d | nn.Conv2d):
            total += 2 * output.numel() * module.weight[0].numel()

    handles = [m.register_forward_hook(hook) for m in model.modules()]
    run()
    for handle in handles:
        handle.remove()
    return total


def hooked_row(family: Family) -> Row:
    """The share of the forward FLOPs that module hooks see."""
    model = family.build()
    batch = family.batch(model)
    with FlopCounterMode(display=False, custom_mapping=missing_flops()) as counter:
        model(**batch)
    hooked = hooked_flops(model, lambda: model(**batch))
    share = 100 * hooked / counter.get_total_flops()
    return Row(family.name, "forward FLOPs that module hooks count", share, "%")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="families of the zoo")
    options = parser.parse_args(arguments)
    names = options.only or (QUICK if options.quick else [f.name for f in FAMILIES])
    families = [f for f in FAMILIES if f.name in names]
    console.print(common.machine(), markup=False)
    compared: dict[str, list[Row]] = {}
    for family in families:
        try:
            compared[family.name] = compare(family)
        except CaptureError as error:
            console.print(f"{family.name}: not captured: {str(error)[:150]}", markup=False)
            continue
        figures = ", ".join(f"{r.metric} {r.value:.3f}%" for r in compared[family.name])
        console.print(f"{family.name}: {figures}", markup=False, soft_wrap=True)
    rows = [row for each in compared.values() for row in each]
    flops = [r for r in rows if r.metric == "FLOPs off by"]
    worst = {
        metric: max((r.value for r in rows if r.metric == metric), default=0)
        for metric in ("saved bytes", "peak")
    }
    rows += [hooked_row(f) for f in families if f.name in HOOKED]
    headline = (
        f"FLOPs exact on {sum(r.value == 0 for r in flops)}/{len(flops)}, saved within "
        f"{worst['saved bytes']:.2f}%, peak within {worst['peak']:.2f}% "
        f"({len(families) - len(compared)} not captured)"
    )
    return common.finish("Profile against the real eager run", rows, headline, options.json)


if __name__ == "__main__":
    sys.exit(main())
