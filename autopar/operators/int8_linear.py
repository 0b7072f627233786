"""Products with weights of 8 bits.

`int8_linear` multiplies with weights that have one scale per row (weight-only quantization);
`int8_mm` multiplies 8-bit integers exactly. Neither holds the whole weight in another dtype.

Private to torch here: `_weight_int8pack_mm` and `_int_mm`; tested with 2.13 on CPUs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_LIBRARY = torch.library.Library("autopar", "FRAGMENT")
_LIBRARY.define("int8_linear(Tensor input, Tensor weight, Tensor scale) -> Tensor")
_LIBRARY.define("int8_mm(Tensor input, Tensor weight) -> Tensor")

# Rows of the input up to which the packed kernel of CPUs is faster than a product in bfloat16.
_PACKED_ROWS = 4
_PACKED_MULTIPLE = 32  # of columns; the kernel reads past the end of others
# Of a weight, that are in the dtype of the input at a time: they stay in the cache.
_CONVERTED_BYTES = 2**19
# What cuBLAS wants of products of 8-bit integers.
_CUDA_ROWS, _CUDA_MULTIPLE = 32, 8


def _int8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`linear(x, weight * scale[:, None])`, without a weight of that dtype.

    Args:
        x: [*b, k], float32, bfloat16, float16 or float64.
        weight: [n, k], int8.
        scale: [n], of the dtype of x.

    Returns:
        [*b, n], of the dtype of x.
    """
    rows = math.prod(x.shape[:-1])
    packed = x.device.type == "cpu" and x.dtype == torch.bfloat16 and rows <= _PACKED_ROWS
    if packed and x.shape[-1] % _PACKED_MULTIPLE == 0:
        ones = torch.ones_like(scale)  # rounded once, after the sum
        flat = x.reshape(rows, x.shape[-1]).contiguous()
        out = torch.ops.aten._weight_int8pack_mm(flat, weight.contiguous(), ones)
        return out.mul_(scale).view(*x.shape[:-1], len(weight))
    step = max(1, _CONVERTED_BYTES // max(1, weight.shape[1] * x.element_size()))
    if step >= len(weight):
        return torch.nn.functional.linear(x, weight.to(x.dtype)) * scale
    out = x.new_empty(*x.shape[:-1], len(weight))
    flat, result = x.reshape(rows, x.shape[-1]), out.view(rows, len(weight))
    for start in range(0, len(weight), step):
        part = weight[start : start + step].to(x.dtype)
        torch.mm(flat, part.t(), out=result[:, start : start + step])
    return out.mul_(scale)


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


def _fake_mm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], len(weight), dtype=torch.int32)


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    weight, scale = ctx.saved_tensors
    return torch.matmul(grad * scale, weight.to(grad.dtype)), None, None


def _keep(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


for key in ("CPU", "CUDA"):
    _LIBRARY.impl("int8_linear", _int8_linear, key)
    _LIBRARY.impl("int8_mm", _int8_mm, key)
torch.library.register_fake("autopar::int8_linear", _fake_linear, lib=_LIBRARY)
torch.library.register_fake("autopar::int8_mm", _fake_mm, lib=_LIBRARY)
torch.library.register_autograd(
    "autopar::int8_linear", _backward, setup_context=_keep, lib=_LIBRARY
)

int8_linear = torch.ops.autopar.int8_linear.default
int8_mm = torch.ops.autopar.int8_mm.default


@register_flop_formula([torch.ops.autopar.int8_linear, torch.ops.autopar.int8_mm])
def _flops(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    return int(2 * math.prod(x_shape) * weight_shape[0])
