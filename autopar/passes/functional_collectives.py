"""Write collectives as `torch.ops._c10d_functional` operators with `wait_tensor`.

Up to here an operator of `autopar.comm` stands for each collective with its padding and layout, so
that buckets and schedules move one node. In the graphs that run, its implementation takes its
place, so that Inductor, profilers and flight recorders see the collectives they know.
"""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.comm.functional import out_of_place
from autopar.comm.operators import IMPLEMENTATIONS

_WAIT = torch.ops._c10d_functional.wait_tensor.default
_WAIT_IN_PLACE = "autopar.wait_in_place.default"


def functional_collectives(gm: fx.GraphModule, *, mutate: bool = True) -> fx.GraphModule:
    """Replace every collective by its implementation. Works in place.

    Args:
        mutate: let a collective write to its own buffer, which saves a copy; Inductor's graphs may
            not.
    """
    traced: dict[Any, fx.Graph] = {}  # equal calls, of repeated blocks, are traced once
    for node in list(gm.graph.nodes):
        if node.target not in IMPLEMENTATIONS:
            continue
        if str(node.target) == _WAIT_IN_PLACE:
            _wait_in_place(node)
            continue
        key = _key(node)
        if key not in traced:
            traced[key] = _trace(node, mutate)
        _inline(node, traced[key])
    return gm


def _key(node: fx.Node) -> Any:
    def described(n: fx.Node) -> Any:
        value = n.meta["val"]
        return tuple(value.shape), value.stride(), value.dtype, value.device

    return node.target, repr(fx.node.map_arg(node.args, described))


def _trace(node: fx.Node, mutate: bool) -> fx.Graph:
    """The implementation as a graph of the call's tensor operands, in their order."""
    graph, operands = fx.Graph(), node.all_input_nodes
    with FakeTensorMode():
        values = {n: _fake_like(n.meta["val"]) for n in operands}
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
    """Writes the operators that run on fake tensors to a graph. `make_fx` does as much and more, in
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
        node = self._graph.call_function(func, self.nodes(args), self.nodes(kwargs))
        if isinstance(result, torch.Tensor):
            self._note(result, node)
        else:
            for k, part in enumerate(result):
                self._note(part, self._graph.call_function(operator.getitem, (node, k)))
        return result


def _fake_like(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=t.device)


def _inline(node: fx.Node, body: fx.Graph) -> None:
    """Replace a node by a graph; its result takes over the metadata of the node."""
    placeholders = body.find_nodes(op="placeholder")
    env = dict(zip(placeholders, node.all_input_nodes, strict=True))
    with node.graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op == "call_function":
                env[inner] = node.graph.node_copy(inner, lambda n: env[n])
                # a kernel may lay a tensor out unlike its fake one, for which a view was possible
                if inner.target is torch.ops.aten.view.default:
                    env[inner].target = torch.ops.aten.reshape.default
    (result,) = body.output_node().args
    if isinstance(result, fx.Node):
        new = env[result]
        if new.op == "call_function":
            new.meta = _described(node, new)
        node.replace_all_uses_with(new)
    else:  # several results, which `getitem`s take apart
        for user in list(node.users):
            _, k = user.args
            new = env[result[k]]  # type: ignore[index]
            new.meta = _described(user, new)
            user.replace_all_uses_with(new)
            user.graph.erase_node(user)
    node.graph.erase_node(node)


def _described(node: fx.Node, new: fx.Node) -> dict[str, Any]:
    """The metadata of a node, but for what describes its operator."""
    return {k: v for k, v in node.meta.items() if k != "makes"} | {"val": new.meta["val"]}


def _wait_in_place(node: fx.Node) -> None:
    """What reads the buffer after the wait reads the wait's result."""
    (buffer,) = node.args
    position = {n: k for k, n in enumerate(node.graph.nodes)}
    with node.graph.inserting_before(node):
        done = node.graph.call_function(_WAIT, (buffer,))
    done.meta = dict(buffer.meta)  # type: ignore[union-attr]
    buffer.replace_all_uses_with(  # type: ignore[union-attr]
        done,
        delete_user_cb=lambda user: user is not done and position.get(user, -1) > position[node],
    )
    node.graph.erase_node(node)
