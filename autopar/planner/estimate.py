"""Predicted time and memory of a plan, given as a full choice of candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autopar.plan_records import MEMORY_KINDS, MemoryEstimate, TimeEstimate
from autopar.planner.decisions import Edge
from autopar.planner.liveness import Liveness
from autopar.planner.space import SearchSpace


def estimate_time(
    space: SearchSpace, choices: Sequence[int], liveness: Liveness | None = None
) -> TimeEstimate:
    """Compute, and communication split into exposed and overlapped.

    Conversions of weights (gathers before use, gradient reductions after) do not wait for the
    activations beside them; on devices that communicate beside compute only the part that compute
    waits for takes time.
    """
    compute = exposed = weights = 0.0
    for decision, c in zip(space.decisions, choices, strict=True):
        for part in ("compute_us", "accumulation_us", "step_us"):
            compute += float(decision.parts[part][c]) if part in decision.parts else 0.0
    compute += host_waits_us(space, choices)
    for decision, c in zip(space.decisions, choices, strict=True):
        if "communication_us" in decision.parts:
            exposed += float(decision.parts["communication_us"][c])
    for edge in space.edges:
        time, _ = space.conversion_costs(edge, choices)
        if edge.weight:
            weights += time
        else:
            exposed += time
    if not space.weights_overlap:
        return TimeEstimate(compute, exposed + weights, 0.0, weights)
    waiting = (liveness or Liveness(space, math.inf)).exposed_us(choices)
    return TimeEstimate(compute, exposed + waiting, max(0.0, weights - waiting), weights)


def host_waits_us(space: SearchSpace, choices: Sequence[int]) -> float:
    """How long the device waits for the host, which launches its kernels: a forward or a backward
    takes the longer of the two. 0 if the cluster has no software."""
    if space.cluster.software is None:
        return 0.0
    device, host = [0.0, 0.0], [0.0, 0.0]
    for decision, c in zip(space.decisions, choices, strict=True):
        if decision.kind == "op":
            for k, part in enumerate(("forward_us", "backward_us")):
                device[k] += float(decision.parts[part][c])
                device[k] += float(decision.parts["communication_us"][c]) / 2
                host[k] += space.host_us(decision.node)[k]
    for edge in space.edges:
        if not edge.weight:
            costs, pair = space.edge_costs(edge), (choices[edge.source], choices[edge.target])
            for k, more in enumerate(space.collective_host_us(edge, choices)):
                host[k] += more
            device[0] += float(costs.forward_us[pair])
            device[1] += float(costs.backward_us[pair])
    return sum(max(0.0, h - d) for h, d in zip(host, device, strict=True))


def optimizer_us(space: SearchSpace, choices: Sequence[int]) -> float:
    """The optimizer's step, which is a part of compute."""
    pairs = zip(space.decisions, choices, strict=True)
    return sum(float(d.parts["step_us"][c]) for d, c in pairs if "step_us" in d.parts)


def accumulation_us(space: SearchSpace, edge: Edge, choices: Sequence[int]) -> float:
    """What it takes to add the gradient of the weight on an edge to that of earlier microbatches;
    0 on other edges."""
    target = space.decisions[edge.target]
    spec = target.candidates[choices[edge.target]].inputs[edge.operand] if edge.weight else None
    if spec is None or not edge.grad:
        return 0.0
    return space.accumulation_us(edge.shape, edge.itemsize, spec)


def estimate_memory(
    space: SearchSpace, choices: Sequence[int], liveness: Liveness | None = None
) -> MemoryEstimate:
    """Bytes per device by kind at the program point of the peak, on the fullest rank."""
    series = (liveness or Liveness(space, math.inf)).memory
    peak = int(np.argmax(series.values(choices)))
    kinds = series.breakdown(choices, peak, lambda item: item.kind)
    return MemoryEstimate(
        **{key: kinds.get(key.removesuffix("_bytes"), 0.0) for key in MEMORY_KINDS.values()}
    )
