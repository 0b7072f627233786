"""Costs per node, forward and backward, without running anything.

Each node's own ATen program is dispatched on fake tensors, then its derivative through autograd's
engine, under a mode that counts and records storages. Backward copies a gradient whose layout does
not fit, so gradients come in with the layout in which their consumers emit them. Identical calls
are profiled once: a deep model costs as much as one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from autopar.ir.aliasing import tensors_of
from autopar.ir.graph import ModelGraph, operand_at, operands, producer
from autopar.ir.precision import without_autocast
from autopar.profiler.call import Call, in_place_variant, origin_of
from autopar.profiler.counting import Work
from autopar.profiler.tape import OPERAND, Count, Strides, Tape, maximum

# a result of an operator call or a placeholder: the node, and which of its results
Value = tuple[fx.Node, int]


@dataclass(frozen=True)
class NodeProfile:
    """Costs of one node at global shapes; numbers, or expressions if the shapes are symbolic.

    Args:
        forward, backward: work of the kernels; no backward if no gradient comes in.
        tape: what the call makes, saves, emits and frees.
        carries: per result, whether it carries a gradient.
        leaves: results that carry a gradient only because the author made them leaves. It ends
            there.
    """

    forward: Work = field(default_factory=Work)
    backward: Work = field(default_factory=Work)
    tape: Tape = field(default_factory=Tape)
    carries: tuple[bool, ...] = ()
    leaves: tuple[int, ...] = ()

    @cached_property
    def forward_transient_bytes(self) -> Count:
        """Peak of the forward's own bytes, above what remains of them."""
        levels = self.tape.levels(self.tape.forward)
        return maximum(levels) - levels[-1]

    @property
    def differentiable(self) -> bool:
        """Whether a result carries a gradient."""
        return any(self.carries)

    @property
    def aliases_input(self) -> bool:
        """Whether the first result shares its storage with an operand (a view)."""
        return bool(self.tape.results) and self.tape.results[0].owner == OPERAND


def requires_grad_map(graph: ModelGraph, trainable: set[str]) -> dict[fx.Node, bool]:
    """Which values carry a gradient: those of floating point, computed from a trainable parameter.

    Args:
        trainable: placeholder names of the parameters that require grad.
    """
    carries: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            carries[node] = node.target in trainable
        elif node.op == "call_function":
            values = tensors_of(node.meta["val"])
            floating = any(v.dtype.is_floating_point or v.dtype.is_complex for v in values)
            detached = str(node.target) == "aten.detach.default"
            reached = any(carries[n] for n in node.all_input_nodes)
            carries[node] = floating and reached and not detached
    return carries


def gradient_roots(graph: ModelGraph, carries: Callable[[Value], bool]) -> list[Value]:
    """The values from which the backward starts: the first scalar output that carries a gradient
    (the loss), or else every output that does."""
    outputs = [n for n in pytree.tree_leaves(graph.output.args) if isinstance(n, fx.Node)]
    values = [producer(n) for n in outputs if carries(producer(n))]
    scalars = [producer(n) for n in outputs if carries(producer(n)) and not n.meta["val"].ndim]
    return scalars[:1] or list(dict.fromkeys(values))


def profile_graph(
    graph: ModelGraph, trainable: Iterable[str], *, eager: bool = False
) -> dict[fx.Node, NodeProfile]:
    """Costs of every operator call of the graph, in one training step.

    Args:
        trainable: placeholder names of the parameters that require grad.
        eager: profile the module as eager PyTorch runs it, rather than as it was captured:
            operators in place if the author wrote them so, eager dropout and batch norm, and
            gradients of values on which the forward sets `requires_grad`.
    """
    with without_autocast():
        return _Profiler(graph, frozenset(trainable), eager).run()


class _Profiler:
    """Walks the graph forward for what is saved, and backward for the gradients."""

    def __init__(self, graph: ModelGraph, trainable: frozenset[str], eager: bool) -> None:
        self.graph, self.eager = graph, eager
        self.mode = _fake_mode(graph)
        self.nodes = list(graph.compute_nodes())
        self.marked = {producer(n) for n in graph.nodes if eager and graph.info(n).leaf}
        self.carries: dict[Value, bool] = {
            (n, 0): n.target in trainable or (n, 0) in self.marked
            for n in graph.placeholders.values()
        }
        self.keys: dict[fx.Node, Any] = {}
        self.calls: dict[Any, Call] = {}
        self.profiles: dict[Any, NodeProfile] = {}
        self.views: set[Value] = set()

    def run(self) -> dict[fx.Node, NodeProfile]:
        for node in self.nodes:
            self.forward(node)
        layouts: dict[Value, Strides] = {}
        for node, k in gradient_roots(self.graph, self.carries.__getitem__):
            layouts[node, k] = tensors_of(node.meta["val"])[k].stride()
        profiles = {node: self.backward(node, layouts) for node in reversed(self.nodes)}
        return {node: profiles[node] for node in self.nodes}

    def forward(self, node: fx.Node) -> None:
        """Make the call, and say which results carry a gradient."""
        requires_grad = [n is not None and self.carries[producer(n)] for n in operands(node)]
        first = next(iter(operands(node)), None)
        viewed = first is not None and producer(first) in self.views
        on_view = self.eager and viewed and in_place_variant(node) is not None
        key = _signature(node, requires_grad, self.eager, on_view)
        make = partial(Call, node, requires_grad, self.mode, self.eager, on_view)
        self.keys[node] = key, make
        if key not in self.calls:
            self.calls[key] = make()
        natural = self.calls[key].carries
        self.views |= {(node, k) for k, view in enumerate(self.calls[key].views) if view}
        self.carries |= {(node, k): c or (node, k) in self.marked for k, c in enumerate(natural)}

    def backward(self, node: fx.Node, layouts: dict[Value, Strides]) -> NodeProfile:
        """Profile the node for its incoming gradients, and add those that it emits to `layouts`."""
        (signature, make), call = self.keys[node], self.calls[self.keys[node][0]]
        carries = tuple(self.carries[node, k] for k in range(len(call.carries)))
        leaves = tuple(k for k, c in enumerate(carries) if c and not call.carries[k])
        reached = [layouts.pop((node, k), None) for k in range(len(carries))]
        incoming = tuple(None if k in leaves else strides for k, strides in enumerate(reached))
        key = signature, repr(incoming), leaves
        if key not in self.profiles:
            if call.spent:
                call = self.calls[signature] = make()
            backward, tape = call.finish(incoming)
            self.profiles[key] = NodeProfile(call.work, backward, tape, carries, leaves)
        for emission in self.profiles[key].tape.emitted:
            operand = operand_at(node, emission.operand)
            value = producer(operand)
            old, new = layouts.get(value), emission.strides
            layouts[value] = new if old is None else summed_strides(operand.meta["val"], old, new)
        return self.profiles[key]


def summed_strides(like: torch.Tensor, old: Strides, new: Strides) -> Strides:
    """Strides of the sum of two gradients of a value."""
    assert isinstance(like, FakeTensor)
    repeats = any(isinstance(s, int) and s == 0 for s in old)
    if repr(old) == repr(new) and not repeats:
        return old
    with like.fake_mode:
        parts = [torch.empty_strided(like.shape, s, dtype=like.dtype) for s in (old, new)]
        return torch.add(*parts).stride()


def _fake_mode(graph: ModelGraph) -> FakeTensorMode:
    """The mode in which the graph was captured; it has the graph's symbols."""
    tensors = (t for node in graph.nodes for t in tensors_of(node.meta.get("val")))
    fakes = (t.fake_mode for t in tensors if isinstance(t, FakeTensor))
    return next(fakes, None) or FakeTensorMode()


def _signature(node: fx.Node, requires_grad: Sequence[bool], eager: bool, on_view: bool) -> str:
    def describe(n: fx.Node) -> Any:
        value = n.meta["val"]
        if not isinstance(value, torch.Tensor | list | tuple):
            return str(value)
        return pytree.tree_map_only(
            torch.Tensor, lambda t: (tuple(t.shape), t.stride(), str(t.dtype)), value
        )

    # two operands that are one value get one gradient
    inputs = operands(node)
    same = [inputs.index(n) for n in inputs]
    args = fx.node.map_arg((node.args, node.kwargs), describe)
    origin = origin_of(node) if eager else ""
    return repr((str(node.target), origin, args, requires_grad, same, on_view))
