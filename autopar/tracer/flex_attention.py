"""FlexAttention as products that can be differentiated and split.

Functions of positions (`mask_mod`, `score_mod`) run once, on indices that broadcast against each
other. That is what they mean if they are pointwise, which is checked. Without a `score_mod` the
call becomes `scaled_dot_product_attention` with a mask. With one the products are written out, in
float32 or wider as torch does.

The names that are replaced in `torch.nn.attention.flex_attention` are private; tested with torch
2.13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex
from torch.overrides import TorchFunctionMode

from autopar.errors import CaptureError

_BITWISE = {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "invert": "bitwise_not"}
_CASTS = {"to", "type", "bool", "int", "long", "float", "double", "half", "bfloat16"}
_ATTRIBUTES = {"get", "dim", "size"}  # of shapes, dtypes and devices


@contextmanager
def flex_attention_as_products() -> Iterator[None]:
    """Calls of `flex_attention` become products, compiled ones too."""
    replaced = {
        "flex_attention_hop": _attention,
        "create_mask": _create_mask,
        "_validate_device": _any_device,
        # so that the operator is called as it is, and not compiled
        "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG": True,
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch.object(flex, name, value))
        yield


def _any_device(*_: torch.Tensor) -> None:
    """Products have a derivative on every device."""


def _create_mask(
    mod_fn: Callable[..., Any], B: int | None, H: int | None, Q_LEN: int, KV_LEN: int,
    device: Any = None,
) -> torch.Tensor:  # fmt: skip
    """In place of torch's, whose vectorization cannot be captured."""
    sizes = B or 1, H or 1, Q_LEN, KV_LEN
    seen: torch.Tensor = _pointwise(mod_fn, *_indices(sizes, device))
    return seen.expand(sizes)


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score_mod: Callable[..., Any],
    block_mask: Sequence[Any], scale: float, kernel_options: Mapping[str, Any], *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """In place of torch's operator: the result, the log-sum-exp in base 2, and the largest scores.

    The last two are empty unless they are asked for.
    """
    if kernel_options.get("OUTPUT_MAX"):
        raise CaptureError(
            "flex_attention with AuxRequest(max_scores=True) is not supported; leave it out, or "
            "compute the scores in the model"
        )
    indices = _indices((*query.shape[:3], key.shape[2]), query.device)
    mask_mod = block_mask[-1]
    mask = None if mask_mod is flex.noop_mask else _pointwise(mask_mod, *indices)
    nothing = query.new_empty(0)
    repeats = query.shape[1] // key.shape[1]
    if score_mod is flex._identity and not kernel_options.get("OUTPUT_LOGSUMEXP"):
        out = F.scaled_dot_product_attention(
            query, key, value, mask, scale=scale, enable_gqa=repeats > 1
        )
        return out, nothing, nothing
    high = torch.float64 if query.dtype == torch.float64 else torch.float32
    key, value = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (key, value))
    scores = query.to(high) @ key.to(high).transpose(-2, -1) * scale
    scores = _pointwise(score_mod, scores, *indices).to(high)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0.0)).exp()
    out = (weights @ value.to(high)).to(query.dtype)
    return out, lse.squeeze(-1) / math.log(2.0), nothing


def _indices(sizes: Sequence[int], device: Any) -> list[torch.Tensor]:
    """Of samples, heads, queries and keys, each along a dim of its own."""
    return [
        torch.arange(n, device=device).view([-1 if i == dim else 1 for i in range(len(sizes))])
        for dim, n in enumerate(sizes)
    ]


def _pointwise(function: Callable[..., Any], *operands: torch.Tensor) -> Any:
    with _Pointwise(function):
        return function(*operands)


class _Pointwise(TorchFunctionMode):
    """Refuses what is not the same for one element as for many."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = getattr(function, "__name__", type(function).__name__)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func)).strip("_")
        if name == "getitem":
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            tensors = all(isinstance(i, int | torch.Tensor) for i in indices)
            allowed = tensors and len(indices) == args[0].ndim
        else:
            allowed = name in _CASTS | _ATTRIBUTES or _is_pointwise(name)
        if not allowed:
            raise CaptureError(
                f"{self.function} of flex_attention uses {name!r}, which may not be pointwise; use "
                "pointwise operators, and index tensors by all of their dims at once: "
                "documents[b, q]"
            )
        return func(*args, **(kwargs or {}))


def _is_pointwise(name: str) -> bool:
    for candidate in (_BITWISE.get(name, name), _BITWISE.get(name[1:], name[1:])):
        packet = getattr(torch.ops.aten, candidate, None)
        if packet is not None:
            overloads = (getattr(packet, overload) for overload in packet.overloads())
            return any(torch.Tag.pointwise in overload.tags for overload in overloads)
    return False
