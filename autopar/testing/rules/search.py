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
from autopar.testing.rules.missing import Evidence, coverage_of, discover
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
        missing = tuple(_line(f) for f in looked.missing)
        explained = tuple((str(f.strategy), f.reason) for f in looked.omitted if f.reason)
        to.send(OpFindings(name, looked.strategies, missing, explained))
    else:
        to.send(_proposed(name, seed, careful))


def _line(evidence: Evidence) -> str:
    return (
        f"{evidence.strategy}: in {evidence.held} of {evidence.tried} tries, "
        f"such as {evidence.example}"
    )


def _proposed(name: str, seed: int, careful: bool) -> OpFindings:
    by_dims, results = discover(name, seed, careful=careful)
    lines = tuple(
        f"{propose(held, dims, results[dims])}, for calls such as {held[0].example}"
        for dims, held in sorted(by_dims.items())
    )
    strategies = {f.strategy for each in by_dims.values() for f in each}
    return OpFindings(name, len(strategies), lines or ("nothing can be split",))


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
