"""Attention to a block of keys, with what it takes to merge blocks: the log-sum-exp of the scores.

The backward of a block takes the log-sum-exp of all blocks, and gives its part of the gradients
(Dao 2023, "FlashAttention-2", algorithm 2).

Flash kernels are private operators of torch; tested with 2.11 and 2.13, on CPUs. Where they do not
take a call (values of another width, a mask that is trained), the block's products are written out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_ATEN = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_MOST_WIDE = 256  # heads that flash kernels on GPUs take


@dataclass(frozen=True)
class Block:
    """How queries attend to a block of keys.

    Args:
        causal: query i sees the keys up to i, of as many (and of these, those of the mask).
        scale: of the scores.
        trained: the mask takes a gradient.
        base: [*b, heads, queries, 1], subtracted from the scores after the bias is added. Sums are
            rounded as on one device, and the log-sum-exp keeps its digits where all of a query's
            keys have a large negative number.
    """

    causal: bool
    scale: float
    trained: bool = False
    base: torch.Tensor | None = None


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """In which partial results are merged."""
    return torch.float32 if dtype in _HALF else dtype


def _kernel(q: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, block: Block) -> str:
    if q.ndim != 4 or q.shape[-1] != v.shape[-1] or block.trained or block.base is not None:
        return "written out"
    if q.device.type == "cpu":
        return "cpu"
    wide = q.shape[-1] % 8 or q.shape[-1] > _MOST_WIDE
    if q.device.type == "cuda" and q.dtype in _HALF and bias is None and not wide:
        return "cuda"
    return "written out"


def bias_of(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """What a mask adds to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))


def _alike(q: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Operands with as many heads as the queries, and with the same batch dims."""
    if q.ndim > 2 and others[0].shape[-3] not in (1, q.shape[-3]):
        repeats = q.shape[-3] // others[0].shape[-3]
        others = tuple(
            x.unsqueeze(-3).expand(*x.shape[:-2], repeats, *x.shape[-2:]).flatten(-4, -3)
            for x in others
        )
    lead = torch.broadcast_shapes(*(x.shape[:-2] for x in (q, *others)))
    return tuple(x.expand(*lead, *x.shape[-2:]) for x in (q, *others))


def _reduced(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The gradient of an operand that `_alike` repeated."""
    if like.ndim > 2 and like.shape[-3] not in (1, gradient.shape[-3]):
        gradient = gradient.unflatten(-3, (like.shape[-3], -1)).sum(-3)
    return gradient.sum_to_size(like.shape)


def _scores(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, block: Block
) -> torch.Tensor:
    scores = (q * block.scale) @ k.transpose(-2, -1)
    if block.causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    scores = scores if bias is None else scores + bias
    return scores if block.base is None else scores - block.base


def _sees_nothing(bias: torch.Tensor, causal: bool) -> torch.Tensor:
    """[*b, heads, queries]: whether a query's scores are all -inf."""
    seen = bias != float("-inf")
    if not causal:
        return ~seen.any(-1)
    if seen.shape[-2] == 1:  # as many queries as keys
        return (seen.cumsum(-1) == 0).squeeze(-2)
    return ~seen.tril().any(-1)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, block: Block
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries to a block.

    Args:
        q: [*b, heads, queries, d].
        k, v: [*b, key heads, keys, d].
        bias: added to the scores, broadcast to [*b, heads, queries, keys].

    Returns:
        [*b, heads, queries, d], and the log-sum-exp of the scores, [*b, heads, queries], -inf where
        a query sees no key of the block; the latter as in `accumulated`.
    """
    kernel = _kernel(q, v, bias, block)
    q, k, v = _alike(q, k, v)
    if kernel == "cuda":
        out, lse = _ATEN._scaled_dot_product_flash_attention(
            q, k, v, 0.0, block.causal, scale=block.scale
        )[:2]
        return out, lse
    if kernel == "cpu":
        bias = None if bias is None else bias.expand(*(1,) * (4 - bias.ndim), *bias.shape)
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, block.causal, attn_mask=bias, scale=block.scale
        )
        if bias is not None:  # the kernel gives 0
            lse = lse.masked_fill(_sees_nothing(bias, block.causal), float("-inf"))
        return out, lse
    high = accumulated(q.dtype)
    scores = _scores(q.to(high), k.to(high), bias, block)
    lse = scores.logsumexp(-1)
    out = _weights(scores, lse).to(v.dtype) @ v
    return out, lse


def _weights(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Probabilities; 0 for a query without keys."""
    some = lse.masked_fill(lse == float("-inf"), float("inf"))
    return (scores - some.unsqueeze(-1)).exp()


def attend_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    bias: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor, block: Block,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """A block's part of the gradients of queries, keys, values and, if it is trained, the bias.

    Args:
        grad, out: of all blocks; lse likewise.
    """
    kernel = _kernel(q, v, bias, block)
    alike = _alike(q, k, v)
    own = (q, k, v)
    if bias is not None:
        lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    if kernel == "cuda":
        queries, keys = q.shape[-2], k.shape[-2]
        drawn = torch.zeros(2, dtype=torch.int64, device=q.device)  # nothing is dropped
        grads = _ATEN._scaled_dot_product_flash_attention_backward(
            grad, *alike, out, lse, None, None, queries, keys, 0.0, block.causal,
            drawn, drawn, scale=block.scale,
        )  # fmt: skip
    elif kernel == "cpu":
        bias = None if bias is None else bias.expand(*(1,) * (4 - bias.ndim), *bias.shape)
        grads = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, *alike, out, lse, 0.0, block.causal, attn_mask=bias, scale=block.scale
        )
    else:
        high = accumulated(q.dtype)
        q, k, v, grad, out = (x.to(high) for x in (*alike, grad, out))
        weights = _weights(_scores(q, k, bias, block), lse)
        ahead = grad @ v.transpose(-2, -1) - (grad * out).sum(-1, keepdim=True)
        scores = weights * ahead
        grads = (
            scores @ k * block.scale,
            scores.transpose(-2, -1) @ q * block.scale,
            weights.transpose(-2, -1) @ grad,
        )
        if block.trained:
            assert bias is not None
            of_bias = scores.sum_to_size(bias.shape).to(bias.dtype)
            return *map(_reduced, grads, own), of_bias  # type: ignore[return-value]
    return *map(_reduced, grads, own), None  # type: ignore[return-value]


def merge(
    a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to two blocks together, from its results for each (Dao 2023, section 3.1)."""
    (out, lse), (other, other_lse) = a, b
    both = torch.logaddexp(lse, other_lse)
    # a query that sees no key of either has -inf - -inf
    share = (other_lse - both).exp().nan_to_num(nan=0.0)
    return torch.lerp(out, other, share.unsqueeze(-1)), both
