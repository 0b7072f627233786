"""Steps of optimizers on shards against the same steps on DTensors, and against AdamW.

    python -m benchmarks.optimizer_step [--quick] [--json FILE]

Two Gloo processes hold a transformer's parameters, every matrix split. LAMB, LARS, Muon and
Adafactor step

* on shards: the step is recorded and runs as one program (docs/optimizers.md);
* on DTensors: operator by operator, as DTensor's own rules have it;

in turns, and AdamW steps on shards by its fused kernel. Figures are medians. The target is a third
of the time on DTensors; an optimizer that DTensors cannot run has no target. "first step" has the
recording, the plan and the program.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import Row, answer, finish, on_ranks, parser, turns

# of a block: its matrices, and its vectors
_BLOCK = (("S0R", (3, 1)), ("RS0", (1, 1)), ("S0R", (4, 1)), ("RS0", (1, 4)))
RATIO = 1 / 3


def _parameters(mesh: Any, blocks: int, width: int) -> list[torch.Tensor]:
    from tests.dist.optimizer_tasks import sharded

    generator = torch.Generator().manual_seed(0)
    made: list[torch.Tensor] = []
    for _ in range(blocks):
        for spec, (rows, columns) in _BLOCK:
            shape = (rows * width, columns * width)
            made.append(sharded(torch.randn(shape, generator=generator) * 0.02, spec, mesh))
            made.append(sharded(torch.randn(rows * width, generator=generator), "S0", mesh))
    return made


def _optimizers() -> dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]]:
    from transformers.optimization import Adafactor

    from autopar import optim

    return {
        "LAMB": lambda ps: optim.LAMB(ps, lr=1e-3),
        "LARS": lambda ps: optim.LARS(ps, lr=0.1, momentum=0.9, weight_decay=1e-4),
        "Muon": lambda ps: torch.optim.Muon([p for p in ps if p.ndim == 2], lr=1e-3),
        "Adafactor": lambda ps: torch.optim.Adafactor(ps, lr=1e-3),
        "transformers Adafactor": Adafactor,
        "AdamW, fused": lambda ps: torch.optim.AdamW(ps, lr=1e-3, fused=True),
    }


def _collectives(step: Callable[[], Any]) -> int:
    """How many collectives a step runs."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    events = found.key_averages()
    return sum(e.count for e in events if e.key.startswith("c10d::") and "barrier" not in e.key)


def _rank(quick: bool) -> None:
    warnings.simplefilter("ignore")
    from autopar.cluster.cluster import ClusterInfo
    from autopar.comm import world
    from autopar.runtime.optimizer_state import handle_later_optimizers
    from autopar.runtime.recorded_step import programs_of
    from autopar.runtime.sharded_values import ShardedGradient

    dist.init_process_group("gloo")
    mesh = world.start(ClusterInfo.of("2"), torch.device("cpu"))
    handle_later_optimizers()
    blocks, width, rounds = (2, 32, 3) if quick else (13, 64, 15)  # 104 parameters
    figures: dict[str, Any] = {}
    for name, make in _optimizers().items():
        pairs = []
        for on_shards in (True, False):
            parameters = _parameters(mesh, blocks, width)
            for p in parameters:
                local = torch.randn_like(p._local_tensor)  # type: ignore[attr-defined]
                p.grad = ShardedGradient.of(local, p._spec)  # type: ignore[attr-defined]
            optimizer = make(parameters)
            if not on_shards and name != "AdamW, fused":
                optimizer.__dict__.pop("step", None)  # the class's own, on DTensors
            pairs.append(optimizer)
        found: dict[str, Any] = {"parameters": len(parameters)}
        runs: list[list[float]] = [[], []]
        failed = [False, False]
        for i, optimizer in enumerate(pairs):
            start = time.perf_counter()
            try:
                optimizer.step()
            except (RuntimeError, NotImplementedError) as error:
                failed[i] = True
                found["error"] = str(error).splitlines()[0]
            if i == 0:
                found["first_s"] = time.perf_counter() - start
            dist.barrier()
        for i, optimizer in enumerate(pairs):
            if not failed[i]:
                optimizer.step()
                found["collectives" if i == 0 else "collectives_dtensors"] = _collectives(
                    optimizer.step
                )
            dist.barrier()
        for order in turns(2, rounds):
            for i in order:
                if failed[i]:
                    continue
                dist.barrier()
                start = time.perf_counter()
                pairs[i].step()
                runs[i].append(time.perf_counter() - start)
        found["programs"] = len(programs_of(pairs[0]))
        found["shards_ms"] = 1e3 * statistics.median(runs[0])
        found["dtensors_ms"] = 1e3 * statistics.median(runs[1]) if runs[1] else None
        figures[name] = found
    if dist.get_rank() == 0:
        answer(figures)
    dist.destroy_process_group()


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--rank", action="store_true", help="a rank of the benchmark (internal)")
    args = options.parse_args()
    if args.rank:
        _rank(args.quick)
        return 0
    figures = on_ranks("benchmarks.optimizer_step", 2, *["--quick"][: args.quick])
    rows = []
    base = figures["AdamW, fused"]["shards_ms"]
    ratios = []
    for name, found in figures.items():
        case = f"{name}, {found['parameters']} parameters"
        rows.append(Row(case, "step on shards", found["shards_ms"], "ms"))
        if name == "AdamW, fused":
            continue
        rows.append(Row(case, "collectives on shards", found["collectives"], ""))
        if found["dtensors_ms"] is not None:
            ratio = found["shards_ms"] / found["dtensors_ms"]
            ratios.append(f"{name} {1 / ratio:.1f}x")
            rows += [
                Row(case, "step on DTensors", found["dtensors_ms"], "ms"),
                Row(case, "collectives on DTensors", found["collectives_dtensors"], ""),
                Row(case, "shards / DTensors", ratio, "", None if args.quick else RATIO),
            ]
        else:
            ratios.append(f"{name}: not on DTensors ({found['error']})")
        rows += [
            Row(case, "shards / AdamW fused", found["shards_ms"] / base, ""),
            Row(case, "first step", found["first_s"], "s", 10.0),
        ]
    return finish("Steps of optimizers", rows, "faster than DTensors: " + ", ".join(ratios),
                  args.json)  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
