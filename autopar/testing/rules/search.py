"""`autopar rules check --discover`: a process per op, because torch may crash on parts whose sizes
do not fit each other."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from autopar.sharding.rules.registry import has_rule
from autopar.testing.rules.missing import coverage_of, discover
from autopar.testing.rules.propose import propose
from autopar.testing.rules.samples import find_op

_TIMEOUT_S = 240.0


@dataclass(frozen=True)
class OpFindings:
    """Correct strategies of one op, and which of them its rule omits.

    Args:
        name: the op.
        strategies: number of correct strategies.
        missing: a line per strategy omitted without a reason, per failure, or, for an op without a
            rule, per row that it could have.
        explained: strategies omitted for a reason, and the reason.
    """

    name: str
    strategies: int = 0
    missing: tuple[str, ...] = ()
    explained: tuple[tuple[str, str], ...] = ()


def _look(name: str, seed: int, careful: bool, to: Connection) -> None:
    torch.set_num_threads(1)
    op = find_op(name)
    if op is not None and has_rule(op):
        looked = coverage_of(name, seed, careful=careful)
        missing = tuple(map(str, looked.missing))
        explained = tuple((str(e.strategy), e.reason) for e in looked.omitted if e.reason)
        to.send(OpFindings(name, looked.strategies, missing, explained))
    else:
        to.send(_proposed(name, seed, careful))


def _proposed(name: str, seed: int, careful: bool) -> OpFindings:
    by_dims, results = discover(name, seed, careful=careful)
    lines = []
    for dims, evidence in sorted(by_dims.items()):
        row = propose(evidence, dims, results[dims])
        linear = f", linear={row.linear}" if row.linear else ""
        example = evidence[0].example
        lines.append(f'Row("{row.notation}"{linear}), for calls such as {example}')
    strategies = {e.strategy for each in by_dims.values() for e in each}
    return OpFindings(name, len(strategies), tuple(lines) or ("nothing can be split",))


def look(name: str, seed: int) -> OpFindings:
    """Strategies of one op; if torch crashes, again with splits of operands that fit each other."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    for careful in (False, True):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_look, args=(name, seed, careful, sender))
        process.start()
        sender.close()
        try:
            if receiver.poll(_TIMEOUT_S):
                findings: OpFindings = receiver.recv()
                process.join()
                return findings
        except EOFError:
            process.join()
            continue  # the process crashed
        process.kill()
        process.join()
        return OpFindings(name, missing=(f"not searched: took over {_TIMEOUT_S:.0f} s",))
    crashed = f"not searched: torch crashed (exit code {process.exitcode})"
    return OpFindings(name, missing=(crashed,))


def search_all(
    names: Sequence[str], seed: int, jobs: int, done: Callable[[OpFindings], None]
) -> list[OpFindings]:
    """Search every op, `jobs` at a time; `done` is called with each result."""
    os.environ["OMP_NUM_THREADS"] = "1"
    results = []
    with ThreadPoolExecutor(jobs) as pool:
        for findings in pool.map(lambda name: look(name, seed), names):
            results.append(findings)
            done(findings)
    return results
