"""FlexAttention as products that can be differentiated and split.

Functions of positions (`mask_mod`, `score_mod`) run once, on indices that broadcast against each
other. That is what they mean if they are pointwise, which is checked. Without a `score_mod` the
call becomes `scaled_dot_product_attention` with a mask. With one the products are written out, in
float32 or wider as torch does.

A `BlockMask` also has blocks. Full blocks are seen whole, partial blocks where `mask_mod` is true,
and other blocks not at all. As a rule the blocks follow from `mask_mod`, and the mask is that
function alone, which the planner recognizes (causal, windows). Else the blocks are in the mask too.

The names that are replaced in `torch.nn.attention.flex_attention` are private; tested with torch
2.13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import flex_attention as flex
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from autopar.errors import CaptureError

_BITWISE = {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "invert": "bitwise_not"}
_CASTS = {"to", "type", "type_as", "bool", "int", "long", "float", "double", "half", "bfloat16"}
_ATTRIBUTES = {"get", "dim", "size"}  # of shapes, dtypes and devices
_UNTAGGED = set(  # pointwise, though torch has no tag for them
    "floor_divide floordiv rfloordiv rmod rdiv rtruediv lshift rlshift rshift rrshift "
    "zeros_like ones_like full_like detach".split()
)
_FACTORIES = set("tensor new_tensor zeros new_zeros ones new_ones full new_full".split())

# Of `BlockMask.as_tuple`. What torch 2.13 has and older ones lack is between these.
_LENGTHS, _BLOCKS, _SIZES, _FUNCTION = slice(0, 2), slice(2, 6), slice(-3, -1), -1


@contextmanager
def flex_attention_as_products() -> Iterator[None]:
    """Calls of `flex_attention` become products, compiled ones too."""
    masks = _Masks()
    make, make_empty = flex._create_sparse_block_from_block_mask, flex._create_empty_block_mask
    replaced = {
        "flex_attention_hop": partial(_attention, masks),
        "create_mask": _create_mask,
        "_create_sparse_block_from_block_mask": masks.noting(make),
        "_create_empty_block_mask": masks.noting(make_empty),
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


class _Masks:
    """The masks of one capture, and which blocks are known to follow from the function."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[bool, Sequence[Any]]] = {}

    def noting(self, create: Callable[..., Any]) -> Callable[..., Any]:
        """`create`, whose blocks follow from the function."""

        def run(*args: Any, **kwargs: Any) -> Any:
            created = create(*args, **kwargs)
            self._note(created.as_tuple(), True)
            return created

        return run

    def mask(self, block_mask: Sequence[Any], indices: Sequence[torch.Tensor]) -> Any:
        """What may be seen, broadcast over all indices; None for everything."""
        function, blocks = block_mask[_FUNCTION], block_mask[_BLOCKS]
        seen = None if function is flex.noop_mask else _pointwise(function, *indices)
        if seen is not None and not seen.ndim:
            seen = seen.view(1, 1, 1, 1)
        if self._follows(block_mask) and _for_all(blocks[0], seen):
            return seen
        return _allowed(blocks, block_mask[_SIZES], seen, *indices[2:])

    def _follows(self, block_mask: Sequence[Any]) -> bool:
        key = _key(block_mask)
        if key not in self._known:
            self._note(block_mask, _evaluates_to_blocks(block_mask))
        return self._known[key][0]

    def _note(self, block_mask: Sequence[Any], follows: bool) -> None:
        self._known[_key(block_mask)] = follows, block_mask  # held, so that no id is used again


def _key(block_mask: Sequence[Any]) -> Any:
    """Identity of what decides the mask; a tensor that was changed in place is another one."""
    blocks = [(id(t), None if t is None else t._version) for t in block_mask[_BLOCKS]]
    return *blocks, id(block_mask[_FUNCTION])


def _for_all(num_blocks: torch.Tensor, seen: torch.Tensor | None) -> bool:
    """Whether there are blocks for each sample and head that the function tells apart."""
    front = () if seen is None else seen.shape[:-2][-2:]
    return all(n in (1, blocks) for n, blocks in zip(front, num_blocks.shape, strict=False))


def _evaluates_to_blocks(block_mask: Sequence[Any]) -> bool:
    """Whether the function alone gives what is allowed; False if that is not known here.

    Tensors that the function refers to may be fake, as buffers are. One row of blocks at a time,
    because the whole mask may be large.
    """
    (queries, keys), size = block_mask[_LENGTHS], block_mask[_SIZES]
    blocks = block_mask[_BLOCKS]
    if any(isinstance(t, FakeTensor) for t in blocks):
        return False
    try:
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            b, h, q, k = _indices((*blocks[0].shape[:2], queries, keys), blocks[0].device)
            for row, positions in enumerate(q.split(size[0], dim=2)):
                seen = block_mask[_FUNCTION](b, h, positions, k)
                if isinstance(seen, FakeTensor):
                    return False
                here = [None if t is None else t[:, :, row : row + 1] for t in blocks]
                if not (_allowed(here, size, seen, positions - row * size[0], k) == seen).all():
                    return False
    except Exception:  # the user's function, outside of the capture
        return False
    return True


def _allowed(
    blocks: Sequence[Any], size: Sequence[int], seen: torch.Tensor | None, q: torch.Tensor,
    k: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Full blocks, and what is seen of partial ones."""
    rows, columns = (i.flatten() // n for i, n in zip((q, k), size, strict=True))
    count = -(-k.numel() // size[1])
    numbers, indices, full_numbers, full_indices = blocks
    allowed = _listed(numbers, indices, rows, columns, count)
    if seen is not None:
        allowed = allowed & seen
    if full_numbers is not None:
        allowed = allowed | _listed(full_numbers, full_indices, rows, columns, count)
    return allowed


def _listed(
    numbers: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor,
    count: int,
) -> torch.Tensor:  # fmt: skip
    """Whether the block of a position is listed: the first `numbers` of `indices` are, by row.

    Args:
        rows: of blocks, by query; `columns` by key.
        count: of columns of blocks.
    """
    entries = torch.arange(indices.shape[-1], device=indices.device)
    listed = torch.where(entries < numbers.unsqueeze(-1), indices, count).long()
    # a column more for entries that list nothing
    dense = torch.zeros((*indices.shape[:-1], count + 1), dtype=torch.bool, device=indices.device)
    dense = dense.scatter(-1, listed, True)
    return dense.index_select(-2, rows).index_select(-1, columns)


def _attention(
    masks: _Masks, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    score_mod: Callable[..., Any], block_mask: Sequence[Any], scale: float,
    kernel_options: Mapping[str, Any], *_: Any,
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
    mask = masks.mask(block_mask, indices)
    nothing = query.new_empty(0)
    repeats = query.shape[1] // key.shape[1]
    if _is_identity(score_mod, query) and not kernel_options.get("OUTPUT_LOGSUMEXP"):
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


def _is_identity(score_mod: Callable[..., Any], query: torch.Tensor) -> bool:
    """Whether scores are returned as they are, seen by one call."""
    if score_mod is flex._identity:
        return True
    probe = query.new_zeros((1, 1, 1, 1))
    result = _pointwise(score_mod, probe, *_indices(probe.shape, probe.device))
    return result is probe and probe._version == 0


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
            allowed = name in _CASTS | _ATTRIBUTES | _UNTAGGED or _is_pointwise(name)
            others = (*args[1:], *(kwargs or {}).values())
            if name in ("max", "min") and not any(isinstance(x, torch.Tensor) for x in others):
                allowed = False  # of all elements or along a dim, not of two tensors
        result = func(*args, **(kwargs or {})) if allowed or name in _FACTORIES else None
        if not allowed and not (isinstance(result, torch.Tensor) and result.ndim == 0):
            raise CaptureError(
                f"{self.function} of flex_attention uses {name!r}, which may not be pointwise; use "
                "pointwise operators, and index tensors by all of their dims at once: "
                "documents[b, q]"
            )
        return result


def _is_pointwise(name: str) -> bool:
    for candidate in (_BITWISE.get(name, name), _BITWISE.get(name[1:], name[1:])):
        packet = getattr(torch.ops.aten, candidate, None)
        if packet is not None:
            overloads = (getattr(packet, overload) for overload in packet.overloads())
            return any(torch.Tag.pointwise in overload.tags for overload in overloads)
    return False
