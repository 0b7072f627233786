"""Masks of attention that positions decide, said in the operator's arguments instead.

Models write causal masks and sliding windows as tensors. Attention with `is_causal`, or in a band
(`autopar.banded_attention`), leaves out what is not seen, needs no tensor of all pairs, and is
split over the sequence without one. Booleans that are the same for all queries, such as those of
padding, become a mask of the keys.

Only what is proved by the graph is replaced (`masks.py`); inputs, buffers and constants are not
known. A bias other than 0, -inf and the smallest number of its dtype stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from autopar.ir.graph import bound_arguments
from autopar.ir.precision import without_autocast
from autopar.operators.banded_attention import BANDED, Band
from autopar.tracer.inplace import call_like, computed
from autopar.tracer.masks import Masks, broadcast
from autopar.tracer.positions import Conjunction, Given, Levels, Shape

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default
CAUSAL = Band(None, 0)


def name_masks(graph: fx.Graph) -> None:
    """Replace masks of attention that positions decide, alone or with booleans of the keys."""
    masks = Masks()
    of_keys: dict[tuple[Given, ...], fx.Node] = {}
    with without_autocast():  # the graph holds its casts
        for node in graph.find_nodes(op="call_function", target=ATTENTION):
            seen = _seen(masks, node)
            if seen is not None:
                _replace(node, seen, of_keys)


@dataclass(frozen=True)
class _Seen:
    """Which keys a query sees: those of a band that booleans of the keys show."""

    band: Band
    of_keys: tuple[Given, ...]


def _seen(masks: Masks, node: fx.Node) -> _Seen | None:
    """What the mask of an attention says; None if it is not known."""
    arguments = bound_arguments(node)
    mask = arguments.get("attn_mask")
    if mask is None or arguments.get("is_causal") or not _is_plain(node, arguments):
        return None
    queries, keys = (arguments[n].meta["val"].shape[-2] for n in ("query", "key"))
    value = masks.of(mask)
    if not isinstance(value, Levels) or len(value.shape) < 2:
        return None
    value = broadcast(value, (*value.shape[:-2], queries, keys))
    if not isinstance(value, Levels) or value.where.never:
        return None
    if value.is_constant:
        seen = value.value
        shows_all = bool(seen) if seen.dtype == torch.bool else float(seen) == 0
        return _Seen(Band(None, None), ()) if shows_all else None
    if value.where.is_half and not _shows(value):
        value = value.inverse()
    band = _band(value.where, value.shape)
    if band is None or not _each_sees_some(band, queries, keys) or not _shows(value):
        return None
    return _Seen(_needed(band, queries, keys), value.where.given)


def _is_plain(node: fx.Node, arguments: dict[str, Any]) -> bool:
    """Whether sizes are numbers, and batch dims those of the queries."""
    shapes = [tuple(arguments[n].meta["val"].shape) for n in ("query", "key", "value")]
    if not all(isinstance(n, int) for shape in shapes for n in shape):
        return False
    query, key, value = shapes
    lead = query[:-3] == key[:-3] == value[:-3]
    shared = bool(arguments.get("enable_gqa")) and key[-3:-2] == value[-3:-2]
    if not lead or not (shared or query[-3:-2] == key[-3:-2] == value[-3:-2]):
        return False
    return tuple(node.meta["val"].shape) == (*query[:-1], value[-1])


def _band(where: Conjunction, shape: Shape) -> Band | None:
    """The band of a conjunction whose other parts are the same for all queries."""
    rows, columns = len(shape) - 2, len(shape) - 1
    if any(g.dims[rows] is not None for g in where.given):
        return None
    if not where.within:
        return Band(None, None)
    within, *others = where.within
    if others or (within.first, within.second) != (rows, columns):
        return None
    return Band(within.low, within.high)


def _each_sees_some(band: Band, queries: int, keys: int) -> bool:
    """Whether every query sees a key, so that no score is the largest although it is masked."""
    low = -queries if band.low is None else band.low
    high = keys if band.high is None else band.high
    return low <= high and high >= 0 and queries - 1 + low <= keys - 1


def _needed(band: Band, queries: int, keys: int) -> Band:
    """Without bounds that leave out nothing."""
    low = None if band.low is None or band.low <= 1 - queries else band.low
    high = None if band.high is None or band.high >= keys - 1 else band.high
    return Band(low, high)


def _shows(value: Levels) -> bool:
    """Whether a mask, of booleans or of what is added to the scores, shows what is inside.

    The smallest number of a wide dtype hides a key beside any that is seen; not where none is.
    """
    if value.inside.dtype == torch.bool:
        return value.is_mask
    if not value.inside.dtype.is_floating_point or float(value.inside) != 0:
        return False
    outside, smallest = float(value.outside), torch.finfo(value.outside.dtype).min
    wide = smallest <= torch.finfo(torch.bfloat16).min and not value.where.given
    return outside == -math.inf or (wide and outside == smallest)


def _replace(node: fx.Node, seen: _Seen, of_keys: dict[tuple[Given, ...], fx.Node]) -> None:
    arguments = bound_arguments(node)
    query = arguments["query"].meta["val"]
    operands = [arguments[n] for n in ("query", "key", "value")]
    rest: dict[str, Any] = {n: arguments[n] for n in ("scale", "enable_gqa") if n in arguments}
    if not seen.of_keys and seen.band in (Band(None, None), CAUSAL):
        rest["is_causal"] = seen.band == CAUSAL
        if "dropout_p" in arguments:
            rest["dropout_p"] = arguments["dropout_p"]
        node.args, node.kwargs = tuple(operands), rest
        node.meta["val"] = computed(node.target, node.args, node.kwargs)
        return
    # what the kernels of GPUs take beside a mask of the keys is torch's own operator alone
    if seen.of_keys and query.device.type != "cpu":
        return
    if seen.band == Band(None, None):
        mask = _mask_of_keys(node, seen.of_keys, of_keys)
        if (
            mask is not None
            and mask.meta["val"].numel() < arguments["attn_mask"].meta["val"].numel()
        ):
            node.replace_input_with(arguments["attn_mask"], mask)
        return
    if arguments.get("dropout_p"):
        return
    bounds = None if seen.band.low is None else -seen.band.low, seen.band.high
    extra: tuple[fx.Node, ...] = ()
    if seen.of_keys:
        mask = _mask_of_keys(node, seen.of_keys, of_keys)
        if mask is None:
            return
        extra = (mask,)
    with node.graph.inserting_before(node):
        new = call_like(node, BANDED, (*operands, *bounds, *extra), rest, "banded_attention")
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _mask_of_keys(
    node: fx.Node, given: tuple[Given, ...], made: dict[tuple[Given, ...], fx.Node]
) -> fx.Node | None:
    """[*b, 1, keys]: where all booleans are True; None if a view shows them in another order."""
    if given not in made:
        parts = []
        with node.graph.inserting_before(node):
            for own in given:
                shown = [d for d in own.dims if d is not None]
                shape = own.node.meta["val"].shape
                if shown != sorted(shown) or math.prod(shape[d] for d in shown) != math.prod(shape):
                    return None
                sizes = [1 if d is None else shape[d] for d in own.dims]
                own_mask = own.node
                if sizes != list(shape):
                    own_mask = call_like(own.node, aten.reshape.default, (own.node, sizes))
                parts.append(own_mask)
            mask = parts[0]
            for part in parts[1:]:
                mask = call_like(part, aten.__and__.Tensor, (mask, part))
        made[given] = mask
    return made[given]
