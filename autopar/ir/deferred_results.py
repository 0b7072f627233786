"""Results that stay as they are laid out until the caller reads them.

A model that returns its loss beside its logits (as Hugging Face's do) is mostly asked for the loss
alone. Whole logits on every rank would cost more than the step.
"""

from __future__ import annotations

import math

import torch
import torch.fx as fx

from autopar.ir.graph import ModelGraph

# Elements below which a result is handed out whole: gathering it costs little.
MINIMUM_ELEMENTS = 2**16


def deferred_results(graph: ModelGraph) -> frozenset[int]:
    """Positions, among a graph's outputs, of large results beside a loss."""
    outputs = list(enumerate(graph.output.args[0]))[len(graph.mutations) :]  # type: ignore[arg-type]
    values = {
        i: value.meta["val"]
        for i, value in outputs
        if isinstance(value, fx.Node) and isinstance(value.meta["val"], torch.Tensor)
    }
    if not any(v.ndim == 0 and v.dtype.is_floating_point for v in values.values()):
        return frozenset()
    return frozenset(
        i
        for i, v in values.items()
        if all(type(n) is int for n in v.shape) and math.prod(v.shape) >= MINIMUM_ELEMENTS
    )
