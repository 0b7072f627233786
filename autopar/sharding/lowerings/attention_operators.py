"""Attention to a block of keys as operators: one node of a graph each, the same on every rank.

Which pairs of queries and keys a rank computes depends on the positions of both, which are numbers
among the operands. So the programs of all ranks have the same operators.

Causal attention is cut into products that are whole, or causal with as many queries as keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.utils.flop_counter import register_flop_formula

from autopar.comm.operators import operator
from autopar.comm.spans import Span, Spans, length_of, overlap
from autopar.operators.attention_blocks import (
    Block,
    accumulated,
    attend,
    attend_backward,
    bias_of,
    merge,
)


@dataclass(frozen=True)
class Product:
    """Queries that attend to keys of a block: offsets and lengths in both tensors."""

    rows: Span
    columns: Span
    causal: bool = False


def segments(queries: Spans, keys: Sequence[Spans]) -> Spans:
    """Spans of queries, cut where spans of keys begin or end."""
    borders = sorted({b for own in keys for start, n in own for b in (start, start + n)})
    cut = []
    for start, length in queries:
        inner = [b for b in borders if start < b < start + length]
        bounds = [start, *inner, start + length]
        cut += [(a, b - a) for a, b in pairwise(bounds)]
    return tuple(cut)


def products(queries: Spans, keys: Spans, causal: bool) -> list[Product]:
    """What queries compute with a block of keys.

    Args:
        queries: as `segments` cuts them if causal.
    """
    columns = length_of(keys)
    if not causal:
        return [Product((0, length_of(queries)), (0, columns))]
    if queries == keys:
        return [Product((0, columns), (0, columns), causal=True)]
    whole: list[Product] = []
    diagonal = []
    row = 0
    for query in queries:
        start, length = query
        before = sum(overlap(span, (0, start))[1] for span in keys)
        last = whole[-1] if whole else None
        if before and last and last.columns == (0, before) and sum(last.rows) == row:
            whole[-1] = Product((last.rows[0], last.rows[1] + length), last.columns)
        elif before:
            whole.append(Product((row, length), (0, before)))
        if any(overlap(span, query)[1] for span in keys):
            diagonal.append(Product((row, length), (before, length), causal=True))
        row += length
    return whole + diagonal


# -- operators: spans are lists of starts and lengths ----------------------------------------------


def flat(spans: Spans) -> list[int]:
    """Spans as operators take them."""
    return [n for span in spans for n in span]


def _spans(numbers: Sequence[int]) -> Spans:
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def _products(queries: Sequence[int], keys: Sequence[int], causal: bool) -> list[Product]:
    own, block = _spans(queries), _spans(keys)
    return products(segments(own, [block]) if causal else own, block, causal)


def _of_product(bias: torch.Tensor | None, p: Product) -> torch.Tensor | None:
    """The part of a block's bias for a product."""
    for dim, span in ((-2, p.rows), (-1, p.columns)):
        if bias is not None and bias.shape[dim] > 1:
            bias = bias.narrow(dim, *span)
    return bias


def _lead(q: torch.Tensor, k: torch.Tensor) -> list[int]:
    """The dims before queries and keys."""
    of_keys = list(k.shape[:-2])
    if q.ndim > 2 and k.shape[-3] not in (1, q.shape[-3]):
        of_keys[-1] = q.shape[-3]
    return list(torch.broadcast_shapes(q.shape[:-2], of_keys))


def _attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
    base: torch.Tensor | None, queries: Sequence[int], keys: Sequence[int], causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    shape = [*_lead(q, k), q.shape[-2]]
    dtype = accumulated(q.dtype)
    return q.new_empty([*shape, v.shape[-1]], dtype=dtype), q.new_empty(shape, dtype=dtype)


@operator(_attended)
def attention_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
    base: torch.Tensor | None, queries: Sequence[int], keys: Sequence[int], causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention to a block.

    Args:
        mask: of this block, or None; broadcast to [*b, heads, queries, keys].
        base: `Block.base`.
        queries, keys: their positions.

    Returns:
        [*b, heads, queries, d] and the log-sum-exp of the scores, [*b, heads, queries]; 0 and -inf
        for queries that see no key. Both as partial results are accumulated.
    """
    bias, high = bias_of(mask, q.dtype), accumulated(q.dtype)
    parts: list[tuple[Span, torch.Tensor, torch.Tensor]] = []
    for p in _products(queries, keys, causal):
        own = q.narrow(-2, *p.rows), k.narrow(-2, *p.columns), v.narrow(-2, *p.columns)
        out, lse = attend(
            *own, _of_product(bias, p), Block(p.causal, scale, base=_of_product(base, p))
        )
        parts.append((p.rows, out.to(high), lse.to(high)))
    everything = (0, q.shape[-2])
    if len(parts) == 1 and parts[0][0] == everything:
        return parts[0][1].contiguous(), parts[0][2].contiguous()
    results, lses = _attended(q, k, v, mask, base, queries, keys, causal, scale)
    results.zero_()
    lses.fill_(float("-inf"))
    for rows, out, lse in parts:
        into, lse_into = results.narrow(-2, *rows), lses.narrow(-1, *rows)
        merged = merge((into, lse_into), (out, lse))
        into.copy_(merged[0])
        lse_into.copy_(merged[1])
    return results, lses


def _gradients(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    mask: torch.Tensor | None, base: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor,
    queries: Sequence[int], keys: Sequence[int], causal: bool, scale: float, trained: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    high = accumulated(q.dtype)
    of_mask = q.new_empty(0) if mask is None or not trained else torch.empty_like(mask)
    own = (x.new_empty(x.shape, dtype=high) for x in (q, k, v))
    return *own, of_mask  # type: ignore[return-value]


@operator(_gradients)
def attention_block_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    mask: torch.Tensor | None, base: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor,
    queries: Sequence[int], keys: Sequence[int], causal: bool, scale: float, trained: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """A block's part of the gradients of queries, keys, values and, if it is trained, the mask.

    Args:
        grad, out, lse: of attention to all blocks.
        trained: the mask takes a gradient; else its gradient is empty.
    """
    bias, high = bias_of(mask, q.dtype), accumulated(q.dtype)
    parts = []
    for p in _products(queries, keys, causal):
        rows = [x.narrow(-2, *p.rows) for x in (grad, q, out)]
        block = Block(p.causal, scale, trained, _of_product(base, p))
        columns = k.narrow(-2, *p.columns), v.narrow(-2, *p.columns)
        gradients = attend_backward(
            rows[0],
            rows[1],
            *columns,
            _of_product(bias, p),
            rows[2],
            lse.narrow(-1, *p.rows),
            block,
        )
        parts.append((p, gradients))
    of_mask = parts[0][1][3] if trained and parts else None
    if of_mask is None:
        of_mask = q.new_empty(0)
    whole = (0, q.shape[-2]), (0, k.shape[-2])
    if len(parts) == 1 and (parts[0][0].rows, parts[0][0].columns) == whole:
        dq, dk, dv, _ = parts[0][1]
        return *(g.to(high).contiguous() for g in (dq, dk, dv)), of_mask  # type: ignore[return-value]
    sums = [torch.zeros(x.shape, dtype=high, device=x.device) for x in (q, k, v)]
    for p, gradients in parts:
        for total, gradient, span in zip(
            sums, gradients[:3], (p.rows, p.columns, p.columns), strict=True
        ):
            assert gradient is not None
            total.narrow(-2, *span).add_(gradient)
    return *sums, of_mask  # type: ignore[return-value]


def _pairs(queries: Sequence[int], keys: Sequence[int], causal: bool) -> int:
    """Of a query and a key that it sees; causal products are square."""
    return sum(
        p.rows[1] * (p.rows[1] + 1) // 2 if p.causal else p.rows[1] * p.columns[1]
        for p in _products(queries, keys, causal)
    )


@register_flop_formula(torch.ops.autopar.attention_block)
def _flops(q, k, v, mask, base, queries, keys, causal, scale, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return 2 * math.prod(q[:-2]) * _pairs(queries, keys, causal) * (q[-1] + v[-1])


@register_flop_formula(torch.ops.autopar.attention_block_backward)
def _backward_flops(grad, q, k, v, mask, base, out, lse, queries, keys, causal, *_, **__) -> int:  # type: ignore[no-untyped-def]
    pairs = _pairs(queries, keys, causal)
    return 2 * math.prod(q[:-2]) * pairs * (3 * q[-1] + 2 * v[-1])
