"""One GPU: step time and peak memory of eager PyTorch, checkpointing and autopar under budgets, and
autopar's predictions; with --compile, torch.compile and compiled autopar too.

A step is forward and backward, gradients made. Times are medians over rounds in which every method
runs once, in turn. The peak is the allocator's, beyond what is allocated between steps. Budgets are
shares of eager's peak. The cluster is measured first (`autopar cluster`'s figures), or read from
--cluster. Runs on the CPU too, with --quick, where peaks are of live bytes.
"""

from __future__ import annotations

import copy
import gc
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from autopar import ClusterInfo, auto_engine
from autopar.errors import InfeasibleError
from autopar.profiler.measure_links import measure_cluster
from autopar.testing.live_memory import LiveMemory
from autopar.units import bytes_text
from benchmarks import common
from benchmarks.common import Row, console
from benchmarks.recompute import Case, checkpointed, gpt2, images, llama

SHARES = (0.7, 0.45)
_GPT2, _LLAMA = ("model.transformer.h",), ("model.model.layers",)
_RESNET = tuple(f"model.layer{k}" for k in range(1, 5))


def _text(vocabulary: int, batch: int, length: int) -> tuple[torch.Tensor, ...]:
    return (torch.randint(0, vocabulary, (batch, length)),)


def _pictures(batch: int, size: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))


CASES = (
    Case(
        "GPT-2, 12 layers, bf16, batch 16 of 1024",
        lambda: gpt2(12, 50257, 1024).bfloat16(), partial(_text, 50257, 16, 1024), _GPT2,
    ),
    Case(
        "Llama, 8 layers of 2048, bf16, batch 8 of 2048",
        lambda: llama(8, 32000, 2048, 2048).bfloat16(), partial(_text, 32000, 8, 2048), _LLAMA,
    ),
    Case(
        "ResNet-50, float32, batch 64", partial(images, "resnet50"), partial(_pictures, 64, 224),
        _RESNET,
    ),
)  # fmt: skip
QUICK = (
    Case("GPT-2, 2 layers", partial(gpt2, 2, 500, 64, 128), partial(_text, 500, 8, 64), _GPT2),
)


class Method:
    """A step that runs.

    Attributes:
        seconds: of each round.
        peak: bytes beyond what is allocated between steps.
    """

    def __init__(self, name: str, model: nn.Module, batch: Sequence[torch.Tensor]) -> None:
        self.name, self.model, self.batch = name, model, batch
        self.device = batch[0].device
        self.seconds: list[float] = []
        self.peak = 0.0

    def step(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.model(*self.batch).backward()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self) -> None:
        """One more round."""
        self.synchronize()
        begin = time.perf_counter()
        self.step()
        self.synchronize()
        self.seconds.append(time.perf_counter() - begin)
        self.model.zero_grad(set_to_none=True)

    def weigh(self) -> None:
        """Measure the peak, of the second step."""
        self.step()
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cpu":
            with LiveMemory() as live:
                self.step()
            self.peak = live.peak
        else:
            self.synchronize()
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.step()
            self.synchronize()
            self.peak = torch.cuda.max_memory_allocated(self.device) - before
        self.model.zero_grad(set_to_none=True)


def planned(
    case: Case, base: nn.Module, batch: Sequence[torch.Tensor], cluster: ClusterInfo,
    step_bytes: float, compiled: bool,
) -> tuple[nn.Module, float]:  # fmt: skip
    """autopar's step within a budget for what it makes, and the seconds to plan and build it.

    Raises:
        InfeasibleError: no schedule fits.
    """
    model = copy.deepcopy(base)
    copied = sum(b.nbytes for b in model.buffers())
    resident = (*model.parameters(), *model.buffers(), *batch)
    memory = sum(t.nbytes for t in resident) + copied + step_bytes
    begin = time.perf_counter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, _ = auto_engine(
        model, optimizer, cluster, example_inputs=tuple(batch), memory=memory, compile=compiled
    )
    return engine, time.perf_counter() - begin


def compare(case: Case, cluster: ClusterInfo, rounds: int, compiled_too: bool) -> list[Row]:
    """All methods on one model; compiling takes most of the time."""
    device = torch.device(cluster.device.kind)
    torch.manual_seed(0)
    base = case.make().train().to(device)
    batch = tuple(t.to(device) for t in case.batch())
    eager = Method("eager", copy.deepcopy(base), batch)
    eager.weigh()
    checkpointing = Method("checkpoint every block", checkpointed(base, case, 1), batch)
    methods = [eager, checkpointing]
    alone = replace(cluster, host_link=None)
    runs = [(f"autopar, {share:g}", alone, share, False) for share in (2.0, *SHARES)]
    runs += [(f"autopar, {SHARES[-1]:g}, host too", cluster, SHARES[-1], False)]
    if compiled_too:
        methods.append(Method("torch.compile", torch.compile(copy.deepcopy(base)), batch))
        runs += [(f"autopar, {s:g}, compiled", alone, s, True) for s in (2.0, SHARES[-1])]
    rows = []
    engines = {}
    for name, where, share, compiled in runs:
        if where.host_link is None and where is cluster:
            continue
        try:
            model, seconds = planned(case, base, batch, where, share * eager.peak, compiled)
        except InfeasibleError as error:
            console.print(f"{case.name}, {name}: {error}", markup=False)
            continue
        method = Method(name, model, batch)
        engines[name] = model
        methods.append(method)
        rows.append(Row(case.name, f"{name}: planned in", seconds, "s"))
        peak = bytes_text(model.memory_plan.peak_bytes)
        console.print(
            f"{case.name}, {name}: predicted peak {peak}; planned and built in {seconds:.1f} s",
            markup=False,
        )
    for method in methods[1:]:
        method.weigh()
    for method in methods:  # warm, after all are there
        method.time()
        console.print(f"{case.name}, {method.name}: runs", markup=False)
        method.seconds.clear()
    for _ in range(rounds):
        for method in methods:
            method.time()
    for method in methods:
        ms = 1e3 * statistics.median(method.seconds)
        rows.append(Row(case.name, f"{method.name}: step", ms, "ms"))
        rows.append(Row(case.name, f"{method.name}: peak", method.peak / 2**20, "MiB"))
        engine = engines.get(method.name)
        if engine is None or "compiled" in method.name:
            continue
        plan = engine.memory_plan
        copied = sum(b.nbytes for b in engine.buffers())
        off = 100 * ((plan.peak_bytes + copied) / method.peak - 1)
        rows.append(Row(case.name, f"{method.name}: peak predicted off by", off, "%"))
        rows.append(Row(case.name, f"{method.name}: step predicted", plan.timeline.us / 1e3, "ms"))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="of `autopar cluster`")
    parser.add_argument("--rounds", type=int, default=10, help="[default: 10]")
    parser.add_argument("--compile", action="store_true", help="by Inductor, too")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="models whose name has this")
    options = parser.parse_args(arguments)
    console.print(common.machine(), markup=False)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if options.cluster is not None:
        cluster = ClusterInfo.load(options.cluster)
    else:
        measured = measure_cluster("1", kind, level="quick" if options.quick else "standard")
        assert measured is not None  # this is rank 0
        cluster = measured.cluster
    cases = QUICK if options.quick or kind == "cpu" else CASES
    if options.only:
        cases = tuple(c for c in cases if any(word in c.name for word in options.only))
    rows: list[Row] = []
    for case in cases:
        rows += compare(case, cluster, options.rounds, options.compile)
    figures = {row.metric: row.value for row in rows if row.case == cases[0].name}
    tight = f"autopar, {SHARES[-1]:g}: step"
    headline = (
        f"{cases[0].name}: {SHARES[-1]:.0%} of eager's memory at "
        f"{figures[tight] / figures['eager: step']:.2f} of its time"
        if tight in figures
        else f"{cases[0].name}: no schedule in {SHARES[-1]:.0%} of eager's memory"
    )
    return common.finish("One GPU", rows, headline, options.json)


if __name__ == "__main__":
    sys.exit(main())
