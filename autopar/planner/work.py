"""What a step processes: samples, tokens, and the floating-point operations of the model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.fx as fx

from autopar.ir.aliasing import tensors_of
from autopar.ir.graph import ModelGraph, bound_arguments, shape_of
from autopar.plan_records import StepWork
from autopar.profiler.profile import NodeProfile
from autopar.profiler.time_model import computed


def batch_dims(
    names: Sequence[str], shapes: Sequence[Sequence[int]], dims: Mapping[str, int | None] | int
) -> tuple[int, dict[int, int]]:
    """The samples of a batch, and by position the dim of the inputs that hold them.

    The size that most inputs have there is that of the batch; others have no samples.

    Args:
        names: of the arguments that hold the inputs.
        dims: which dim holds samples, of all inputs or by names; None of one that has none.
    """
    found: dict[int, int] = {}
    for k, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        dim = dims.get(name, 0) if isinstance(dims, Mapping) else dims
        if dim is None or not shape:
            continue
        dim = min(dim, len(shape) - 1) if isinstance(dims, int) else dim
        found[k] = dim
    sizes = Counter(shapes[k][d] for k, d in found.items())
    samples = max(sizes, key=sizes.__getitem__, default=0)
    return samples, {k: d for k, d in found.items() if shapes[k][d] == samples}


def work_of(graph: ModelGraph, profile: Mapping[fx.Node, NodeProfile]) -> StepWork:
    """The work of a graph's step, forward and backward, with nothing computed twice.

    Tokens are the elements of the largest input of integers that has samples and a dim beside.
    FLOPs are those of products, convolutions and attention, of this without the pairs that a causal
    mask or a window leaves out.
    """
    inputs = [graph.placeholders[name] for name in graph.inputs if name is not None]
    values = [n.meta["val"] for n in inputs if isinstance(n.meta["val"], torch.Tensor)]
    shapes = [tuple(int(size) for size in shape_of(value)) for value in values]
    samples, dims = batch_dims([""] * len(shapes), shapes, 0)
    tokens = [
        int(values[k].numel())
        for k in dims
        if len(shapes[k]) > 1 and not values[k].dtype.is_floating_point
    ]
    flops: dict[str, float] = defaultdict(float)
    for node, costs in profile.items():
        arguments = bound_arguments(node)
        works = (computed(node.target, arguments, work) for work in (costs.forward, costs.backward))
        if count := sum(float(work.flops) for work in works):
            dtype = tensors_of(node.meta["val"])[0].dtype
            flops[str(dtype).removeprefix("torch.")] += count
    return StepWork(samples, max(tokens, default=0), dict(flops))
