"""Softmax of scores with a scale and up to two addends (a mask, a pair bias) as one Triton kernel
per direction.

With s = scale · x + mask + bias and y = softmax(s) along the last dim:

    ds = y · (dy - Σ y · dy)      dx = scale · ds      dmask, dbias = ds, summed where broadcast

Scores are read and probabilities written once; sums are rounded to the dtype of x as they are where
they are stored. Addends are read as they are broadcast: no copy of them has the size of the scores.
Arithmetic is in float32, or float64 for float64 scores.

Shapes: x [a, b, c, d] or fewer dims, addends broadcast to it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from autopar.kernels.launch import acc_dtype, operator, tile, triton_dtype

MOST_DIMS = 4


@triton.jit
def forward_kernel(
    x_ptr, mask_ptr, bias_ptr, out_ptr, size_b, size_c, width,
    mask_a, mask_b, mask_c, mask_d, bias_a, bias_b, bias_c, bias_d,  # strides
    SCALE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    a, b, c = row // (size_b * size_c), (row // size_c) % size_b, row % size_c
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    rounded = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * width + cols, mask=inside, other=float("-inf")).to(ACC)
    if SCALE != 1.0:
        x = (x * SCALE).to(rounded).to(ACC)
    at = mask_ptr + a * mask_a + b * mask_b + c * mask_c + cols * mask_d
    x = (x + tl.load(at, mask=inside, other=0.0).to(ACC)).to(rounded).to(ACC)
    if bias_ptr is not None:
        at = bias_ptr + a * bias_a + b * bias_b + c * bias_c + cols * bias_d
        x = (x + tl.load(at, mask=inside, other=0.0).to(ACC)).to(rounded).to(ACC)
    x = tl.where(inside, x, float("-inf"))
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + row * width + cols, e / tl.sum(e, axis=0), mask=inside)


@triton.jit
def backward_kernel(
    grad_ptr, out_ptr, dx_ptr,
    ds_ptr,  # None if not required
    width, SCALE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    grad = tl.load(grad_ptr + row * width + cols, mask=inside, other=0.0).to(ACC)
    y = tl.load(out_ptr + row * width + cols, mask=inside, other=0.0).to(ACC)
    ds = y * (grad - tl.sum(y * grad, axis=0))
    tl.store(dx_ptr + row * width + cols, ds * SCALE, mask=inside)
    if ds_ptr is not None:
        tl.store(ds_ptr + row * width + cols, ds, mask=inside)


def _forward_by_aten(x: Tensor, mask: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    sums = (x if scale == 1.0 else x * scale) + mask
    if bias is not None:
        sums = sums + bias
    return sums.to(acc_dtype(x.dtype)).softmax(-1).to(x.dtype).contiguous()


def _backward_by_aten(grad: Tensor, out: Tensor, scale: float, both: bool) -> tuple[Tensor, Tensor]:
    acc = acc_dtype(out.dtype)
    dy, y = grad.to(acc), out.to(acc)
    wide = y * (dy - (y * dy).sum(-1, True))
    dx, ds = _backward_outputs(out, both)
    dx.copy_(scale * wide)
    if both:
        ds.copy_(wide)
    return dx, ds


@operator("masked_softmax_fwd", instead=_forward_by_aten)
def masked_softmax_fwd(x: Tensor, mask: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`softmax(scale * x + mask + bias)` along the last dim, in the dtype of x; contiguous.

    Args:
        mask, bias: of the dtype of x, broadcast to it.
    """
    out = x.new_empty(x.shape)
    if not x.numel():
        return out
    block, warps = tile("masked_softmax", x.shape[-1])
    lead = (None,) * (MOST_DIMS - x.ndim)
    *_, size_b, size_c, width = x[lead].shape
    strides = [
        s for t in (mask, mask if bias is None else bias) for s in t.expand(x.shape)[lead].stride()
    ]
    with torch.cuda.device_of(x):
        forward_kernel[(x.numel() // width,)](
            x.contiguous(), mask, bias, out, size_b, size_c, width, *strides,
            SCALE=scale, ACC=triton_dtype(acc_dtype(x.dtype)), BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out


@operator("masked_softmax_bwd", instead=_backward_by_aten)
def masked_softmax_bwd(
    grad: Tensor, out: Tensor, scale: float, both: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and, if `both`, of the sums that the softmax is of; contiguous."""
    dx, ds = _backward_outputs(out, both)
    if not out.numel():
        return dx, ds
    block, warps = tile("masked_softmax", out.shape[-1])
    width = out.shape[-1]
    with torch.cuda.device_of(out):
        backward_kernel[(out.numel() // width,)](
            grad.contiguous(), out.contiguous(), dx, ds if both else None, width,
            SCALE=scale, ACC=triton_dtype(acc_dtype(out.dtype)), BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return dx, ds


def _backward_outputs(out: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    return out.new_empty(out.shape), out.new_empty(out.shape if both else 0)


masked_softmax_fwd.register_fake(lambda x, mask, bias, scale: x.new_empty(x.shape))
masked_softmax_bwd.register_fake(lambda grad, out, scale, both: _backward_outputs(out, both))


def _save_for_backward(ctx, inputs, output) -> None:
    _, mask, bias, ctx.scale = inputs
    ctx.shapes = [None if t is None else t.shape for t in (mask, bias)]
    ctx.save_for_backward(output)


def _backward(ctx, grad):
    (out,) = ctx.saved_tensors
    for_x, *for_addends = ctx.needs_input_grad[:3]
    scale = ctx.scale if for_x else 1.0
    both = any(for_addends) and scale != 1.0
    dx, ds = masked_softmax_bwd(grad, out, scale, both)
    sums = ds if both else dx
    addends = [
        sums.sum_to_size(shape) if needed else None
        for needed, shape in zip(for_addends, ctx.shapes, strict=True)
    ]
    return dx if for_x else None, *addends, None


masked_softmax_fwd.register_autograd(_backward, setup_context=_save_for_backward)
