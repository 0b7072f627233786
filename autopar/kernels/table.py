"""The kernels, one row each: what a row replaces, where it may, what it writes, and a sample.

A row says nothing of its cost. Both sides are run on fake tensors, forward and backward, and their
bytes and launches counted as those of every operator (`substitute.py`); a row adds what ATen moves
beyond what its operator's operands and results say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from operator import getitem
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.kernels import (  # noqa: F401  (some are imported to define their operators)
    cross_entropy,
    gated,
    launch,
    layer_norm,
    patterns,
    rms_norm,
    rotary,
    softmax,
)
from autopar.profiler.counting import Work
from autopar.tracer import token_loss  # noqa: F401  (defines an operator)

aten, ours = torch.ops.aten, torch.ops.autopar

# Calls an operator: on values, or by writing a node that does.
Call = Callable[..., Any]


@dataclass(frozen=True)
class Sample:
    """A case as authors write it, for tests and benchmarks.

    Args:
        run: of the operands, in plain torch; the results that are used.
        operands: of a number of rows and a width, in a dtype: shapes, as `(name, shape)`.
    """

    run: Callable[..., Tensor | tuple[Tensor, Tensor]]
    operands: Callable[[int, int, torch.dtype], list[Tensor]]


@dataclass(frozen=True)
class KernelRow:
    """One kernel.

    Args:
        name: for logs and documents.
        replaces: patterns, or operators, whose arguments are named as in their schema.
        applies: whether the kernel does the same, by the values that are bound (fake tensors and
            constants) and `out`, the result.
        write: the result by the kernel, through a `Call`, of what is bound.
        sample: what it replaces, as authors write it.
        widened: an operand that the kernel widens to its dtype of arithmetic itself.
        added: an operand that is the sum of it and `residual`, which the kernel adds. It writes the
            sum, too, for all who read it.
        hidden: the work of ATen that its operands and results do not show.
    """

    name: str
    replaces: Callable[[], Iterable[Any]]
    applies: Callable[..., bool]
    write: Callable[..., Any]
    sample: Sample
    widened: str = ""
    added: str = ""
    hidden: Callable[..., Work] = field(default=lambda **_: Work())

    @cached_property
    def patterns(self) -> tuple[Any, ...]:
        """What it replaces."""
        return tuple(self.replaces())


def _is_last(dim: int, of: Tensor) -> bool:
    return dim % of.ndim == of.ndim - 1


# ---- RMSNorm ------------------------------------------------------------------------------------


def _rms_norm_applies(
    *, out: Tensor, x: Tensor, weight: Tensor, eps: float, dims: list[int],
    wide: torch.dtype | None = None, first: torch.dtype | None = None,
    last: torch.dtype | None = None, residual: Tensor | None = None,
) -> bool:  # fmt: skip
    acc = launch.acc_dtype(x.dtype)
    return (
        len(dims) == 1
        and _is_last(dims[0], x)
        and isinstance(eps, float)
        and isinstance(weight, Tensor)
        and weight.shape == x.shape[-1:]
        and weight.dtype == (x.dtype if last is None else acc)
        and (wide or x.dtype) == acc
        and out.dtype == x.dtype
        and (first or last or x.dtype) == x.dtype
        and 0 < x.shape[-1] <= launch.MAX_WIDTH
    )


def _write_rms_norm(
    call: Call, *, x: Any, weight: Any, eps: float, first: torch.dtype | None = None, **_: Any
) -> Any:
    results = call(ours.rms_norm_fwd.default, x, weight, eps, first is not None)
    return call(getitem, results, 0)


def _write_added_rms_norm(
    call: Call, *, x: Any, residual: Any, weight: Any, eps: float,
    first: torch.dtype | None = None, **_: Any,
) -> Any:  # fmt: skip
    arguments = (x, residual, weight, eps, first is not None)
    results = call(ours.add_rms_norm_fwd.default, *arguments)
    return call(getitem, results, 0), call(getitem, results, 1)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _residual_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rms_norm(total, weight), total


def _rows_and_weights(
    count: int, inputs: int = 1
) -> Callable[[int, int, torch.dtype], list[Tensor]]:
    def operands(rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
        shapes = [*[(rows, width)] * inputs, *[(width,)] * count]
        return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]

    return operands


# ---- LayerNorm ----------------------------------------------------------------------------------


def _layer_norm_applies(
    *, out: Tensor, input: Tensor, normalized_shape: list[int], weight: Tensor | None = None,
    bias: Tensor | None = None, **_: Any,
) -> bool:  # fmt: skip
    return (
        len(normalized_shape) == 1
        and 0 < input.shape[-1] <= launch.MAX_WIDTH
        and all(p is None or p.dtype == input.dtype for p in (weight, bias))
    )


def _write_layer_norm(
    call: Call, *, input: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, **_: Any
) -> Any:
    return call(getitem, call(ours.layer_norm_fwd.default, input, weight, bias, eps), 0)


def _write_added_layer_norm(
    call: Call, *, input: Any, residual: Any, weight: Any = None, bias: Any = None,
    eps: float = 1e-5, **_: Any,
) -> Any:  # fmt: skip
    results = call(ours.add_layer_norm_fwd.default, input, residual, weight, bias, eps)
    return call(getitem, results, 0), call(getitem, results, 1)


def _layer_norm_hidden(*, input: Tensor, weight: Tensor | None = None, **_: Any) -> Work:
    """ATen's backward on GPUs has a second kernel for the weight and the bias, which reads the
    gradient and x again (layer_norm_kernel.cu)."""
    if weight is None or not (weight.requires_grad and input.requires_grad):
        return Work()
    return Work(read_bytes=2 * input.numel() * input.element_size(), kernels=1)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _residual_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _layer_norm(total, weight, bias), total


# ---- gated linear units -------------------------------------------------------------------------


def _gated_applies(*, out: Tensor, gate: Tensor, up: Any, **_: Any) -> bool:
    return (
        isinstance(up, Tensor)
        and gate.is_floating_point()
        and (gate.shape, gate.dtype) == (up.shape, up.dtype)
        and gate.numel() > 0
    )


def _write_swiglu(call: Call, *, gate: Any, up: Any) -> Any:
    return call(ours.glu_fwd.default, gate, up, "silu")


def _write_geglu(call: Call, *, gate: Any, up: Any, approximate: str = "none") -> Any:
    return call(ours.glu_fwd.default, gate, up, "gelu_tanh" if approximate == "tanh" else "gelu")


def _halves(rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(rows, width, dtype=dtype).requires_grad_() for _ in range(2)]


# ---- rotary -------------------------------------------------------------------------------------


def _rotary_applies(
    *, out: Tensor, x: Tensor, cos: Any, sin: Any, dim: int, cat_dim: int, half: int, end: int
) -> bool:
    width = x.shape[-1]
    return (
        isinstance(cos, Tensor)
        and isinstance(sin, Tensor)
        and not (cos.requires_grad or sin.requires_grad)
        and x.dtype == cos.dtype == sin.dtype
        and x.is_floating_point()
        and cos.shape == sin.shape
        and out.shape == x.shape
        and cos.shape[-1] == width
        and x.ndim <= rotary.MOST_DIMS
        and _is_last(dim, x)
        and _is_last(cat_dim, x)
        and 2 * half == width <= rotary.MAX_WIDTH
        and end >= width
    )


def _write_rotary(call: Call, *, x: Any, cos: Any, sin: Any, **_: Any) -> Any:
    return call(ours.rotary.default, x, cos, sin, False)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x, half = x.transpose(1, 2), x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def _heads(rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Two sequences of heads of at most 128."""
    head = min(128, width // 2 * 2)
    x = torch.randn(2, max(1, rows // 2), max(1, width // head), head, dtype=dtype)
    angles = torch.randn(1, 1, x.shape[1], head, dtype=dtype)
    return [x.requires_grad_(), angles.cos(), angles.sin()]


# ---- cross-entropy ------------------------------------------------------------------------------

_NONE, _MEAN = 0, 1


def _cross_entropy_applies(
    *, out: Tensor, self: Tensor, target: Tensor, weight: Tensor | None = None,
    reduction: int = _MEAN, ignore_index: int = -100, label_smoothing: float = 0.0,
) -> bool:  # fmt: skip
    return (
        weight is None
        and label_smoothing == 0.0
        and target.dtype == torch.int64
        and self.shape[:-1] == target.shape
        and target.numel() > 0
        and self.is_floating_point()
        # ATen rounds the losses of a short dtype, which is then no sum in float32
        and out.dtype == launch.acc_dtype(self.dtype)
    )


def _write_cross_entropy(
    call: Call, *, self: Any, target: Any, reduction: int = _MEAN, ignore_index: int = -100,
    **_: Any,
) -> Any:  # fmt: skip
    count = None
    if reduction == _MEAN:  # first, so that the flow to the loss is not interrupted
        count = call(aten.sum.default, call(aten.ne.Scalar, target, ignore_index))
    rows = call(getitem, call(ours.cross_entropy_fwd.default, self, target, ignore_index), 0)
    if reduction == _NONE:
        return rows
    total = call(aten.sum.default, rows)
    return total if count is None else call(aten.div.Tensor, total, count)


def _next_token(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)


def _logits(rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    target = torch.randint(0, width, (rows,))
    target[::5] = -100
    return [torch.randn(rows, width, dtype=dtype).requires_grad_(), target]


# ---- softmax ------------------------------------------------------------------------------------


def _softmax_applies(
    *, out: Tensor, x: Tensor, mask: Any, bias: Any = None, scale: Any = 1.0, dim: int,
    wide: torch.dtype | None = None, rounded: torch.dtype | None = None,
) -> bool:  # fmt: skip
    addends = [mask] if bias is None else [mask, bias]
    return (
        all(isinstance(t, Tensor) and t.dtype == x.dtype for t in addends)
        and isinstance(scale, float | int)
        and out.shape == x.shape
        and out.dtype == x.dtype
        and _is_last(dim, x)
        and x.ndim <= softmax.MOST_DIMS
        and (wide is None or wide == launch.acc_dtype(x.dtype))
        and 0 < x.shape[-1] <= launch.MAX_WIDTH
    )


def _write_softmax(
    call: Call, *, x: Any, mask: Any, bias: Any = None, scale: Any = 1.0, **_: Any
) -> Any:
    return call(ours.masked_softmax_fwd.default, x, mask, bias, float(scale))


def _pair_attention(scores: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return F.softmax(scores * 0.125 + mask + bias, dim=-1, dtype=wide).to(scores.dtype)


def _scores(rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Of four heads; the mask is of keys, the bias of pairs."""
    queries = max(1, rows // 8)
    scores = torch.randn(2, 4, queries, width, dtype=dtype).requires_grad_()
    mask = torch.zeros(2, 1, 1, width, dtype=dtype)
    mask[1, ..., width // 2 :] = torch.finfo(dtype).min
    mask[1, ..., 0] = 0
    return [scores, mask, torch.randn(1, 4, queries, width, dtype=dtype).requires_grad_()]


ROWS = (
    KernelRow(
        "SwiGLU", patterns.swiglu, _gated_applies, _write_swiglu,
        Sample(lambda gate, up: F.silu(gate) * up, _halves),
    ),
    KernelRow(
        "GeGLU", patterns.geglu, _gated_applies, _write_geglu,
        Sample(lambda gate, up: F.gelu(gate, approximate="tanh") * up, _halves),
    ),
    KernelRow(
        "residual and RMSNorm", patterns.rms_norm, _rms_norm_applies, _write_added_rms_norm,
        Sample(_residual_rms_norm, _rows_and_weights(1, 2)), added="x",
    ),
    KernelRow(
        "RMSNorm", patterns.rms_norm, _rms_norm_applies, _write_rms_norm,
        Sample(_rms_norm, _rows_and_weights(1)),
    ),
    KernelRow(
        "residual and LayerNorm", lambda: [aten.layer_norm.default], _layer_norm_applies,
        _write_added_layer_norm, Sample(_residual_layer_norm, _rows_and_weights(2, 2)),
        hidden=_layer_norm_hidden, added="input",
    ),
    KernelRow(
        "LayerNorm", lambda: [aten.layer_norm.default], _layer_norm_applies, _write_layer_norm,
        Sample(_layer_norm, _rows_and_weights(2)), hidden=_layer_norm_hidden,
    ),
    KernelRow(
        "rotary embedding", patterns.rotary, _rotary_applies, _write_rotary,
        Sample(_rotate, _heads),
    ),
    KernelRow(
        "cross-entropy",
        lambda: [aten.cross_entropy_loss.default, ours.token_cross_entropy.default],
        _cross_entropy_applies, _write_cross_entropy, Sample(_next_token, _logits), widened="self",
    ),
    KernelRow(
        "softmax with mask and bias", patterns.masked_softmax, _softmax_applies, _write_softmax,
        Sample(_pair_attention, _scores),
    ),
)  # fmt: skip
