"""`CausalBias` (torch.nn.attention.bias), a mask of a type of its own, as plain attention.

Upper-left masks, and lower-right ones of as many queries as keys, are `is_causal`. Others of these
are boolean masks of positions, which the planner recognizes. Torch would take kernels that
only compute a forward. The names are private; tested with torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def causal_biases_as_masks() -> Iterator[None]:
    """While on, a `CausalBias` can be made and used in a capture."""
    with (
        patch.object(CausalBias, "__new__", _new),
        patch.object(CausalBias, "_dispatch", staticmethod(_attention)),
    ):
        yield


def causal_biases(model: torch.nn.Module) -> Iterator[CausalBias]:
    """Those that modules hold. They do not change, so a copy of the model has the same."""
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, CausalBias))


def _new(cls: type, *_: Any, **__: Any) -> Any:
    """Without the capture's fake tensors: it has no elements."""
    with _disable_current_modes():
        return torch.Tensor.__new__(cls)


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any, *args: Any,
    **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    queries, keys = attn_mask.seq_len_q, attn_mask.seq_len_kv
    dropout = args[0] if args else kwargs.pop("dropout_p", 0.0)
    if attn_mask.variant == CausalVariant.UPPER_LEFT or queries == keys:
        kwargs["is_causal"], mask = True, None
    else:
        i = torch.arange(queries, device=query.device).unsqueeze(-1)
        mask = torch.arange(keys, device=query.device) <= i + (keys - queries)
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, **kwargs)
