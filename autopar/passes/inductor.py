"""Inductor for the two graphs that the partition made: each is compiled for itself, so that what
one hands to the other, and what the backward computes again, stays as planned.

`compile_fx_inner` and the table of decompositions are private to torch; tested with 2.11 and
2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx


class Compiled:
    """A graph that Inductor runs once `compile` was called; called by a list that it empties.

    On fake tensors it runs node by node, as lowering needs shapes before there is a program.

    Args:
        gm: a forward or backward graph, with `meta["val"]` on its placeholders.
        backward: which of the two.
        interpret: runs the graph without Inductor, by a list.
    """

    _boxed_call = True

    def __init__(
        self, gm: fx.GraphModule, interpret: Callable[[list[Any]], Any], *, backward: bool
    ) -> None:
        self._gm, self._interpret, self._backward = gm, interpret, backward
        self._compiled: Callable[[list[Any]], Any] | None = None

    def __call__(self, arguments: list[Any]) -> Any:
        if self._compiled is None or any(isinstance(a, FakeTensor) for a in arguments):
            return self._interpret(arguments)
        return self._compiled(arguments)

    def compile(self) -> None:
        """Generate and build the code."""
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner

        mode = FakeTensorMode()
        with mode:
            arguments = [_like(n.meta["val"]) for n in self._gm.graph.nodes if _is_input(n)]
            graph = _decomposed(self._gm, arguments)
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
            # the order is planned: for memory, and for collectives, alike on ranks of other sizes
            "reorder_for_peak_memory": False,
        }
        with tracing, config.patch(options):
            self._compiled = compile_fx_inner(graph, arguments, is_backward=self._backward)


def _is_input(node: fx.Node) -> bool:
    return node.op == "placeholder"


def _like(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)


def _decomposed(gm: fx.GraphModule, arguments: list[Any]) -> fx.GraphModule:
    """In the operators that Inductor knows. Tracing merges nothing: what runs twice stays twice."""
    from torch._inductor.decomposition import select_decomp_table

    def run(*flat: Any) -> Any:
        return fx.Interpreter(gm).run(*flat)

    return make_fx(run, decomposition_table=select_decomp_table())(*arguments)
