"""What a plan costs: predicted time and memory of a full choice of candidates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autopar.plan import MemoryEstimate, TimeEstimate
from autopar.planner.liveness import Liveness
from autopar.planner.space import SearchSpace


def estimate_time(
    space: SearchSpace, choices: Sequence[int], liveness: Liveness | None = None
) -> TimeEstimate:
    """Compute, and communication split into what is exposed and what hides behind compute.

    Conversions of weights (gathers before use, gradient reductions after) do not wait for the
    activations beside them; on devices that communicate beside compute they take time only where
    they are late.
    """
    compute = exposed = weights = 0.0
    for decision, c in zip(space.decisions, choices, strict=True):
        for part in ("compute_us", "step_us"):
            compute += float(decision.parts[part][c]) if part in decision.parts else 0.0
        if "communication_us" in decision.parts:
            exposed += float(decision.parts["communication_us"][c])
    for edge in space.edges:
        time, _ = space.conversion_costs(edge, choices)
        if edge.weight:
            weights += time
        else:
            exposed += time
    if not space.weights_hide:
        return TimeEstimate(compute, exposed + weights, 0.0, weights)
    late = (liveness or Liveness(space, np.inf)).late_us(choices)
    return TimeEstimate(compute, exposed + late, max(0.0, weights - late), weights)


def estimate_memory(
    space: SearchSpace, choices: Sequence[int], liveness: Liveness | None = None
) -> MemoryEstimate:
    """Bytes per device by kind at the moment of the peak, on the fullest rank."""
    series = (liveness or Liveness(space, np.inf)).memory
    moment = int(np.argmax(series.values(space, choices)))
    kinds = series.kinds(space, choices, moment)
    return MemoryEstimate(
        kinds.get("parameters", 0.0),
        kinds.get("gradients", 0.0),
        kinds.get("optimizer", 0.0),
        kinds.get("activations", 0.0),
        kinds.get("buffers", 0.0),
        kinds.get("transient", 0.0),
    )
