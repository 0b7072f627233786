"""`autopar rules check --discover`: every op in a process of its own, since torch may crash on
parts whose sizes do not fit each other."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import torch

from autopar.sharding.proof.missing import Found, discover, missing
from autopar.sharding.proof.propose import propose
from autopar.sharding.proof.samples import find_op
from autopar.sharding.rules.registry import has_rule

_TIMEOUT_S = 240.0


def _look(name: str, seed: int, careful: bool, to: Connection) -> None:
    torch.set_num_threads(1)
    op = find_op(name)
    if op is not None and has_rule(op):
        to.send(_timid(name, seed, careful))
    else:
        to.send(_proposed(name, seed, careful))


def _timid(name: str, seed: int, careful: bool) -> list[str]:
    return [_line(f) for f in missing(name, seed, careful=careful)]


def _line(found: Found) -> str:
    where = f"in {found.held} of {found.tried} tries, such as {found.example}"
    why = "; over max or min, for which there is no layout" if found.way.special else ""
    return f"{found.way}: {where}{why}"


def _proposed(name: str, seed: int, careful: bool) -> list[str]:
    found, results = discover(name, seed, careful=careful)
    lines = []
    for dims, ways in sorted(found.items()):
        row = propose(ways, dims, results[dims])
        lines.append(f"{row}, for calls such as {ways[0].example}")
    return lines or ["nothing can be split"]


def look(name: str, seed: int) -> list[str]:
    """A line per strategy that the op's rule leaves out, or per row for an op without a rule."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    for careful in (False, True):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_look, args=(name, seed, careful, sender))
        process.start()
        sender.close()
        try:
            if receiver.poll(_TIMEOUT_S):
                found: list[str] = receiver.recv()
                process.join()
                return found
        except EOFError:
            process.join()
            continue  # it crashed
        process.kill()
        process.join()
        return [f"not looked at: took longer than {_TIMEOUT_S:.0f} s"]
    return [f"not looked at: torch crashed (exit code {process.exitcode})"]


def look_at_all(
    names: Sequence[str], seed: int, jobs: int, done: Callable[[str, list[str]], None]
) -> None:
    """`look` at every op, `jobs` at a time; `done` is told of each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with ThreadPoolExecutor(jobs) as pool:
        results = pool.map(lambda name: look(name, seed), names)
        for name, lines in zip(names, results, strict=True):
            done(name, lines)
