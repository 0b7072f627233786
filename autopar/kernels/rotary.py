"""Rotary position embedding by halves (arXiv:2104.09864, `rotate_half`) as one Triton kernel.

With x = (x₁, x₂), cos = (c₁, c₂) and sin = (s₁, s₂) along the last dim:

    y₁ = x₁ · c₁ - x₂ · s₁      dx₁ = dy₁ · c₁ + dy₂ · s₂
    y₂ = x₂ · c₂ + x₁ · s₂      dx₂ = dy₂ · c₂ - dy₁ · s₁

Shapes: x [a, b, c, d] with any strides (heads are often a transposed dim), cos and sin broadcast
to it. Results lie as x does. Arithmetic is in float32, or float64 for float64 inputs. The backward
keeps cos and sin alone. They have no gradient here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from autopar.kernels.launch import acc_dtype, operator, triton_dtype

MOST_DIMS = 4
MAX_WIDTH = 1024

_ELEMENTS = 1024  # of a half, in one program


@triton.jit
def rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, rows, size_b, size_c, half,
    x_a, x_b, x_c, x_d, out_a, out_b, out_c, out_d,  # strides
    cos_a, cos_b, cos_c,  # as sin's; along the last dim 1
    BACKWARD: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    a, b, c = row // (size_b * size_c), (row // size_c) % size_b, row % size_c
    cols = tl.arange(0, HALF)
    inside = (row < rows)[:, None] & (cols < half)[None, :]
    first = (a * x_a + b * x_b + c * x_c)[:, None] + cols[None, :] * x_d
    x1 = tl.load(x_ptr + first, mask=inside, other=0.0).to(ACC)
    x2 = tl.load(x_ptr + first + half * x_d, mask=inside, other=0.0).to(ACC)
    angle = (a * cos_a + b * cos_b + c * cos_c)[:, None] + cols[None, :]
    cos1 = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(ACC)
    cos2 = tl.load(cos_ptr + angle + half, mask=inside, other=0.0).to(ACC)
    sin1 = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(ACC)
    sin2 = tl.load(sin_ptr + angle + half, mask=inside, other=0.0).to(ACC)
    if BACKWARD:
        out1 = x1 * cos1 + x2 * sin2
        out2 = x2 * cos2 - x1 * sin1
    else:
        out1 = x1 * cos1 - x2 * sin1
        out2 = x2 * cos2 + x1 * sin2
    to = (a * out_a + b * out_b + c * out_c)[:, None] + cols[None, :] * out_d
    tl.store(out_ptr + to, out1, mask=inside)
    tl.store(out_ptr + to + half * out_d, out2, mask=inside)


def _by_aten(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    half = x.shape[-1] // 2
    if backward:
        through = x * sin
        turned = torch.cat((through[..., half:], -through[..., :half]), -1)
    else:
        turned = torch.cat((-x[..., half:], x[..., :half]), -1) * sin
    return torch.empty_like(x).copy_(x * cos + turned)


@operator("rotary", instead=_by_aten)
def rotary(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """x rotated, in its dtype and layout; backward, a gradient rotated back.

    Args:
        x: [..., width], of at most four dims and an even width.
        cos, sin: of the same dtype, broadcast to x.
    """
    if cos.shape != sin.shape or x.ndim > MOST_DIMS or x.shape[-1] % 2:
        raise ValueError(
            f"autopar::rotary: x {list(x.shape)} has at most {MOST_DIMS} dims and an even width, "
            f"and cos {list(cos.shape)} the shape of sin {list(sin.shape)}"
        )
    out = torch.empty_like(x)
    if not x.numel():
        return out
    lead = (None,) * (MOST_DIMS - x.ndim)
    wide = x[lead]
    angles = cos.contiguous().expand(x.shape)[lead]
    _, size_b, size_c, width = wide.shape
    half, rows = width // 2, wide.numel() // width
    block = triton.next_power_of_2(half)
    tall = max(1, _ELEMENTS // block)
    with torch.cuda.device_of(x):
        rotary_kernel[(triton.cdiv(rows, tall),)](
            x, cos.contiguous(), sin.contiguous(), out, rows, size_b, size_c, half,
            *wide.stride(), *out[lead].stride(), *angles.stride()[:3],
            BACKWARD=backward, ACC=triton_dtype(acc_dtype(x.dtype)), ROWS=tall, HALF=block,
        )  # fmt: skip
    return out


rotary.register_fake(lambda x, cos, sin, backward: torch.empty_like(x))


def _save_for_backward(ctx, inputs, output) -> None:
    _, cos, sin, ctx.backward = inputs
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise RuntimeError("autopar::rotary has no gradient of cos and sin")
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad):
    return rotary(grad, *ctx.saved_tensors, not ctx.backward), None, None, None


rotary.register_autograd(_backward, setup_context=_save_for_backward)
