"""A graph in the form in which its batch separates best.

`cross_entropy` and `nll_loss` divide by how many targets are not to be ignored (or by their
weights). Over a part of the batch that would be another number; written out, it is a value of the
labels alone, which can be computed from the whole batch. Where ranks have parts of the targets, the
count is summed over them. With probabilities for targets, which no sharding rule covers,
`cross_entropy` is written as products and sums.

`broadcast_tensors`, which elementwise losses call, makes labels seem to depend on predictions;
where it broadcasts nothing, it is left out. A number that is added to a loss (`sum(losses)` begins
with 0) is written as a tensor, of which every part has its share. Dropout of what all samples share
(a weight) multiplies it by a mask, which is drawn once.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from autopar.ir.graph import ModelGraph, bound_arguments
from autopar.ir.randomness import draws
from autopar.sharding.lowerings import losses
from autopar.sharding.lowerings.shard import groups_of
from autopar.tracer import token_loss  # noqa: F401  (defines the operator)

aten = torch.ops.aten

_MEAN, _NONE, _SUM = 1, 0, 2
_LOSSES = frozenset(
    {
        aten.cross_entropy_loss.default,
        aten.nll_loss_nd.default,
        aten.nll_loss.default,
        aten.nll_loss2d.default,
        torch.ops.autopar.token_cross_entropy.default,
    }
)

_SUBTRACTIONS = frozenset({aten.sub.Tensor, aten.sub.Scalar})
_REVERSED = frozenset({aten.rsub.Scalar})
_ADDITIONS = _SUBTRACTIONS | _REVERSED | {aten.add.Tensor, aten.add.Scalar}

# The operators that lowerings of losses compute of a shard.
_OF_SHARD: dict[Any, Any] = {
    losses.cross_entropy: aten.cross_entropy_loss.default,
    losses.nll_loss: aten.nll_loss_nd.default,
    losses.token_cross_entropy: torch.ops.autopar.token_cross_entropy.default,
}


@dataclass(frozen=True)
class _Mean:
    """A loss that is a mean over targets that are classes.

    Args:
        arguments: of the loss, without logits and targets.
        groups: communicators of the ranks among which the targets are split.
    """

    op: torch._ops.OpOverload
    logits: fx.Node
    target: fx.Node
    arguments: dict[str, Any]
    groups: Sequence[str] = ()


def separable_form(graph: ModelGraph, sliced: Collection[str]) -> ModelGraph:
    """The same graph with the division by counts of targets written out.

    Losses in types of 2 bytes are summed in float32.

    Args:
        sliced: names of the placeholders of inputs that hold samples.
    """
    of_samples = {n for n in graph.nodes if n.op == "placeholder" and n.target in sliced}
    for node in graph.nodes:
        if not of_samples.isdisjoint(node.all_input_nodes):
            of_samples.add(node)
    copies: dict[fx.Node, fx.Node] = {}
    out = fx.Graph()
    for node in graph.nodes:
        if (mean := _mean(node)) is not None:
            copies[node] = _Writer(out, node).divided(mean, copies)
            copies[node].meta |= {"val": node.meta["val"]}
        elif _has_soft_targets(node):
            copies[node] = _Writer(out, node).soft(copies)
            copies[node].meta |= {"val": node.meta["val"]}
        elif (dropped := _dropped(node)) is not None and dropped not in of_samples:
            copies[node] = _Writer(out, node).mask(copies[dropped])
        elif (dropped := _dropped(_source(node))) is not None and dropped not in of_samples:
            item = copies[node] = _Writer(out, node).call(
                operator.getitem, copies[_source(node)], node.args[1]
            )
            if node.args[1] == 0:
                copies[node] = _Writer(out, node).call(aten.mul.Tensor, copies[dropped], item)
        elif (same := _broadcasts_nothing(node)) is not None:
            copies[node] = copies[same]
        elif (added := _added(node)) is not None:
            copies[node] = _Writer(out, node).added(*added, copies)
        else:
            copies[node] = out.node_copy(node, copies.__getitem__)
    out.eliminate_dead_code()
    return replace(graph, gm=fx.GraphModule(graph.gm, out))


def _broadcasts_nothing(node: fx.Node) -> fx.Node | None:
    """The operand that a result of `broadcast_tensors` is."""
    if node.target is not operator.getitem:
        return None
    source, number = node.args
    assert isinstance(source, fx.Node)
    if source.target is not aten.broadcast_tensors.default:
        return None
    operand = source.args[0][number]  # type: ignore[index]
    same = operand.meta["val"].shape == node.meta["val"].shape  # type: ignore[union-attr]
    return operand if same else None  # type: ignore[return-value]


def _added(node: fx.Node) -> tuple[fx.Node, float, bool] | None:
    """What a number is added to that gives a value of no dims, the number, and whether that value
    is subtracted from it."""
    if node.target not in _ADDITIONS or node.kwargs or len(node.args) != 2:
        return None
    x, number = node.args
    if not isinstance(x, fx.Node) or not isinstance(number, int | float):
        return None
    value, operand = node.meta["val"], x.meta["val"]
    if value.ndim or not value.dtype.is_floating_point or value.dtype != operand.dtype:
        return None
    return x, -number if node.target in _SUBTRACTIONS else number, node.target in _REVERSED


def _dropped(node: fx.Node) -> fx.Node | None:
    """The operand of dropout."""
    if node.target is not aten.native_dropout.default or not draws(node):
        return None
    return node.args[0]  # type: ignore[return-value]


def _source(node: fx.Node) -> fx.Node:
    """The call that gives a result, where it gives several; else the node itself."""
    return node.args[0] if node.target is operator.getitem else node  # type: ignore[return-value]


def _mean(node: fx.Node) -> _Mean | None:
    """None if the node is no mean over classes, or ranks have parts of the classes."""
    if node.target in _OF_SHARD:
        signature = inspect.signature(node.target)  # type: ignore[arg-type]
        arguments = signature.bind(*node.args, **node.kwargs).arguments
        shard = arguments.pop("shard")
        groups = groups_of(shard, *shard)
        logits, target = (arguments.pop(name) for name in list(signature.parameters)[:2])
        if "v" in shard:
            return None
    elif node.target in _LOSSES:
        arguments, groups = bound_arguments(node), []
        logits, target = arguments.pop("self"), arguments.pop("target")
    else:
        return None
    if target.meta["val"].ndim != logits.meta["val"].ndim - 1:
        return None
    if arguments.pop("reduction", _MEAN) != _MEAN:
        return None
    op: Any = _OF_SHARD.get(node.target, node.target)
    return _Mean(op, logits, target, arguments, groups)


def _has_soft_targets(node: fx.Node) -> bool:
    if node.target is not aten.cross_entropy_loss.default:
        return False
    arguments = bound_arguments(node)
    logits, target = arguments["self"], arguments["target"]
    return bool(target.meta["val"].shape == logits.meta["val"].shape)


class _Writer:
    """Writes one value.

    Args:
        out: the graph that is written.
        node: the value in the graph that is read.
    """

    def __init__(self, out: fx.Graph, node: fx.Node) -> None:
        self.out, self.node = out, node

    def call(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        new = self.out.call_function(op, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        first = self.node.meta["val"]
        mode = (first[0] if isinstance(first, tuple | list) else first).fake_mode
        with mode, torch.no_grad():
            new.meta["val"] = op(*values[0], **values[1])
        new.meta["autopar"] = self.node.meta["autopar"]
        return new

    def added(
        self, x: fx.Node, number: float, is_subtracted: bool, copies: dict[fx.Node, fx.Node]
    ) -> fx.Node:
        """The sum of a value of no dims and a number."""
        own = self.call(aten.neg.default, copies[x]) if is_subtracted else copies[x]
        if number == 0:
            return own
        like = self.node.meta["val"]
        constant = self.call(aten.full.default, [], number, dtype=like.dtype, device=like.device)
        return self.call(aten.add.Tensor, own, constant)

    def mask(self, operand: fx.Node) -> fx.Node:
        """Dropout of as many ones: what the operand is to be multiplied by."""
        like = operand.meta["val"]
        shape: Any = list(like.shape)
        ones = self.call(aten.full.default, shape, 1, dtype=like.dtype, device=like.device)
        return self.call(aten.native_dropout.default, ones, *self.node.args[1:])

    def divided(self, mean: _Mean, copies: dict[fx.Node, fx.Node]) -> fx.Node:
        """A mean loss as a sum and a count."""
        arguments = dict(fx.map_arg(mean.arguments, copies.__getitem__))
        logits, target = copies[mean.logits], copies[mean.target]
        ignored = arguments.get("ignore_index", -100)
        dtype = logits.meta["val"].dtype
        short = dtype.itemsize == 2
        arguments["reduction"] = _NONE if short else _SUM
        total = self.call(mean.op, logits, target, **arguments)
        if short:
            total = self.call(aten._to_copy.default, total, dtype=torch.float32)
            total = self.call(aten.sum.default, total)
        count = self._count(target, arguments.get("weight"), ignored)
        counts = total.meta["val"].dtype
        if count.meta["val"].dtype != counts:
            count = self.call(aten._to_copy.default, count, dtype=counts)
        for group in mean.groups:
            count = self.call(torch.ops.autopar.all_reduce.default, count, "sum", group)
        result = self.call(aten.div.Tensor, total, count)
        return self.call(aten._to_copy.default, result, dtype=dtype) if short else result

    def soft(self, copies: dict[fx.Node, fx.Node]) -> fx.Node:
        """Cross entropy with probabilities of classes for targets."""
        arguments = dict(fx.map_arg(bound_arguments(self.node), copies.__getitem__))
        logits, target = arguments["self"], arguments["target"]
        like, dtype = logits.meta["val"], target.meta["val"].dtype
        dim = min(1, like.ndim - 1)
        if smoothing := arguments.get("label_smoothing", 0.0):
            target = self.call(aten.mul.Scalar, target, 1 - smoothing)
            target = self.call(aten.add.Scalar, target, smoothing / like.shape[dim])
        if (weight := arguments.get("weight")) is not None:
            shape: Any = [-1 if d == dim else 1 for d in range(like.ndim)]
            target = self.call(aten.mul.Tensor, target, self.call(aten.view.default, weight, shape))
        short = dtype.itemsize == 2
        logs = self.call(
            aten.log_softmax.int, logits, dim, **({"dtype": torch.float32} if short else {})
        )
        losses = self.call(aten.neg.default, self.call(aten.mul.Tensor, logs, target))
        reduction = arguments.get("reduction", _MEAN)
        dims: Any = [dim]
        if reduction == _NONE:
            loss = self.call(aten.sum.dim_IntList, losses, dims)
        else:
            loss = self.call(aten.sum.default, losses)
        if reduction == _MEAN:
            loss = self.call(aten.div.Scalar, loss, like.numel() // like.shape[dim])
        own = self.node.meta["val"].dtype
        same = loss.meta["val"].dtype == own
        return loss if same else self.call(aten._to_copy.default, loss, dtype=own)

    def _count(self, target: fx.Node, weight: fx.Node | None, ignored: int) -> fx.Node:
        """How many targets are not ignored, or the sum of their weights."""
        valid = self.call(aten.ne.Scalar, target, ignored)
        if weight is None:
            return self.call(aten.sum.default, valid)
        rest = self.call(aten.eq.Scalar, target, ignored)
        classes = self.call(aten.masked_fill.Scalar, target, rest, 0)
        weights = self.call(aten.index.Tensor, weight, [classes])
        return self.call(aten.sum.default, self.call(aten.masked_fill.Scalar, weights, rest, 0))
