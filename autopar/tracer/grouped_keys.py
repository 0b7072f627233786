"""Keys and values that heads share, given to attention as they are instead of repeated per head.

Grouped-query attention is often written with repeated keys: `[b, kv, s, d]` is expanded to
`[b, kv, n, s, d]` and reshaped to `[b, kv * n, s, d]`. With `enable_gqa=True` the operator takes
them unrepeated, so that a split sequence sends each key once and nothing keeps n copies.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from autopar.ir.graph import bound_arguments
from autopar.operators.banded_attention import BANDED
from autopar.tracer.inplace import computed

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default
_HALF = (torch.float16, torch.bfloat16)
_WIDEST = 256  # heads that the flash kernel on GPUs takes
# Where their result has the shape of their operand, they change no value.
_SAME = {
    aten.alias.default, aten.clone.default, aten.contiguous.default, aten.expand.default,
    aten.reshape.default, aten.slice.Tensor,
}  # fmt: skip
_INSERTS = {aten.unsqueeze.default, aten.reshape.default}


def share_keys(graph: fx.Graph) -> None:
    """Have attention take the keys and values that were repeated for its heads."""
    for target in (ATTENTION, BANDED):
        for node in graph.find_nodes(op="call_function", target=target):
            _share(node)


def _share(node: fx.Node) -> None:
    arguments = bound_arguments(node)
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    if arguments.get("enable_gqa"):
        return
    shapes = [tuple(n.meta["val"].shape) for n in (query, key, value)]
    if not all(isinstance(size, int) for shape in shapes for size in shape):
        return
    sources = [_repeated(key), _repeated(value)]
    if None in sources or any(len(s) < 3 or s[-3] != shapes[0][-3] for s in shapes):
        return
    kept = [n for n in sources if n is not None]
    if kept[0].meta["val"].shape[-3] != kept[1].meta["val"].shape[-3]:
        return
    mask = arguments.get("attn_mask")
    if node.target is ATTENTION and not _kernel_shares(query, key, value, mask):
        return
    node.args = (query, *kept, *node.args[3:])
    node.kwargs = {**node.kwargs, "enable_gqa": True}
    node.meta["val"] = computed(node.target, node.args, node.kwargs)


def _kernel_shares(query: fx.Node, key: fx.Node, value: fx.Node, mask: fx.Node | None) -> bool:
    """Whether the kernel of the device takes unrepeated keys: else torch writes out all scores."""
    q, k, v = (n.meta["val"] for n in (query, key, value))
    if q.device.type == "cpu":
        return True
    return mask is None and q.dtype in _HALF and k.shape[-1] == v.shape[-1] <= _WIDEST


def _repeated(node: fx.Node) -> fx.Node | None:
    """What a value repeats, index by index of dim -3; None if it is no such repeat."""
    node = _source(node)
    if node.op != "call_function":
        return None
    shape = node.meta["val"].shape
    if node.target is aten.repeat_interleave.self_int:
        arguments = bound_arguments(node)
        dim = arguments.get("dim")
        of = arguments["self"]
        return of if dim is not None and dim % len(shape) == len(shape) - 3 else None
    if node.target is not aten.reshape.default:
        return None
    many = _source(_operand(node))
    shape_many = many.meta["val"].shape
    if many.target not in (aten.expand.default, aten.repeat.default) or len(shape_many) < 4:
        return None
    *lead, heads, repeats, length, width = shape_many
    if shape != (*lead, heads * repeats, length, width):
        return None
    one = _source(_operand(many))
    if one.meta["val"].shape != (*lead, heads, 1, length, width) or one.target not in _INSERTS:
        return None
    of = _operand(one)
    return of if of.meta["val"].shape == (*lead, heads, length, width) else None


def _source(node: fx.Node) -> fx.Node:
    """The value that a node hands on unchanged."""
    while node.op == "call_function" and node.target in _SAME:
        source = _operand(node)
        if source.meta["val"].shape != node.meta["val"].shape:
            break
        node = source
    return node


def _operand(node: fx.Node) -> fx.Node:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand
