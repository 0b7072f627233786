"""One family from its configuration to its gradients: built, captured, run, compared."""

from __future__ import annotations

import linecache
import re
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tests.zoo import check
from tests.zoo.family import Batch, Family

Status = Literal[
    "equal", "close", "own draws", "unequal", "wrong later", "does not run",
    "not captured", "not built", "timed out", "crashed",
]  # fmt: skip
GOOD: tuple[Status, ...] = ("equal", "close", "own draws")
CAPTURED: tuple[Status, ...] = (*GOOD, "unequal", "wrong later", "does not run")
# relative to max(1, |reference|)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}
_AT = re.compile(r"\bat (/\S+?):(\d+)")


@dataclass(frozen=True)
class Outcome:
    """Result of one family.

    Args:
        name, library, kind: of the family.
        required: whether autopar promises it.
        status: "close" is equal to the rounding of float32, in which a float64 model computes some
            of its steps; sums of gradients may be in another order. "own draws" runs, but its
            dropout is not the model's (`Family.not_replayed`). "wrong later" is equal on the batch
            it was captured with, but not on the next, and all guards held.
        nodes: operators of the graph.
        capture_s: how long tracing took.
        error: largest of loss, results, gradients and buffers, on the batch it was captured with.
        worst: where.
        guards: number of the graph's assumptions about values.
        refused: source of the guard that fails on the next batch.
        plans: how many ran on a simulated mesh, the solver's first.
        plans_equal: how many of these equal one device to 1e-9.
        split: whether the solver's plan splits any operator.
        unruled: share of the predicted compute time of operators without a sharding rule.
        plan_s: how long planning took.
        plan_reason: what is wrong with a plan, one line.
        reason: what is wrong, one line.
        source: `file:line` of the statement that caused it.
        snippet: that line.
    """

    name: str
    library: str
    kind: str = ""
    required: bool = False
    status: Status = "not built"
    nodes: int = 0
    capture_s: float = 0.0
    error: float = 0.0
    worst: str = ""
    guards: int = 0
    refused: str = ""
    plans: int = 0
    plans_equal: int = 0
    split: bool = False
    unruled: float = 0.0
    plan_s: float = 0.0
    plan_reason: str = ""
    reason: str = ""
    source: str = ""
    snippet: str = ""


def examine(family: Family, *, dropout: bool = False) -> Outcome:
    """Trace on one batch; compare with the eager model on it and on the next."""
    from autopar import ColoTracer
    from autopar.errors import CaptureError

    outcome = Outcome(family.name, family.library, family.kind)
    try:
        alone, model = family.build(dropout=dropout), family.build(dropout=dropout)
        batches = [family.batch(model, seed) for seed in (0, 1)]
        expected = check.step(alone, alone, batches[0])
    except Exception as error:
        return replace(outcome, reason=first_line(error), **_blame(error))
    start = time.perf_counter()
    try:
        graph = ColoTracer().trace(model, (), batches[0])
    except CaptureError as error:
        return replace(outcome, status="not captured", reason=_cause(error), **_blame(error))
    except Exception as error:
        reason = f"not a CaptureError: {first_line(error)}"
        return replace(outcome, status="not captured", reason=reason, **_blame(error))
    guards = getattr(graph, "guards", ())
    outcome = replace(
        outcome,
        capture_s=time.perf_counter() - start,
        nodes=sum(1 for _ in graph.compute_nodes()),
        guards=len(guards),
    )
    try:
        actual = check.step(graph.bind(model), model, batches[0])
    except Exception as error:
        return replace(outcome, status="does not run", reason=first_line(error), **_blame(error))
    if dropout and family.not_replayed is not None:
        return replace(outcome, status="own draws", reason=family.not_replayed)
    worst, size = max(check.differences(actual, expected), key=lambda pair: pair[1])
    status = _verdict(size, family, graph)
    outcome = replace(outcome, error=size, worst=worst, status=status)
    if status not in GOOD:
        return replace(outcome, reason=f"{worst[:100]}: {size:.1e}")
    return _next_batch(outcome, family, graph, model, alone, batches[1])


def _verdict(size: float, family: Family, graph: Any) -> Status:
    if size <= TOLERANCE[family.dtype]:
        return "equal"
    values = (node.meta.get("val") for node in graph.compute_nodes())
    single = any(isinstance(v, torch.Tensor) and v.dtype is torch.float32 for v in values)
    return "close" if single and size <= TOLERANCE[torch.float32] else "unequal"


def _next_batch(
    outcome: Outcome, family: Family, graph: Any, model: nn.Module, alone: nn.Module, batch: Batch
) -> Outcome:
    """Whether the graph equals the model on another batch, or a guard fails."""
    leaves = pytree.tree_leaves(((), batch))
    broken = [
        guard
        for guard in getattr(graph, "guards", ())
        if not guard.holds(leaves, dict(model.named_buffers()))
    ]
    if broken:
        return replace(outcome, refused=broken[0].source)
    expected = check.step(alone, alone, batch)
    try:
        actual = check.step(graph.bind(model), model, batch)
    except Exception as error:
        return replace(outcome, status="wrong later", reason=first_line(error), **_blame(error))
    worst, size = max(check.differences(actual, expected), key=lambda pair: pair[1])
    if _verdict(size, family, graph) not in GOOD:
        return replace(outcome, status="wrong later", reason=f"{worst[:100]}: {size:.1e}")
    return outcome


def first_line(error: BaseException) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:300]}"


def _cause(error: BaseException) -> str:
    """A capture error without the model's name, so that equal causes group."""
    return re.sub(r"^CaptureError: cannot capture \w+ as one graph: ", "", first_line(error))


def _blame(error: BaseException) -> Mapping[str, Any]:
    """The statement a capture error names, or the last one outside of torch and autopar."""
    named = _AT.search(str(error))
    if named is not None:
        file, line = named[1], int(named[2])
    else:
        frames = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if not any(part in f.filename for part in ("/torch/", "/autopar/", "/zoo/", "<"))
        ]
        if not frames:
            return {}
        file, line = frames[-1].filename, frames[-1].lineno or 0
    short = file.rpartition("/site-packages/")[2]
    return {"source": f"{short}:{line}", "snippet": linecache.getline(file, line).strip()}
