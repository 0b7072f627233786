"""Per-node costs, forward and backward, without running anything.

Each node's own ATen program is dispatched on fake tensors, then its derivative through the autograd
engine, under a mode that counts and records storages. Gradients arrive in the layout that their
consumers emit, since backward copies what is laid out wrongly. Identical calls are profiled once,
so a deep model costs one layer.
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
from autopar.ir.graph import ModelGraph, operands, producer
from autopar.profiler.call import Call, in_place_variant, origin_of
from autopar.profiler.counting import Work
from autopar.profiler.tape import OPERAND, Count, Strides, Tape

# a result of an operator call or a placeholder: the node, and which of its results
Value = tuple[fx.Node, int]


@dataclass(frozen=True)
class NodeProfile:
    """Costs of one node at global shapes; numbers, or expressions if the shapes are symbolic.

    Args:
        forward, backward: work of the kernels; no backward where no gradient arrives.
        tape: what the call makes, saves, emits and frees.
        carries: per result, whether it carries a gradient.
        leaves: results that carry one only because the author made them leaves: the gradient goes
            no further.
    """

    forward: Work = field(default_factory=Work)
    backward: Work = field(default_factory=Work)
    tape: Tape = field(default_factory=Tape)
    carries: tuple[bool, ...] = ()
    leaves: tuple[int, ...] = ()

    @property
    def forward_flops(self) -> Count:
        return self.forward.flops

    @property
    def backward_flops(self) -> Count:
        return self.backward.flops

    @property
    def forward_bytes(self) -> Count:
        """Bytes read and written."""
        return self.forward.read_bytes + self.forward.written_bytes

    @property
    def backward_bytes(self) -> Count:
        """Bytes read and written."""
        return self.backward.read_bytes + self.backward.written_bytes

    @property
    def forward_kernels(self) -> int:
        return self.forward.kernels

    @property
    def backward_kernels(self) -> int:
        return self.backward.kernels

    @property
    def saves_inputs(self) -> tuple[int, ...]:
        """Operands whose storage autograd keeps for backward."""
        return self.tape.saved_operands

    @property
    def saves_outputs(self) -> tuple[int, ...]:
        """Results whose storage autograd keeps for backward."""
        return self.tape.saved_results

    @property
    def saved_internal_bytes(self) -> Count:
        """Kept storage that is neither operand nor result."""
        return self.tape.saved_own_bytes

    @cached_property
    def forward_transient_bytes(self) -> Count:
        """Peak of what forward makes, above what is left of it."""
        return self.tape.transient_bytes(self.tape.forward)

    @cached_property
    def backward_transient_bytes(self) -> Count:
        """Peak of what backward makes, above the gradients it emits."""
        return self.tape.transient_bytes(self.tape.backward)

    @property
    def differentiable(self) -> bool:
        """Some result carries a gradient."""
        return any(self.carries)

    @property
    def aliases_input(self) -> bool:
        """The first result shares its storage with an operand (a view)."""
        return bool(self.tape.results) and self.tape.results[0].owner == OPERAND


def requires_grad_map(graph: ModelGraph, trainable: set[str]) -> dict[fx.Node, bool]:
    """Which values carry a gradient: floating point, and computed from a trainable parameter.

    Args:
        trainable: placeholder names of the parameters that require grad.
    """
    found: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            found[node] = node.target in trainable
        elif node.op == "call_function":
            values = tensors_of(node.meta["val"])
            floating = any(v.dtype.is_floating_point or v.dtype.is_complex for v in values)
            detached = str(node.target) == "aten.detach.default"
            reached = any(found[n] for n in node.all_input_nodes)
            found[node] = floating and reached and not detached
    return found


def gradient_roots(graph: ModelGraph, carries: Callable[[Value], bool]) -> list[Value]:
    """Where backward starts: the first scalar output that carries a gradient (the loss), or else
    every output that does."""
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
        eager: profile the module as eager PyTorch runs it rather than as it was captured: operators
            in place where the author wrote them so, dropout and batch norm as eager runs them,
            gradients of values that the forward sets `requires_grad` on.
    """
    return _Profiler(graph, frozenset(trainable), eager).run()


class _Profiler:
    """One forward walk over the graph for what is saved, one backward walk for the gradients."""

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
        self.found: dict[Any, NodeProfile] = {}
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
        """Which results carry a gradient."""
        wanted = [n is not None and self.carries[producer(n)] for n in operands(node)]
        first = next(iter(operands(node)), None)
        viewed = first is not None and producer(first) in self.views
        on_view = self.eager and viewed and in_place_variant(node) is not None
        key = _signature(node, wanted, self.eager, on_view)
        make = partial(Call, node, wanted, self.mode, self.eager, on_view)
        self.keys[node] = key, make
        if key not in self.calls:
            self.calls[key] = make()
        natural = self.calls[key].carries
        self.views |= {(node, k) for k, view in enumerate(self.calls[key].views) if view}
        self.carries |= {(node, k): c or (node, k) in self.marked for k, c in enumerate(natural)}

    def backward(self, node: fx.Node, layouts: dict[Value, Strides]) -> NodeProfile:
        """Profile the node for the gradients that arrive, and add those it emits to `layouts`."""
        (signature, make), call = self.keys[node], self.calls[self.keys[node][0]]
        carries = tuple(self.carries[node, k] for k in range(len(call.carries)))
        leaves = tuple(k for k, c in enumerate(carries) if c and not call.carries[k])
        reached = [layouts.pop((node, k), None) for k in range(len(carries))]
        arriving = tuple(None if k in leaves else strides for k, strides in enumerate(reached))
        key = signature, repr(arriving), leaves
        if key not in self.found:
            if call.spent:
                call = self.calls[signature] = make()
            backward, tape = call.finish(arriving)
            self.found[key] = NodeProfile(call.work, backward, tape, carries, leaves)
        given = operands(node)
        for emission in self.found[key].tape.emitted:
            operand = given[emission.operand]
            assert operand is not None
            value = producer(operand)
            old, new = layouts.get(value), emission.strides
            layouts[value] = new if old is None else summed_strides(operand.meta["val"], old, new)
        return self.found[key]


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
    """The mode that the graph was captured in, which knows its symbols."""
    for node in graph.nodes:
        for t in tensors_of(node.meta.get("val")):
            if isinstance(t, FakeTensor):
                return t.fake_mode
    return FakeTensorMode()


def _signature(node: fx.Node, wanted: Sequence[bool], eager: bool, on_view: bool) -> str:
    def describe(n: fx.Node) -> Any:
        value = n.meta["val"]
        if not isinstance(value, torch.Tensor | list | tuple):
            return str(value)
        return pytree.tree_map_only(
            torch.Tensor, lambda t: (tuple(t.shape), t.stride(), str(t.dtype)), value
        )

    # two operands that are one value get one gradient
    given = operands(node)
    same = [given.index(n) for n in given]
    args = fx.node.map_arg((node.args, node.kwargs), describe)
    written = origin_of(node) if eager else ""
    return repr((str(node.target), written, args, wanted, same, on_view))
