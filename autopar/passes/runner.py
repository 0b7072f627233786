"""Runs passes: functions from graph to graph with their options bound, each with a name."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.fx as fx

from autopar.files import write_atomically
from autopar.passes.verify import verify

log = logging.getLogger(__name__)

Pass = Callable[[fx.GraphModule], fx.GraphModule]


def pass_name(function: Callable[..., fx.GraphModule]) -> str:
    """The name by which a pass is logged, timed, dumped and disabled."""
    inner = function.func if isinstance(function, functools.partial) else function
    return inner.__name__


def run_passes(
    gm: fx.GraphModule,
    passes: Sequence[Pass],
    *,
    stage: str = "",
    disable: frozenset[str] = frozenset(),
    dump: Path | None = None,
) -> fx.GraphModule:
    """Apply the passes in order, verifying the program after each.

    Passes edit graphs; the code is written once, after the last, as that takes as long as a pass.

    Args:
        stage: of which graph this is, for file names.
        disable: names of passes to leave out (debugging).
        dump: folder for the graph at the start, and before and after each pass.
    """
    if dump is not None:
        _dump(gm, dump / f"{stage}-input.py")
    for number, function in enumerate(passes):
        name = pass_name(function)
        if name in disable:
            log.info("pass %s: disabled", name)
            continue
        start, nodes = time.perf_counter(), len(gm.graph.nodes)
        if dump is not None:
            _dump(gm, dump / f"{stage}-{number:02d}-{name}-before.py")
        gm = function(gm)
        verify(gm)
        if dump is not None:
            _dump(gm, dump / f"{stage}-{number:02d}-{name}-after.py")
        log.info(
            "pass %s: %d -> %d nodes in %.1f ms",
            name, nodes, len(gm.graph.nodes), 1e3 * (time.perf_counter() - start),
        )  # fmt: skip
    gm.recompile()
    return gm


def _dump(gm: fx.GraphModule, path: Path) -> None:
    write_atomically(path, gm.print_readable(print_output=False))
