"""`autopar rules check --discover`: every op in a process of its own, since torch may crash on
parts whose sizes do not fit each other."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from autopar.sharding.rules.registry import has_rule
from autopar.testing.rules.missing import Found, discover, look_at
from autopar.testing.rules.propose import propose
from autopar.testing.rules.samples import find_op

_TIMEOUT_S = 240.0


@dataclass(frozen=True)
class OpFindings:
    """What was found of one op: how many right ways, and which of them its rule leaves out.

    Args:
        name: the op.
        ways: how many are right.
        missing: a line for each that is left out without a reason; or for what could not be looked
            at; or, for an op without a rule, the row that it could have.
        explained: each that is left out for a reason, and the reason.
    """

    name: str
    ways: int = 0
    missing: tuple[str, ...] = ()
    explained: tuple[tuple[str, str], ...] = ()


def _look(name: str, seed: int, careful: bool, to: Connection) -> None:
    torch.set_num_threads(1)
    op = find_op(name)
    if op is not None and has_rule(op):
        looked = look_at(name, seed, careful=careful)
        missing = tuple(_line(f) for f in looked.missing)
        explained = tuple((str(f.way), f.reason) for f in looked.left_out if f.reason)
        to.send(OpFindings(name, looked.ways, missing, explained))
    else:
        to.send(_proposed(name, seed, careful))


def _line(found: Found) -> str:
    return f"{found.way}: in {found.held} of {found.tried} tries, such as {found.example}"


def _proposed(name: str, seed: int, careful: bool) -> OpFindings:
    found, results = discover(name, seed, careful=careful)
    lines = tuple(
        f"{propose(ways, dims, results[dims])}, for calls such as {ways[0].example}"
        for dims, ways in sorted(found.items())
    )
    ways = {f.way for each in found.values() for f in each}
    return OpFindings(name, len(ways), lines or ("nothing can be split",))


def look(name: str, seed: int) -> OpFindings:
    """The ways of one op; where torch crashes, only splits of operands that fit each other."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    for careful in (False, True):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_look, args=(name, seed, careful, sender))
        process.start()
        sender.close()
        try:
            if receiver.poll(_TIMEOUT_S):
                found: OpFindings = receiver.recv()
                process.join()
                return found
        except EOFError:
            process.join()
            continue  # it crashed
        process.kill()
        process.join()
        return OpFindings(name, missing=(f"not looked at: took over {_TIMEOUT_S:.0f} s",))
    crashed = f"not looked at: torch crashed (exit code {process.exitcode})"
    return OpFindings(name, missing=(crashed,))


def look_at_all(
    names: Sequence[str], seed: int, jobs: int, done: Callable[[OpFindings], None]
) -> list[OpFindings]:
    """`look` at every op, `jobs` at a time; `done` is told of each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    found = []
    with ThreadPoolExecutor(jobs) as pool:
        for findings in pool.map(lambda name: look(name, seed), names):
            found.append(findings)
            done(findings)
    return found
