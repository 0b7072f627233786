"""A model graph of one operator call, and the call's own results and gradients."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from autopar.ir.graph import ModelGraph, NodeInfo, map_operands, named_operands, operands
from autopar.sharding.node_rules import is_floating, rule_of, strategies_of
from autopar.sharding.rule import OpRule, Strategy
from autopar.testing.rules.draw import Draw, Sample
from autopar.testing.rules.random_ops import seed_torch

_HERE = NodeInfo("", "autopar rules check")

# Texts of autograd's errors for ops and operands without a derivative.
_NO_DERIVATIVE = ("not implemented", "not differentiable", "does not require grad", "derivative")


@dataclass(frozen=True)
class OneOp:
    """A call as the planner sees it, and its results on global tensors.

    Args:
        sample: the call.
        graph: placeholders, the call, outputs; metadata are the tensors themselves.
        node: the call's node.
        inputs: per tensor operand (`operands(node)`) its value, None where absent.
        trained: per operand, whether it takes a gradient.
        outputs: the results.
        cotangents: per result, None where it has no gradient.
        gradients: per operand, None where it takes none.
    """

    sample: Sample
    graph: ModelGraph
    node: fx.Node
    inputs: tuple[torch.Tensor | None, ...]
    trained: tuple[bool, ...]
    outputs: tuple[torch.Tensor, ...]
    cotangents: tuple[torch.Tensor | None, ...]
    gradients: tuple[torch.Tensor | None, ...]

    @property
    def placeholders(self) -> list[str]:
        """Names in the order in which programs take them."""
        return [n.name for n in self.node.graph.nodes if n.op == "placeholder"]

    @property
    def rule(self) -> tuple[OpRule, bool]:
        """The rule, and whether the table had one."""
        return rule_of(self.node)

    def elements(self) -> int:
        """Of all operands."""
        return sum(x.numel() for x in self.inputs if x is not None)

    def strategies(self, mesh: Sequence[int]) -> list[Strategy]:
        return strategies_of(self.node, mesh)


def one_op(sample: Sample, draw: Draw) -> OneOp:
    """The call as a graph, run on global tensors with random cotangents.

    Raises:
        RuntimeError: the op refuses the arguments.
    """
    node, values = _call_node(sample)
    inputs = tuple(None if n is None else values[n] for n in operands(node))
    differentiable = [
        n is not None and is_floating(values[n]) and name not in sample.fixed
        for name, n in named_operands(node)
    ]
    try:
        outputs, cotangents, gradients = _backward(node, inputs, differentiable, draw)
    except (RuntimeError, NotImplementedError) as error:
        if not any(differentiable) or not any(t in str(error) for t in _NO_DERIVATIVE):
            raise
        differentiable = [False] * len(inputs)
        outputs, cotangents, gradients = _backward(node, inputs, differentiable, draw)
    graph = _finish(node, values, outputs, differentiable)
    return OneOp(sample, graph, node, inputs, tuple(differentiable), outputs, cotangents, gradients)


def _call_node(sample: Sample) -> tuple[fx.Node, dict[fx.Node, torch.Tensor]]:
    graph = fx.Graph()
    values: dict[fx.Node, torch.Tensor] = {}

    def stand_in(tensor: torch.Tensor) -> fx.Node:
        node = graph.placeholder(f"x{len(values)}")
        values[node] = tensor
        return node

    args, kwargs = pytree.tree_map_only(
        torch.Tensor, stand_in, (tuple(sample.args), dict(sample.kwargs))
    )
    return graph.call_function(sample.op, args, kwargs), values


def _backward(
    node: fx.Node, inputs: Sequence[torch.Tensor | None], differentiable: Sequence[bool], draw: Draw
) -> tuple[tuple[torch.Tensor, ...], tuple[Any, ...], tuple[Any, ...]]:
    leaves = leaves_of(inputs, differentiable)
    results = flat_tensors(call(node, leaves))
    cotangents = tuple(_cotangent(r, draw) if r.requires_grad else None for r in results)
    gradients = grad(results, cotangents, leaves)
    return tuple(r.detach() for r in results), cotangents, gradients


def leaves_of(
    tensors: Sequence[torch.Tensor | None], trained: Sequence[bool]
) -> list[torch.Tensor | None]:
    """The tensors as leaves of autograd's graph."""
    return [
        None if x is None else x.detach().requires_grad_(t)
        for x, t in zip(tensors, trained, strict=True)
    ]


def _cotangent(like: torch.Tensor, draw: Draw) -> torch.Tensor:
    if like.dtype.is_complex:
        return torch.complex(draw.normal(*like.shape), draw.normal(*like.shape)).to(like.dtype)
    return draw.normal(*like.shape).to(like.dtype)


def call(node: fx.Node, values: Sequence[torch.Tensor | None]) -> Any:
    """Run the node's op on tensors instead of its operands."""
    args, kwargs = map_operands(node, list(values))
    assert callable(node.target)
    seed_torch(str(node.target))
    return node.target(*args, **kwargs)


def substituted(node: fx.Node, values: Sequence[torch.Tensor | None]) -> dict[str, Any]:
    """The call's arguments by schema name, with tensors instead of its operands."""
    assert isinstance(node.target, torch._ops.OpOverload)
    args, kwargs = map_operands(node, list(values))
    names = [a.name for a in node.target._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def flat_tensors(value: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def grad(
    results: Sequence[torch.Tensor],
    cotangents: Sequence[torch.Tensor | None],
    leaves: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the leaves that take one, zero where they were not used; None elsewhere."""
    pairs = [
        (r, c)
        for r, c in zip(results, cotangents, strict=True)
        if c is not None and r.requires_grad
    ]
    inputs = [x for x in leaves if x is not None and x.requires_grad]
    gradients: Sequence[torch.Tensor | None] = [None] * len(inputs)
    if pairs and inputs:
        gradients = torch.autograd.grad(
            [r for r, _ in pairs], inputs, [c for _, c in pairs], allow_unused=True
        )
    queue = iter(
        torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)
    )
    return tuple(next(queue) if x is not None and x.requires_grad else None for x in leaves)


def _finish(
    node: fx.Node,
    values: dict[fx.Node, torch.Tensor],
    outputs: Sequence[torch.Tensor],
    differentiable: Sequence[bool],
) -> ModelGraph:
    """The call as a `ModelGraph`, with metadata, outputs and roles."""
    graph = node.graph
    trained = {
        n for n, d in zip(operands(node), differentiable, strict=True) if n is not None and d
    }
    for placeholder, value in values.items():
        placeholder.meta |= {"val": value, "autopar": _HERE}
    assert isinstance(node.target, torch._ops.OpOverload)
    returns = node.target._schema.returns
    single = len(returns) == 1 and str(returns[0].type) == "Tensor"
    node.meta |= {"val": outputs[0] if single else tuple(outputs), "autopar": _HERE}
    results = [node]
    if not single:
        results = [graph.call_function(operator.getitem, (node, i)) for i in range(len(outputs))]
        for result, value in zip(results, outputs, strict=True):
            result.meta |= {"val": value, "autopar": _HERE}
    graph.output(tuple(results))
    spec = pytree.tree_structure(((), {}))
    return ModelGraph(
        gm=fx.GraphModule(torch.nn.Module(), graph, "OneOp"),
        parameters={str(n.target): str(n.target) for n in values if n in trained},
        buffers={},
        inputs=tuple(str(n.target) for n in values if n not in trained),
        mutations=(),
        in_spec=spec,
        out_spec=spec,
    )
