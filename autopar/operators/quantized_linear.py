"""Products with weights of 8 and 4 bits.

`int8_linear`, `float8_linear` and `int4_linear` multiply with weights that have scales (weight-only
quantization); `int8_mm` multiplies 8-bit integers exactly. None holds the whole weight in another
dtype.

Scales have the dtype of the input, but float32 where that is float16: they may be below its range,
and sums of products that are not scaled yet above it. Weights are scaled before the product then.

Private to torch here: `_weight_int8pack_mm` and `_int_mm`; tested with 2.13 on CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

# Weights that share a scale, of 4 bits each.
GROUP = 32
_HALF = GROUP // 2  # bytes of a group
_MIDDLE = 8  # of 16 levels, which stands for 0

_LIBRARY = torch.library.Library("autopar", "FRAGMENT")
_LIBRARY.define("int8_linear(Tensor input, Tensor weight, Tensor scale) -> Tensor")
_LIBRARY.define("float8_linear(Tensor input, Tensor weight, Tensor scale) -> Tensor")
_LIBRARY.define("int4_linear(Tensor input, Tensor weight, Tensor scale) -> Tensor")
_LIBRARY.define("int8_mm(Tensor input, Tensor weight) -> Tensor")

# Rows of the input up to which the packed kernel of CPUs is faster than a product in bfloat16.
_PACKED_ROWS = 4
_PACKED_MULTIPLE = 32  # of columns; the kernel reads past the end of others
# Of a weight, that are in the dtype of the input at a time: they stay in the cache.
_CONVERTED_BYTES = 2**19
# What cuBLAS wants of products of 8-bit integers.
_CUDA_ROWS, _CUDA_MULTIPLE = 32, 8


def int4_packed(levels: torch.Tensor) -> torch.Tensor:
    """Two weights to a byte: the first half of a group in the lower bits.

    Args:
        levels: [n, groups, GROUP], uint8 below 16.

    Returns:
        [n, groups, GROUP / 2], uint8.
    """
    return levels[..., :_HALF] | (levels[..., _HALF:] << 4)


def _int4_unpacked(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[n, groups, GROUP / 2], uint8, as [n, groups, GROUP], -8 to 7."""
    return torch.cat([weight & 15, weight >> 4], -1).to(dtype).sub_(_MIDDLE)


def _by_blocks(
    x: torch.Tensor, weight: torch.Tensor, values: Callable[[int, int], torch.Tensor]
) -> torch.Tensor:
    """`linear(x, values)`, with as many rows of the weight at a time as stay in the cache.

    Args:
        x: [*b, k]
        weight: [n, ...]
        values: of rows from one up to another, [rows, k], of the dtype of x.

    Returns:
        [*b, n]
    """
    n, k = len(weight), x.shape[-1]
    step = max(1, _CONVERTED_BYTES // max(1, k * x.element_size()))
    if step >= n:
        return torch.nn.functional.linear(x, values(0, n))
    out, rows = x.new_empty(*x.shape[:-1], n), math.prod(x.shape[:-1])
    flat, result = x.reshape(rows, k), out.view(rows, n)
    for start in range(0, n, step):
        end = min(n, start + step)
        torch.mm(flat, values(start, end).t(), out=result[:, start:end])
    return out


def _scaled(numbers: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return numbers.to(scale.dtype).mul_(scale).to(dtype)


def _int8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`linear(x, weight * scale[:, None])`.

    Args:
        x: [*b, k], float32, bfloat16, float16 or float64.
        weight: [n, k], int8.
        scale: [n].

    Returns:
        [*b, n], of the dtype of x.
    """
    if scale.dtype != x.dtype:
        return _by_blocks(x, weight, lambda a, b: _scaled(weight[a:b], scale[a:b, None], x.dtype))
    rows = math.prod(x.shape[:-1])
    packed = x.device.type == "cpu" and x.dtype == torch.bfloat16 and rows <= _PACKED_ROWS
    if packed and x.shape[-1] % _PACKED_MULTIPLE == 0:
        ones = torch.ones_like(scale)  # rounded once, after the sum
        flat = x.reshape(rows, x.shape[-1]).contiguous()
        out = torch.ops.aten._weight_int8pack_mm(flat, weight.contiguous(), ones)
        return out.mul_(scale).view(*x.shape[:-1], len(weight))
    return _by_blocks(x, weight, lambda a, b: weight[a:b].to(x.dtype)).mul_(scale)


def _float8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`linear(x, weight * scale[:, None])`.

    Args:
        x: [*b, k], float32, bfloat16, float16 or float64.
        weight: [n, k], the bytes of float8_e4m3fn as uint8, which every collective takes.
        scale: [n].

    Returns:
        [*b, n], of the dtype of x.
    """
    numbers = weight.view(torch.float8_e4m3fn)
    if scale.dtype != x.dtype:
        return _by_blocks(x, weight, lambda a, b: _scaled(numbers[a:b], scale[a:b, None], x.dtype))
    return _by_blocks(x, weight, lambda a, b: numbers[a:b].to(x.dtype)).mul_(scale)


def _int4_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`linear(x, (levels - 8) * scale)`, with the levels of `int4_packed`.

    Args:
        x: [*b, groups, GROUP], float32, bfloat16, float16 or float64.
        weight: [n, groups, GROUP / 2], uint8.
        scale: [n, groups].

    Returns:
        [*b, n], of the dtype of x.
    """

    def values(start: int, end: int) -> torch.Tensor:
        rows = _int4_unpacked(weight[start:end], scale.dtype)
        return rows.mul_(scale[start:end, :, None]).flatten(1).to(x.dtype)

    return _by_blocks(x.flatten(-2), weight, values)


def _int8_mm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T`, exact.

    Args:
        x: [*b, k], int8.
        weight: [n, k], int8.

    Returns:
        [*b, n], int32.
    """
    flat, rows = x.reshape(-1, x.shape[-1]), math.prod(x.shape[:-1])
    if x.device.type == "cuda":
        if len(weight) % _CUDA_MULTIPLE or x.shape[-1] % _CUDA_MULTIPLE:
            # sums of products below 2**53 are exact
            exact = flat.double() @ weight.double().t()
            return exact.to(torch.int32).view(*x.shape[:-1], len(weight))
        if rows < _CUDA_ROWS:
            flat = torch.nn.functional.pad(flat, (0, 0, 0, _CUDA_ROWS - rows))
    return torch._int_mm(flat, weight.t())[:rows].reshape(*x.shape[:-1], len(weight))


def _fake_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def _fake_grouped(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-2], len(weight))


def _fake_mm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], len(weight), dtype=torch.int32)


def _int8_backward(ctx: Any, grad: torch.Tensor) -> Any:
    weight, scale = ctx.saved_tensors
    wide = grad.to(scale.dtype)
    return torch.matmul(wide * scale, weight.to(wide.dtype)).to(grad.dtype), None, None


def _float8_backward(ctx: Any, grad: torch.Tensor) -> Any:
    weight, scale = ctx.saved_tensors
    numbers, wide = weight.view(torch.float8_e4m3fn), grad.to(scale.dtype)
    return torch.matmul(wide * scale, numbers.to(wide.dtype)).to(grad.dtype), None, None


def _int4_backward(ctx: Any, grad: torch.Tensor) -> Any:
    weight, scale = ctx.saved_tensors
    values = _int4_unpacked(weight, scale.dtype) * scale[..., None]
    gradient = torch.matmul(grad.to(scale.dtype), values.flatten(1)).to(grad.dtype)
    return gradient.unflatten(-1, (-1, GROUP)), None, None


def _keep(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


for _name, _kernel, _fake, _derivative in (
    ("int8_linear", _int8_linear, _fake_linear, _int8_backward),
    ("float8_linear", _float8_linear, _fake_linear, _float8_backward),
    ("int4_linear", _int4_linear, _fake_grouped, _int4_backward),
    ("int8_mm", _int8_mm, _fake_mm, None),
):
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _kernel, _key)
    torch.library.register_fake(f"autopar::{_name}", _fake, lib=_LIBRARY)
    if _derivative is not None:
        torch.library.register_autograd(
            f"autopar::{_name}", _derivative, setup_context=_keep, lib=_LIBRARY
        )

int8_linear = torch.ops.autopar.int8_linear.default
float8_linear = torch.ops.autopar.float8_linear.default
int4_linear = torch.ops.autopar.int4_linear.default
int8_mm = torch.ops.autopar.int8_mm.default


@register_flop_formula(
    [
        torch.ops.autopar.int8_linear,
        torch.ops.autopar.float8_linear,
        torch.ops.autopar.int4_linear,
        torch.ops.autopar.int8_mm,
    ]
)
def _flops(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    return int(2 * math.prod(x_shape) * weight_shape[0])
