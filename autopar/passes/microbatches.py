"""The graphs of the microbatches of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.fx as fx

from autopar.errors import PlanError
from autopar.ir.graph import ModelGraph, shape_of
from autopar.passes.slice_graph import slice_graph, whole_graph
from autopar.passes.time_split import State, separate


@dataclass(frozen=True)
class Microbatches:
    """A step as microbatches.

    Args:
        graph: of a microbatch, by its samples.
        whole: computes values from the whole batch; takes buffers, constants and inputs.
        whole_states: of these values.
        results: state of each result of the step; None of what is no tensor. "M" of a mean of what
            the microbatches give, "C" of a buffer that each hands to the next.
    """

    graph: Callable[[int], ModelGraph]
    whole: fx.GraphModule | None
    whole_states: tuple[State, ...]
    results: tuple[State | None, ...]


def exact_microbatches(
    graph: ModelGraph, dims: Mapping[str, int], samples: int, trainable: frozenset[str]
) -> Microbatches:
    """Microbatches that give what the batch gives.

    Args:
        dims: by placeholder name, the dim of an input that holds samples.
        samples: of the batch.
        trainable: placeholder names of what requires grad.

    Raises:
        NotSeparableError: naming the operator that mixes samples, its source line and the remedy.
    """
    separation = separate(graph, dims, samples, trainable)
    outputs: Any = separation.graph.output.args[0]
    results = (separation.state(x) if isinstance(x, fx.Node) else None for x in outputs)
    return Microbatches(
        cache(partial(slice_graph, separation)),
        whole_graph(separation),
        tuple(state for _, state in separation.whole),
        tuple(results),
    )


def independent_microbatches(
    graph: ModelGraph, size: int, trace: Callable[[int], ModelGraph]
) -> Microbatches:
    """Microbatches that are batches of their own: losses are means of theirs, buffers go from one
    to the next.

    Args:
        graph: of the batch.
        size: samples of a microbatch.
        trace: captures the model for a microbatch of that many samples.

    Raises:
        PlanError: a result is no slice and no mean.
    """
    trace = cache(trace)
    states: list[State | None] = []
    outputs: Any = zip(graph.output.args[0], trace(size).output.args[0], strict=True)  # type: ignore[arg-type]
    for k, (batch, part) in enumerate(outputs):
        if not isinstance(part, fx.Node):
            states.append(None)
        elif k < len(graph.mutations):
            states.append("C")
        else:
            states.append(_state(k, batch.meta["val"], part.meta["val"]))
    return Microbatches(trace, None, (), tuple(states))


def _state(number: int, batch: torch.Tensor, part: torch.Tensor) -> State:
    """How a result of the batch comes from those of microbatches."""
    whole, own = shape_of(batch), shape_of(part)
    differing = [d for d, (a, b) in enumerate(zip(whole, own, strict=True)) if a != b]
    if len(differing) == 1:
        return f"S{differing[0]}"
    if differing:
        raise PlanError(
            f"result {number} of the model is of shape {list(whole)} for the batch and "
            f"{list(own)} for a microbatch: it is neither one part per sample nor a mean; return "
            "it from another call of the model, without microbatches"
        )
    return "M" if batch.dtype.is_floating_point else "R"
