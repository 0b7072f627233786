"""What a plan costs: predicted time and memory of a full choice of candidates."""

from __future__ import annotations

from collections.abc import Sequence

from autopar.plan import MemoryEstimate, TimeEstimate
from autopar.sharding.space import SearchSpace

# Of the backward's compute, the share behind which gradient reductions can run: the last layers'
# gradients are known at its beginning, the first ones' only at its end.
HIDING_SHARE = 0.5


def estimate_time(space: SearchSpace, choices: Sequence[int]) -> TimeEstimate:
    """Compute, and communication split into what is exposed and what hides behind compute.

    Conversions of weights (gathers before use, gradient reductions after) do not wait for the
    activations beside them, so they overlap with compute as far as it lasts.
    """
    compute = exposed = weights = 0.0
    for site, c in zip(space.sites, choices, strict=True):
        compute += float(site.parts["compute_us"][c]) if "compute_us" in site.parts else 0.0
        if "communication_us" in site.parts:
            exposed += float(site.parts["communication_us"][c])
    for link in space.links:
        time, _ = space.conversion_costs(link, choices)
        if link.weight:
            weights += time
        else:
            exposed += time
    hidden = min(weights, hiding_share(space) * compute)
    return TimeEstimate(compute, exposed + weights - hidden, hidden, weights)


def hiding_share(space: SearchSpace) -> float:
    """Share of compute that hides weight communication. Gloo's threads compete with compute for the
    same cores; GPUs communicate beside it."""
    return 0.0 if space.cluster.device.kind == "cpu" else HIDING_SHARE


def estimate_memory(space: SearchSpace, choices: Sequence[int]) -> MemoryEstimate:
    """Bytes per device by kind, on the fullest rank."""
    total: dict[str, float] = {}
    for site, c in zip(space.sites, choices, strict=True):
        for kind, values in site.parts.items():
            if kind.endswith("_bytes"):
                total[kind] = total.get(kind, 0.0) + float(values[c])
    for link in space.links:
        _, memory = space.conversion_costs(link, choices)
        total["activations_bytes"] = total.get("activations_bytes", 0.0) + memory
    return MemoryEstimate(
        total.get("parameters_bytes", 0.0),
        total.get("gradients_bytes", 0.0),
        total.get("optimizer_bytes", 0.0),
        total.get("activations_bytes", 0.0),
        total.get("buffers_bytes", 0.0),
        estimate_transient(space, choices),
    )


def estimate_transient(space: SearchSpace, choices: Sequence[int]) -> float:
    """Largest working set of one operator's backward: gradients of its results and operands.

    At the end of the forward all saved activations are alive; the gradients that then flow through
    the operator with the largest tensors come on top.
    """
    return max(
        (
            float(site.parts["working"][c])
            for site, c in zip(space.sites, choices, strict=True)
            if site.kind == "op"
        ),
        default=0.0,
    )
