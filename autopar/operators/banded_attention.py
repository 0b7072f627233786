"""Attention in which a query sees the keys of a band around its own position.

Sliding windows, alone or causal. Work, memory and traffic are linear in the length of the sequence:
tiles of queries attend to the keys that their bands reach, and nothing of the size of all scores
exists. What of a tile's scores lies outside of the band is masked by a bias that its tiles share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from autopar.operators.attention_blocks import (
    Block,
    accumulated,
    attend,
    attend_backward,
    bias_of,
)

Span = tuple[int, int]

# Queries of a tile, at least and at most. More of them see more keys outside of their bands, fewer
# are more kernels.
_FEWEST, _MOST = 128, 1024


@dataclass(frozen=True)
class Band:
    """Which keys a query sees: those with `low <= key - query <= high`.

    Args:
        low, high: None if there is no bound.
    """

    low: int | None
    high: int | None

    def keys(self, queries: Span, count: int) -> Span:
        """The keys, of so many, that some of the queries `(start, length)` see."""
        start, length = queries
        first = 0 if self.low is None else min(count, max(0, start + self.low))
        end = count if self.high is None else min(count, start + length + self.high)
        return first, max(0, end - first)

    def moved(self, by: int) -> Band:
        """The same for queries that are counted from another one."""
        low, high = (None if bound is None else bound + by for bound in (self.low, self.high))
        return Band(low, high)

    def mask(self, queries: int, keys: int, device: torch.device) -> torch.Tensor | None:
        """[queries, keys]: what is seen; None if all is."""
        low = None if self.low is None or self.low <= 1 - queries else self.low
        high = None if self.high is None or self.high >= keys - 1 else self.high
        if low is None and high is None:
            return None
        ahead = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None]
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if low is not None:
            seen &= ahead >= low
        return seen if high is None else seen & (ahead <= high)


def tiles(queries: int, keys: int, band: Band) -> list[tuple[Span, Span]]:
    """Spans of queries, and of the keys that each sees."""
    rows = _MOST
    if band.low is not None and band.high is not None:
        rows = min(_MOST, max(_FEWEST, band.high - band.low))
    starts = range(0, queries, rows)
    spans = [(start, min(rows, queries - start)) for start in starts]
    return [(span, band.keys(span, keys)) for span in spans]


class _Biases:
    """What is added to the scores of tiles: 0 or -inf.

    Args:
        key_mask: [*b, 1, keys], or None.
    """

    def __init__(self, band: Band, key_mask: torch.Tensor | None, like: torch.Tensor) -> None:
        self.band, self.key_mask, self.like = band, key_mask, like
        self.shared: dict[Any, torch.Tensor | None] = {}

    def of(self, rows: Span, columns: Span) -> torch.Tensor | None:
        key = rows[1], columns[1], rows[0] - columns[0]
        if key not in self.shared:
            band = self.band.moved(rows[0] - columns[0])
            seen = band.mask(rows[1], columns[1], self.like.device)
            self.shared = {key: bias_of(seen, self.like.dtype)}  # neighbors have the same
        bias = self.shared[key]
        if self.key_mask is None:
            return bias
        of_keys = bias_of(self.key_mask.narrow(-1, *columns), self.like.dtype)
        assert of_keys is not None
        return of_keys if bias is None else bias + of_keys


def _is_causal(q: torch.Tensor, k: torch.Tensor, band: Band) -> bool:
    """Whether one causal kernel does all."""
    return band == Band(None, 0) and q.shape[-2] == k.shape[-2]


@dataclass(frozen=True)
class _Part:
    """A kernel's work: queries, keys, what is added to their scores."""

    rows: Span
    columns: Span
    bias: torch.Tensor | None
    block: Block


def _parts(
    q: torch.Tensor, k: torch.Tensor, key_mask: torch.Tensor | None, band: Band, scale: float
) -> Iterator[_Part]:
    queries, keys = q.shape[-2], k.shape[-2]
    if _is_causal(q, k, band):
        bias = bias_of(key_mask, q.dtype)
        yield _Part((0, queries), (0, keys), bias, Block(True, scale))
        return
    biases = _Biases(band, key_mask, q)
    for rows, columns in tiles(queries, keys, band):
        if columns[1]:
            yield _Part(rows, columns, biases.of(rows, columns), Block(False, scale))


def _dense(x: torch.Tensor) -> torch.Tensor:
    """With the strides that kernels take."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _results(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for results, whose heads lie as those of torch's kernels; and for the log-sum-exp."""
    *lead, queries, _ = q.shape
    if len(lead) == 2:
        out = q.new_empty(lead[0], queries, lead[1], v.shape[-1]).transpose(1, 2)
    else:
        out = q.new_empty(*lead, queries, v.shape[-1])
    return out, q.new_empty(*lead, queries, dtype=accumulated(q.dtype))


@torch.library.custom_op("autopar::banded_attention_forward", mutates_args=())
def banded_attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None,
    low: int | None, high: int | None, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention of queries to the keys with `low <= key - query <= high` that the mask shows.

    Args:
        q: [*b, heads, queries, d].
        k, v: [*b, key heads, keys, d].
        key_mask: booleans, broadcast to [*b, heads, 1, keys].

    Returns:
        [*b, heads, queries, d], 0 where a query sees no key; and the log-sum-exp of the scores.
    """
    out, lse = _results(q, v)
    out.zero_()
    lse.fill_(float("-inf"))
    q, k, v = map(_dense, (q, k, v))
    for part in _parts(q, k, key_mask, Band(low, high), scale):
        own, log = attend(
            q.narrow(-2, *part.rows), k.narrow(-2, *part.columns), v.narrow(-2, *part.columns),
            part.bias, part.block,
        )  # fmt: skip
        out.narrow(-2, *part.rows).copy_(own)
        lse.narrow(-1, *part.rows).copy_(log)
    return out, lse


@torch.library.custom_op("autopar::banded_attention_backward", mutates_args=())
def banded_attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    key_mask: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor,
    low: int | None, high: int | None, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of queries, keys and values."""
    of_q = torch.zeros_like(q)
    of_k, of_v = (torch.zeros_like(x, dtype=accumulated(x.dtype)) for x in (k, v))
    dtypes = k.dtype, v.dtype
    grad, q, k, v = map(_dense, (grad, q, k, v))
    for part in _parts(q, k, key_mask, Band(low, high), scale):
        rows, columns = part.rows, part.columns
        dq, dk, dv, _ = attend_backward(
            grad.narrow(-2, *rows), q.narrow(-2, *rows), k.narrow(-2, *columns),
            v.narrow(-2, *columns), part.bias, out.narrow(-2, *rows), lse.narrow(-1, *rows),
            part.block,
        )  # fmt: skip
        of_q.narrow(-2, *rows).copy_(dq)
        of_k.narrow(-2, *columns).add_(dk)
        of_v.narrow(-2, *columns).add_(dv)
    return of_q, of_k.to(dtypes[0]), of_v.to(dtypes[1])


banded_attention_forward.register_fake(lambda q, k, v, *_: _results(q, v))
banded_attention_backward.register_fake(
    lambda grad, q, k, v, *_: tuple(torch.empty_like(x) for x in (q, k, v))
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, low, high, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.band = low, high, scale
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    grads = torch.ops.autopar.banded_attention_backward(grad, *ctx.saved_tensors, *ctx.band)
    return (*grads, None, None, None, None)


banded_attention_forward.register_autograd(_backward, setup_context=_keep)


def _flops(per_pair: int, q: Sequence[int], k: Sequence[int], band: Band) -> int:
    """Of all tiles, by torch's convention: what a causal kernel leaves out counts."""
    if band == Band(None, 0) and q[-2] == k[-2]:
        pairs = q[-2] * k[-2]
    else:
        pairs = sum(rows[1] * columns[1] for rows, columns in tiles(q[-2], k[-2], band))
    return 2 * math.prod(q[:-2]) * pairs * per_pair


@register_flop_formula(torch.ops.autopar.banded_attention_forward)
def _forward_flops(
    q: Any, k: Any, v: Any, mask: Any, low: Any, high: Any, *_: Any, **__: Any
) -> int:
    return _flops(q[-1] + v[-1], q, k, Band(low, high))


@register_flop_formula(torch.ops.autopar.banded_attention_backward)
def _backward_flops(
    grad: Any, q: Any, k: Any, v: Any, mask: Any, out: Any, lse: Any, low: Any, high: Any,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _flops(3 * q[-1] + 2 * v[-1], q, k, Band(low, high))


_LIBRARY = torch.library.Library("autopar", "FRAGMENT")
_LIBRARY.define(
    "banded_attention(Tensor query, Tensor key, Tensor value, int? before, int? after, "
    "Tensor? key_mask=None, *, float? scale=None, bool enable_gqa=False) -> Tensor"
)


def banded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    before: int | None,
    after: int | None,
    key_mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention of query i to the keys i - before, ..., i + after that the mask shows.

    Args:
        query, key, value, scale, enable_gqa: as of torch's `scaled_dot_product_attention`.
        before, after: None if there is no bound.
        key_mask: booleans, broadcast over the queries: [*b, 1, keys].
    """
    band = Band(None if before is None else -before, after)
    return in_band(query, key, value, key_mask, band, scale)


def in_band(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_mask: torch.Tensor | None,
    band: Band, scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """`banded_attention`, by any band."""
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    out, _ = torch.ops.autopar.banded_attention_forward(
        query, key, value, key_mask, band.low, band.high, factor
    )
    return out


_LIBRARY.impl("banded_attention", banded_attention, "CompositeImplicitAutograd")
BANDED = torch.ops.autopar.banded_attention.default
