"""What a collective's operator does, as a graph of functional collectives and ATen operators.

A late pass writes these graphs into the programs that run. Schedules read from them what a
collective holds while it runs.
"""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import torch
import torch.fx as fx
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.comm.functional import out_of_place
from autopar.comm.operators import IMPLEMENTATIONS


def call_key(node: fx.Node) -> Any:
    """Equal for calls of a collective that have the same implementation."""

    def described(n: fx.Node) -> Any:
        value = n.meta["val"]
        return tuple(value.shape), value.stride(), value.dtype, value.device

    return node.target, repr(fx.node.map_arg(node.args, described))


def implementation(node: fx.Node, *, mutate: bool = True) -> fx.Graph:
    """The implementation of a collective as a graph of the call's tensor operands, in their order.
    Its nodes have values on the meta device, which are made in a fraction of the time of fake ones.

    Args:
        node: calls one of `IMPLEMENTATIONS`; nodes have their values in `meta["val"]`.
        mutate: let a collective write to its own buffer.
    """
    graph, operands = fx.Graph(), node.all_input_nodes
    values = {n: _shape_of(n.meta["val"]) for n in operands}
    with (
        _Recorder(graph, list(values.values())) as recorder,
        contextlib.nullcontext() if mutate else out_of_place(),
    ):
        args = fx.node.map_arg(node.args, values.__getitem__)
        result = IMPLEMENTATIONS[node.target](*args)  # type: ignore[index]
    graph.output(recorder.nodes(result))
    graph.eliminate_dead_code()
    return graph


class _Recorder(TorchDispatchMode):
    """Writes the operators that run on meta tensors to a graph. `make_fx` does as much and more, in
    several times the time: a third of that of a small model's first step."""

    def __init__(self, graph: fx.Graph, inputs: list[torch.Tensor]) -> None:
        super().__init__()
        self._graph = graph
        # a tensor is known by its identity, hence kept
        self._known: dict[int, tuple[torch.Tensor, fx.Node]] = {}
        for k, value in enumerate(inputs):
            self._note(value, graph.placeholder(f"operand_{k}"))

    def _note(self, value: torch.Tensor, node: fx.Node) -> None:
        node.meta["val"] = value
        self._known[id(value)] = value, node

    def nodes(self, values: Any) -> Any:
        """Nodes in the place of tensors."""
        return fx.node.map_aggregate(
            values, lambda v: self._known[id(v)][1] if isinstance(v, torch.Tensor) else v
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor | list | tuple):  # asks for a device
            return result
        shown = _shown(func, args, kwargs)
        if shown is not None and isinstance(result, torch.Tensor):
            result = torch.ops.aten.alias.default(shown)
        node = self._graph.call_function(func, self.nodes(args), self.nodes(kwargs))
        if isinstance(result, torch.Tensor):
            self._note(result, node)
        else:
            for k, part in enumerate(result):
                self._note(part, self._graph.call_function(operator.getitem, (node, k)))
        return result


def _shown(func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """The tensor whose memory a functional collective returns: the one that it waits for or writes
    to. On the meta device each returns another one (torch 2.13)."""
    if func.namespace != "_c10d_functional":
        return None
    if func is torch.ops._c10d_functional.wait_tensor.default:
        return args[0]
    return kwargs.get("out", args[0]) if func._schema.is_mutable else None


def _shape_of(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="meta")
