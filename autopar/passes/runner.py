"""Runs passes: functions from graph to graph with their options bound, each with a name."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence

import torch.fx as fx

from autopar.passes.verify import verify

log = logging.getLogger(__name__)

Pass = Callable[[fx.GraphModule], fx.GraphModule]


def pass_name(function: Pass) -> str:
    """The name under which a pass is logged, timed and disabled."""
    inner = function.func if isinstance(function, functools.partial) else function
    return inner.__name__


def run_passes(
    gm: fx.GraphModule, passes: Sequence[Pass], *, disable: frozenset[str] = frozenset()
) -> fx.GraphModule:
    """Apply the passes in order, verifying the program after each.

    Args:
        disable: names of passes to leave out (debugging).
    """
    for function in passes:
        name = pass_name(function)
        if name in disable:
            log.info("pass %s: disabled", name)
            continue
        start, before = time.perf_counter(), len(gm.graph.nodes)
        gm = function(gm)
        verify(gm)
        log.info(
            "pass %s: %d -> %d nodes in %.1f ms",
            name, before, len(gm.graph.nodes), 1e3 * (time.perf_counter() - start),
        )  # fmt: skip
    return gm
