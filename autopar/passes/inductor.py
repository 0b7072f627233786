"""Inductor for a forward or backward graph: each is compiled by itself, so that what one passes to
the other, and what the backward recomputes, stays as planned.

`compile_fx_inner` and the table of decompositions are private to torch; tested with 2.11 and
2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx


def compile_graph(gm: fx.GraphModule, *, backward: bool) -> Callable[[list[Any]], Any]:
    """Generate and build the code of a graph, called by a list that it empties.

    Args:
        gm: with `meta["val"]` on its placeholders.
        backward: which of the two graphs it is.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    mode = FakeTensorMode()
    with mode:
        arguments = [_fake_like(n.meta["val"]) for n in gm.graph.find_nodes(op="placeholder")]
        graph = _decomposed(gm, arguments)
    output = graph.graph.output_node()
    results = [n.meta.get("val") if isinstance(n, fx.Node) else None for n in output.args[0]]  # type: ignore[union-attr]
    # The backward is built for the strides that its graph has, so nothing may choose others.
    tensors = [i for i, t in enumerate(results) if isinstance(t, torch.Tensor)]
    output.meta["user_visible_output_idxs"] = tensors
    output.meta["original_output_strides"] = [
        t.stride() if isinstance(t, torch.Tensor) else None for t in results
    ]
    tracing = torch._guards.tracing(torch._guards.TracingContext(mode))
    options = {
        "fallback_random": True,  # random operators draw what they draw without Inductor
        "layout_optimization": False,
        # the order is planned: for memory, and for collectives, equally on ranks of other sizes
        "reorder_for_peak_memory": False,
    }
    with tracing, config.patch(options):
        return compile_fx_inner(graph, arguments, is_backward=backward)


def _fake_like(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)


def _decomposed(gm: fx.GraphModule, arguments: list[Any]) -> fx.GraphModule:
    """In the operators that Inductor knows. Tracing merges nothing: what runs twice stays twice."""
    from torch._inductor.decomposition import select_decomp_table

    def run(*flat: Any) -> Any:
        return fx.Interpreter(gm).run(*flat)

    return make_fx(run, decomposition_table=select_decomp_table())(*arguments)
