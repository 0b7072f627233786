"""Products whose result is immediately cut into equal parts: query, key and value of one weight.

If a weight `[k, 3 n]` is split over its columns, its parts are not split: the first rank has the
query, the last has the value. With a dim for the parts, `[k, 3, n]`, the weight can be split over
n: heads, or the features of a gated MLP. So such products become operators whose weight and result
have that dim.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F

from autopar.tracer.inplace import call_like

aten = torch.ops.aten

_LIBRARY = torch.library.Library("autopar", "FRAGMENT")
_LIBRARY.define("packed_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")
_LIBRARY.define("packed_addmm(Tensor bias, Tensor x, Tensor weight) -> Tensor")


def _packed_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [*, k], weight [p, n, k], bias [p, n] to [*, p, n]."""
    out = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return out.unflatten(-1, weight.shape[:2])


def _packed_addmm(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """bias [p, n], x [m, k], weight [k, p, n] to [m, p, n]."""
    out = torch.addmm(bias.flatten(), x, weight.flatten(1, 2))
    return out.unflatten(-1, weight.shape[1:])


_LIBRARY.impl("packed_linear", _packed_linear, "CompositeImplicitAutograd")
_LIBRARY.impl("packed_addmm", _packed_addmm, "CompositeImplicitAutograd")

# per product: its packed operator, the positions of weight and bias, and the weight's dim to divide
_PRODUCTS: dict[Any, tuple[Any, int, int, int]] = {
    aten.linear.default: (torch.ops.autopar.packed_linear.default, 1, 2, 0),
    aten.addmm.default: (torch.ops.autopar.packed_addmm.default, 2, 0, 1),
}


def pack(graph: fx.Graph) -> None:
    """Add a dim for the parts to every product whose result is cut into equal parts."""
    for product in [n for n in graph.nodes if n.target in _PRODUCTS]:
        fixed = all(isinstance(size, int) for size in product.meta["val"].shape)
        if fixed and not product.kwargs and _has_plain_bias(product):
            _pack(graph, product)


def _has_plain_bias(product: fx.Node) -> bool:
    """Whether it has no bias, or a vector: `addmm` adds matrices, too."""
    bias = dict(enumerate(product.args)).get(_PRODUCTS[product.target][2])
    return not isinstance(bias, fx.Node) or bias.meta["val"].ndim == 1


def _pack(graph: fx.Graph, product: fx.Node) -> None:
    result = product
    if list(result.users) and next(iter(result.users)).target is aten.reshape.default:
        flat = next(iter(result.users))
        if flat.meta["val"].shape[-1:] == result.meta["val"].shape[-1:]:
            result = flat  # only dims before the last change
    if len(product.users) != 1 or (result is not product and len(result.users) != 1):
        return
    cut = next(iter(result.users))
    parts = _split_into(cut, result) or _regrouped_into(cut, result)
    if parts is None:
        return
    out = _packed_product(graph, product, parts)
    if result is not product:
        shape = [*result.meta["val"].shape[:-1], *out.meta["val"].shape[-2:]]
        out = _call(graph, result, aten.reshape.default, out, shape)
    if cut.target is aten.reshape.default:
        cut.replace_input_with(result, out)
    else:
        cut.replace_all_uses_with(_call(graph, cut, aten.unbind.int, out, -2))
        graph.erase_node(cut)
    for node in dict.fromkeys((result, product)):
        graph.erase_node(node)


def _split_into(cut: fx.Node, result: fx.Node) -> int | None:
    """Number of parts of a `split` of the last dim into equal parts; None for other nodes."""
    if cut.target is not aten.split.Tensor or cut.args[0] is not result:
        return None
    shape = result.meta["val"].shape
    size, dim = cut.args[1], cut.args[2] if len(cut.args) > 2 else 0
    assert isinstance(size, int)
    assert isinstance(dim, int)
    last = dim % len(shape) == len(shape) - 1
    if not last or shape[-1] % size or shape[-1] == size:
        return None
    if any(user.target is not operator.getitem for user in cut.users):
        return None
    return int(shape[-1] // size)


def _regrouped_into(cut: fx.Node, result: fx.Node) -> int | None:
    """Number of parts of a `reshape` of the last dim into (parts, ...) whose parts are read one by
    one."""
    if cut.target is not aten.reshape.default:
        return None
    shape, regrouped = result.meta["val"].shape, cut.meta["val"].shape
    dim = len(shape) - 1
    if regrouped[:dim] != shape[:dim] or len(regrouped) < dim + 2 or regrouped[dim] < 2:
        return None
    taken = all(_takes(user, cut, dim) for user in cut.users)
    return int(regrouped[dim]) if taken and cut.users else None


def _takes(user: fx.Node, source: fx.Node, dim: int) -> bool:
    """Whether a node reads a value part by part along a dim, which it may first move."""
    rank = source.meta["val"].ndim
    args: Any = user.args
    if user.target is aten.permute.default:
        moved = [d % rank for d in args[1]].index(dim)
        return bool(user.users) and all(_takes(u, user, moved) for u in user.users)
    if user.target is aten.transpose.int:
        a, b = args[1] % rank, args[2] % rank
        moved = {a: b, b: a}.get(dim, dim)
        return bool(user.users) and all(_takes(u, user, moved) for u in user.users)
    if user.target is aten.unbind.int:
        return (args[1] if len(args) > 1 else 0) % rank == dim
    return user.target is aten.select.int and args[1] % rank == dim


def _packed_product(graph: fx.Graph, product: fx.Node, parts: int) -> fx.Node:
    target, weight_at, bias_at, dim = _PRODUCTS[product.target]
    args: list[Any] = list(product.args)
    weight = args[weight_at]
    sizes = list(weight.meta["val"].shape)
    sizes[dim : dim + 1] = [parts, sizes[dim] // parts]
    args[weight_at] = _call(graph, product, aten.reshape.default, weight, sizes)
    if bias_at < len(args) and args[bias_at] is not None:
        n = sizes[dim : dim + 2]
        args[bias_at] = _call(graph, product, aten.reshape.default, args[bias_at], n)
    return _call(graph, product, target, *args)


def _call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A call in a node's place, with that node's metadata."""
    with graph.inserting_before(like):
        return call_like(like, target, args)
