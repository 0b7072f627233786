"""From graph nodes to rules: which operands a node has, how it may be split, what it produces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from autopar.ir.aliasing import tensors_of
from autopar.ir.graph import bound_arguments, operands, shape_of
from autopar.ir.spec import ShardingSpec, local_shape
from autopar.sharding.lowerings.declared import Declared, LocalCall, declared
from autopar.sharding.rule import OpRule, Shape, Strategy
from autopar.sharding.rules import Call, bind
from autopar.sharding.strategies import named_strategy, strategies

_RULE = "autopar_rule"


def results(node: fx.Node) -> list[torch.Tensor]:
    """The fake tensors a node produces."""
    return tensors_of(node.meta["val"])


def call_of(node: fx.Node) -> Call:
    """The node's call by shapes."""

    def described(value: Any) -> Any:
        return pytree.tree_map_only(fx.Node, lambda n: shape_of(n.meta["val"]), value)

    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = {k: described(v) for k, v in bound_arguments(node).items()}
    inputs = tuple(None if n is None else shape_of(n.meta["val"]) for n in operands(node))
    values = [None if n is None else n.meta["val"] for n in operands(node)]
    return Call(
        node.target,
        arguments,
        inputs,
        tuple(shape_of(t) for t in results(node)),
        masks=tuple(t is not None and t.dtype is torch.bool for t in values),
        strides=tuple(None if t is None else tuple(int(n) for n in t.stride()) for t in values),
    )


def replicated_rule(node: fx.Node) -> OpRule:
    """No factor may be split: always right."""
    inputs = tuple(None if n is None else (None,) * n.meta["val"].ndim for n in operands(node))
    return OpRule(inputs, tuple((None,) * t.ndim for t in results(node)), {})


def rule_of(node: fx.Node) -> tuple[OpRule, bool]:
    """The node's rule, and whether the table had one (else it is full replication)."""
    if _RULE not in node.meta:  # every stage asks; the graph does not change once captured
        rule = bind(call_of(node))
        if rule is None:
            node.meta[_RULE] = replicated_rule(node), False
        else:
            node.meta[_RULE] = replace(rule, linear=_summable(node, rule)), True
    return node.meta[_RULE]


def _summable(node: fx.Node, rule: OpRule) -> tuple[frozenset[int], ...]:
    """The linear sets whose operands can be pending sums: a mask cannot."""
    tensors = operands(node)
    return tuple(
        group
        for group in rule.linear
        if all((n := tensors[i]) is None or is_floating(n.meta["val"]) for i in group)
    )


def is_floating(t: torch.Tensor) -> bool:
    """Whether it is real or complex rather than an integer or a boolean."""
    return t.dtype.is_floating_point or t.dtype.is_complex


def _floating(node: fx.Node) -> list[bool]:
    return [is_floating(t) for t in results(node)]


def strategies_of(node: fx.Node, mesh: Sequence[int], **options: Any) -> list[Strategy]:
    """Every legal strategy of a node on a mesh, with options of `autopar.sharding.strategies`."""
    rule, _ = rule_of(node)
    return strategies(rule, mesh, _floating(node), **options)


def strategy_by_name(node: fx.Node, mesh: Sequence[int], name: str) -> Strategy:
    """The strategy whose name a plan holds.

    Raises:
        ValueError: the node has no such strategy.
    """
    return named_strategy(rule_of(node)[0], mesh, name, _floating(node))


def declared_of(
    node: fx.Node,
    strategy: Strategy,
    mesh: Sequence[int],
    coords: Sequence[int] | None = None,
    *,
    call: Call | None = None,
) -> Declared:
    """What the strategy's lowering declares for the call on one rank, the first if `coords` is
    None.

    Args:
        call: `call_of` the node, if that is known.
    """
    rule, _ = rule_of(node)
    if not strategy.lowered or rule.lowering is None:
        return Declared()
    where = (0,) * len(mesh) if coords is None else tuple(coords)
    call = call or call_of(node)

    def local(shape: Shape | None, spec: ShardingSpec | None) -> Any:
        if shape is None or spec is None:
            return None
        return local_shape(shape, spec, mesh, where)

    first = next((n for n in operands(node) if n is not None), None)
    return declared(
        rule.lowering,
        LocalCall(
            call.arguments,
            tuple(map(local, call.inputs, strategy.inputs)),
            tuple(map(local, call.outputs, strategy.outputs)),
            rule.inputs,
            {name: rule.factors[name].size for name in strategy.splits},
            strategy.splits,
            tuple(mesh),
            where,
            first is not None and is_floating(first.meta["val"]),
        ),
    )
