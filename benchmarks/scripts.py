"""Training scripts from public reports under `auto_engine`: right, refused or wrong.

Each case of tests/scripts trains a model by itself and behind `auto_engine`, on 2 ranks (mesh 2)
and on 4 (mesh 2x2); programs that broke the compiler also run on 1. The ranks are processes that
serve one case after another; a case that ends a process has its own. It is
  right    if all that it compares agrees to 1e-9 on every rank,
  refused  if every rank raises an error of autopar that says what to do,
  wrong    otherwise: another result, another error, a crash, or no end within the timeout.
The last row is the engine's check of its assumptions on a model of 1,000 modules; every call pays
for it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from benchmarks import common
from benchmarks.common import Row, console
from tests.dist.pool import Pool
from tests.scripts.case import Case, Outcome
from tests.scripts.catalog import CASES, cases_on
from tests.scripts.launch import outcome_on

MESHES = {1: "1", 2: "2", 4: "2x2"}
KINDS = ("right", "refused", "wrong")
TIMEOUT_S = 240.0
REFUSED_PERCENT = 5.0
MODULES, CALLS, CHECK_US = 1000, 200, 100.0


def outcomes(
    cases: Sequence[Case], pools: Mapping[int, Pool], timeout_s: float
) -> Iterator[tuple[Case, int, Outcome, float]]:
    """Case, ranks, outcome and seconds, one after another; each is printed as it ends."""
    for i, one in enumerate(cases):
        for ranks in pools:
            if one.name not in cases_on(MESHES[ranks]):
                continue
            start = time.perf_counter()
            outcome = outcome_on(pools[ranks], one.name, MESHES[ranks], timeout_s)
            seconds = time.perf_counter() - start
            said = outcome.text.strip().splitlines()[0][:300]
            if not one.accepts(outcome):
                said += f" (after {one.report})"
            line = f"{one.name}, {_ranks(ranks)}: {outcome.kind} in {seconds:.0f} s, {said}"
            console.print(f"{i + 1}/{len(cases)} {line}", markup=False, soft_wrap=True)
            yield one, ranks, outcome, seconds


def _ranks(count: int) -> str:
    return f"{count} rank{'' if count == 1 else 's'}"


def totals(found: Sequence[tuple[Case, int, Outcome, float]], ranks: int) -> list[Row]:
    """The numbers of right, refused and wrong cases on so many ranks."""
    kinds = [outcome.kind for _, world, outcome, _ in found if world == ranks]
    if not kinds:
        return []
    name, share = f"{len(kinds)} cases, {_ranks(ranks)}", 100 / len(kinds)
    return [
        Row(name, "right", kinds.count("right"), "cases"),
        Row(name, "refused", share * kinds.count("refused"), "%", REFUSED_PERCENT),
        Row(name, "wrong", kinds.count("wrong"), "cases", 0.0),
    ]


def check_row(modules: int = MODULES) -> Row:
    """What the engine's check of its assumptions takes per call: median, in microseconds."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh

    from autopar.ir.bound_reads import bind
    from autopar.runtime.adoption import adopt
    from autopar.runtime.assumptions import Assumptions
    from autopar.tracer import ColoTracer

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.scale = 0.5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.scale * self.down(torch.tanh(self.up(self.norm(x))))

    model = nn.Sequential(*(Block() for _ in range(modules // 4)))
    graph = ColoTracer().trace(model, (torch.randn(2, 4),))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    adopt(model, None, init_device_mesh("cpu", (1,)))
    dist.destroy_process_group()
    assumptions, reads_hold = Assumptions.of(model), bind(model, graph.reads)
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        holds = assumptions.changed() is None and reads_hold()
        times.append(1e6 * (time.perf_counter() - start))
        assert holds
    count = sum(1 for _ in model.modules())
    return Row(f"{count} modules", "check per call", statistics.median(times), "us", CHECK_US)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; the exit code is 1 if a target is missed."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--only", default="", metavar="NAME", help="cases with this in their name")
    parser.add_argument("--ranks", type=int, choices=sorted(MESHES), help="on these alone")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="per case, in seconds")
    options = parser.parse_args(arguments)
    console.print(common.machine(), markup=False)
    chosen = [one for name, one in CASES.items() if options.only in name]
    worlds = [options.ranks] if options.ranks else sorted(MESHES)
    if options.quick:
        chosen, worlds = chosen[:2], [2]
    if not chosen:
        parser.error(f"no case has {options.only!r} in its name; there are: {'; '.join(CASES)}")
    pools = {ranks: Pool(ranks) for ranks in worlds}
    try:
        found = list(outcomes(chosen, pools, options.timeout))
    finally:
        for pool in pools.values():
            pool.close()
    rows = [row for ranks in worlds for row in totals(found, ranks)]
    rows.append(check_row(100 if options.quick else MODULES))
    headline = ", ".join(f"{sum(o.kind == kind for _, _, o, _ in found)} {kind}" for kind in KINDS)
    code = common.finish("Training scripts", rows, headline, None)
    if options.json is not None:
        each = [Row(f"{c.name}, {_ranks(n)}", o.kind, s, "s") for c, n, o, s in found]
        common.write_rows(options.json, each + rows)
    return code


if __name__ == "__main__":
    sys.exit(main())
