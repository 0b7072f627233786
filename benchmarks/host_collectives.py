"""Collectives between processes of one host: Gloo, autopar's messages through it, shared memory.

All three run in the same processes in turns. Per collective and bytes of the local buffer (on the
side that is not split), the median over the rounds of the mean over the ranks: milliseconds, and
milliseconds of the processor, of one rank. A round starts when all ranks are there.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import common
from benchmarks.common import Row, console

RANKS = (2, 4)
SIZES = (2**10, 2**16, 784_000, 2**22)
KINDS = ("all_reduce", "all_gather", "reduce_scatter")
WAYS = ("Gloo", "messages", "shared memory")


def rank(sizes: str, rounds: str) -> None:
    """One process; rank 0 answers with seconds, by collective, bytes and way."""
    import torch
    import torch.distributed as dist

    from autopar.runtime.direct import DirectGroup
    from autopar.runtime.groups import Group, ProcessGroup
    from autopar.runtime.peers import meet
    from autopar.runtime.shared_memory import SharedGroup

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.group.WORLD
    assert world is not None
    peers = meet(world, SharedGroup.memory_bytes(world.size()))
    if peers is None:
        raise RuntimeError("the processes share no memory")
    contestants: list[Group] = [
        ProcessGroup("gloo", world),
        DirectGroup("direct", world),
        SharedGroup("shared", world, peers),
    ]

    def call(group: Group, kind: str, x: torch.Tensor) -> Callable[[], Any]:
        if kind == "all_reduce":
            return lambda: group.all_reduce(x, "sum")
        if kind == "all_gather":
            return lambda: group.all_gather(x[0])
        return lambda: group.reduce_scatter(x)

    found = []
    for nbytes in map(int, sizes.split(",")):
        x = torch.randn(world.size(), nbytes // 4 // world.size())
        for kind in KINDS:
            calls = [call(group, kind, x) for group in contestants]
            times = torch.zeros(int(rounds) + 3, len(calls), 2, dtype=torch.float64)
            for k, order in enumerate(common.turns(len(calls), len(times))):
                for who in order:
                    dist.barrier()
                    begin, used = time.perf_counter(), time.process_time()
                    calls[who]()
                    times[k, who, 1] = time.process_time() - used
                    times[k, who, 0] = time.perf_counter() - begin
            dist.all_reduce(times)
            median = (times[3:] / world.size()).median(0).values
            found.append([kind, nbytes, median.tolist()])
    if dist.get_rank() == 0:
        common.answer({"found": found})
    dist.barrier()
    peers.close()
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--ranks", nargs="*", type=int, default=RANKS, help="of the groups")
    parser.add_argument("--sizes", nargs="*", type=int, default=SIZES, help="bytes")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args(arguments)
    console.print(common.machine(), markup=False)
    rows: list[Row] = []
    shares = []
    for count in options.ranks[:1] if options.quick else options.ranks:
        sizes = ",".join(map(str, options.sizes[:2] if options.quick else options.sizes))
        rounds = "5" if options.quick else str(options.rounds)
        for kind, nbytes, times in common.on_ranks(
            "benchmarks.host_collectives", count, sizes, rounds
        )["found"]:
            case = f"{count} ranks, {kind}, {nbytes / 2**10:.0f} KiB"
            told = []
            for way, (wall, used) in zip(WAYS, times, strict=True):
                rows.append(Row(case, way, 1e3 * wall, "ms"))
                rows.append(Row(case, f"{way}, processor", 1e3 * used, "ms"))
                told.append(f"{way} {1e3 * wall:.2f} / {1e3 * used:.2f}")
            shares.append(times[2][1] / min(times[0][1], times[1][1]))
            console.print(
                f"{case}: {', '.join(told)} ms; load {os.getloadavg()[0]:.1f}", markup=False
            )
    headline = (
        f"shared memory takes {min(shares):.2f} to {max(shares):.2f} of the processor time of the "
        "best of the others"
    )
    return common.finish("Collectives on one host", rows, headline, options.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(*sys.argv[2:])
    else:
        sys.exit(main())
