"""Cross-entropy of tokens, with the dims of the batch as they are.

Models flatten logits `[b, s, v]` and labels `[b, s]` to rows for `cross_entropy`. Rows have no dim
for the sequence, so that logits whose sequence is split would be gathered. This operator takes
both as they are. Where logits lose their last tokens and labels their first (the loss of a token is
that of the next), the labels are shifted instead, and the last are ignored: the same loss, and a
sequence that is not cut.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F

from autopar.ir.graph import bound_arguments
from autopar.tracer.inplace import call_like

aten = torch.ops.aten

_NONE, _MEAN = 0, 1
_REDUCTIONS = {_NONE: "none", _MEAN: "mean", 2: "sum"}
_IGNORED = -100

_LIBRARY = torch.library.Library("autopar", "FRAGMENT")
_LIBRARY.define(
    "token_cross_entropy(Tensor self, Tensor target, Tensor? weight=None, int reduction=1, "
    "int ignore_index=-100, float label_smoothing=0.0) -> Tensor"
)


def _token_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    reduction: int = _MEAN,
    ignore_index: int = _IGNORED,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Logits [*, v] and classes [*] to the losses [*], or to their mean or sum."""
    losses = F.cross_entropy(
        logits.flatten(0, -2), target.flatten(), weight, None, ignore_index, None,
        _REDUCTIONS[reduction], label_smoothing,
    )  # fmt: skip
    return losses.view(target.shape) if reduction == _NONE else losses


_LIBRARY.impl("token_cross_entropy", _token_cross_entropy, "CompositeImplicitAutograd")
TOKEN_CROSS_ENTROPY = torch.ops.autopar.token_cross_entropy.default


def keep_token_dims(graph: fx.Graph) -> None:
    """Replace losses of flattened tokens."""
    for node in graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default):
        _keep(node)


def _keep(node: fx.Node) -> None:
    arguments = bound_arguments(node)
    logits, target = arguments.pop("self"), arguments.pop("target")
    cast = logits if logits.target is aten._to_copy.default else None
    tokens, labels = _unflattened(logits if cast is None else cast.args[0]), _unflattened(target)
    if tokens is None or labels is None:
        return
    shape, of_labels = tokens.meta["val"].shape, labels.meta["val"].shape
    if shape[:-1] != of_labels or shape[-1] != logits.meta["val"].shape[-1]:
        return
    if logits.meta["val"].ndim != 2 or target.meta["val"].ndim != 1:
        return
    with node.graph.inserting_before(node):
        tokens, labels = _uncut(node, tokens, labels, arguments.get("ignore_index", _IGNORED))
        if cast is not None:
            tokens = call_like(cast, cast.target, (tokens, *cast.args[1:]), cast.kwargs)
        loss = call_like(node, TOKEN_CROSS_ENTROPY, (tokens, labels), arguments)
        if arguments.get("reduction", _MEAN) == _NONE:  # the caller sees rows, and no padding
            dim, count = len(of_labels) - 1, of_labels[-1]
            if loss.meta["val"].shape[dim] != count:
                loss = call_like(node, aten.slice.Tensor, (loss, dim, 0, count), {})
            loss = call_like(node, aten.reshape.default, (loss, [target.meta["val"].shape[0]]), {})
    node.replace_all_uses_with(loss)
    graph = node.graph
    graph.erase_node(node)


def _unflattened(rows: fx.Node) -> fx.Node | None:
    """The value that a reshape flattens to rows; None if it flattens nothing."""
    if rows.op != "call_function" or rows.target not in _RESHAPES:
        return None
    source: Any = rows.args[0]
    shape = source.meta["val"].shape
    if not all(isinstance(n, int) for n in shape) or len(shape) == rows.meta["val"].ndim:
        return None
    return source


_RESHAPES = {
    aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten._unsafe_view.default,
}  # fmt: skip


_COPIES = {aten.contiguous.default, aten.clone.default, aten.alias.default}


def _uncut(
    node: fx.Node, tokens: fx.Node, labels: fx.Node, ignored: int
) -> tuple[fx.Node, fx.Node]:
    """Logits and labels without the cut that aligns them; labels are shifted instead."""
    dim = tokens.meta["val"].ndim - 2
    of_tokens, of_labels = _cut(tokens, dim), _cut(labels, dim)
    if of_tokens is None or of_labels is None:
        return tokens, labels
    (whole, first, count), (every, second, _) = of_tokens, of_labels
    size = whole.meta["val"].shape[dim]
    if (first, second) != (0, size - count) or every.meta["val"].shape[dim] != size:
        return tokens, labels
    padded = call_like(node, aten.constant_pad_nd.default, (labels, [0, size - count], ignored))
    return whole, padded


def _cut(node: fx.Node, dim: int) -> tuple[fx.Node, int, int] | None:
    """The value that this one is a slice of along a dim, where it starts, and how long it is.

    Copies, and slices that cut nothing, do not count.
    """
    while node.op == "call_function":
        if node.target in _COPIES:
            (node,) = node.all_input_nodes
            continue
        if node.target is not aten.slice.Tensor:
            return None
        arguments = bound_arguments(node)
        source, of = arguments["self"], arguments.get("dim", 0) % node.meta["val"].ndim
        size, length = source.meta["val"].shape[of], node.meta["val"].shape[of]
        if size == length:
            node = source
            continue
        if of != dim or arguments.get("step", 1) != 1:
            return None
        start = arguments.get("start") or 0
        return source, start + size if start < 0 else start, length
    return None
