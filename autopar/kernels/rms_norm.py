"""RMSNorm over the last dim (arXiv:1910.07467) as one Triton kernel per direction.

With r = 1 / sqrt(mean(x²) + eps), x̂ = x · r, y = x̂ · w, and g = dy · w, means taken over a row:

    dx = r · (g - x̂ · mean(g · x̂))      dw = Σ_rows dy · x̂

With a residual, x is the sum of both, rounded as an addition rounds it; the sum is a result, too,
and dx gets its gradient. Programs loop over rows, and sum their shares of dw in registers, as in
`layer_norm`. Arithmetic is in float32, or float64 for float64 inputs. Llama rounds x̂ to the dtype
of x before it multiplies by w, Gemma does not and has w in float32: both are options.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from autopar.kernels.launch import (
    acc_dtype,
    contiguous,
    operator,
    programs_for,
    residual_gradients,
    rows_and_width,
    tile,
    triton_dtype,
)


@triton.jit
def forward_kernel(
    x_ptr, weight_ptr, out_ptr, rstd_ptr,
    residual_ptr, sum_ptr,  # or None
    rows, width,
    EPS: tl.constexpr,  # as an argument it would be rounded to float32
    ROUND: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    row_stride = tl.cast(width, tl.int64)  # row * width may pass 2**31
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(ACC)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        offsets = row * row_stride + cols
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(ACC)
        if residual_ptr is not None:
            x += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(ACC)
            x = x.to(x_ptr.dtype.element_ty).to(ACC)
            tl.store(sum_ptr + offsets, x, mask=inside)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + EPS)
        x_hat = x * rstd
        if ROUND:
            x_hat = x_hat.to(x_ptr.dtype.element_ty).to(ACC)
        tl.store(out_ptr + offsets, x_hat * weight, mask=inside)
        tl.store(rstd_ptr + row, rstd)


@triton.jit
def backward_kernel(
    grad_ptr, x_ptr, rstd_ptr, weight_ptr, dx_ptr,
    partial_dw_ptr,  # [programs, width]; None if not required
    grad_sum_ptr,  # the gradient of the sum, or None
    rows, width,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    row_stride = tl.cast(width, tl.int64)
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(ACC)
    if partial_dw_ptr is not None:
        dw = tl.zeros([BLOCK], dtype=ACC)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        offsets = row * row_stride + cols
        grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(ACC)
        x_hat = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(ACC)
        rstd = tl.load(rstd_ptr + row)
        x_hat = x_hat * rstd
        if partial_dw_ptr is not None:
            dw += grad * x_hat
        if dx_ptr is not None:
            grad = grad * weight
            mean = tl.sum(grad * x_hat, axis=0) / width
            dx = rstd * (grad - x_hat * mean)
            if grad_sum_ptr is not None:
                dx += tl.load(grad_sum_ptr + offsets, mask=inside, other=0.0).to(ACC)
            tl.store(dx_ptr + offsets, dx, mask=inside)
    if partial_dw_ptr is not None:
        tl.store(partial_dw_ptr + tl.program_id(0) * row_stride + cols, dw, mask=inside)


def _forward_by_aten(
    x: Tensor, weight: Tensor, eps: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    acc = acc_dtype(x.dtype)
    wide = x.to(acc)
    rstd = torch.rsqrt(wide.square().mean(-1, True) + eps)
    x_hat = wide * rstd
    if round_first:
        x_hat = x_hat.to(x.dtype)
    return (x_hat * weight.to(acc)).to(x.dtype).contiguous(), rstd


def _add_forward_by_aten(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, round_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.contiguous() + residual.contiguous()
    out, rstd = _forward_by_aten(total, weight, eps, round_first)
    return out, total, rstd


def _backward_by_aten(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, output_mask: list[bool],
    grad_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    acc = acc_dtype(x.dtype)
    x_hat, dy = x.to(acc) * rstd, grad.to(acc)
    g = dy * weight.to(acc)
    wide = rstd * (g - x_hat * (g * x_hat).mean(-1, True))
    wide = wide if grad_sum is None else wide + grad_sum.to(acc)
    dx, dw = _backward_outputs(x, weight, output_mask)
    for result, total in ((dx, wide), (dw, (dy * x_hat).sum(tuple(range(x.ndim - 1))))):
        if result.numel():
            result.copy_(total)
    return dx, dw


@operator("rms_norm_fwd", instead=_forward_by_aten)
def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float, round_first: bool) -> tuple[Tensor, Tensor]:
    """The normalized rows of x [*, width] in its dtype, and 1 / sqrt(mean of squares + eps) [*, 1].

    Args:
        weight: [width], in the dtype of x or of arithmetic.
        round_first: normalized rows are rounded to the dtype of x before they meet the weight.
    """
    out, rstd = _forward_outputs(x)
    _launch_forward(x, weight, out, rstd, None, None, eps, round_first)
    return out, rstd


@operator("add_rms_norm_fwd", instead=_add_forward_by_aten)
def add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, round_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalized rows of x + residual, which have one shape and dtype; the sum; and
    1 / sqrt(mean of squares of the sum + eps). Arguments are those of `rms_norm_fwd`."""
    out, rstd = _forward_outputs(x)
    total = torch.empty_like(out)
    _launch_forward(x, weight, out, rstd, residual.contiguous(), total, eps, round_first)
    return out, total, rstd


def _launch_forward(
    x: Tensor, weight: Tensor, out: Tensor, rstd: Tensor, residual: Tensor | None,
    total: Tensor | None, eps: float, round_first: bool,
) -> None:  # fmt: skip
    rows, width = rows_and_width(x)
    if not rows or not width:
        return
    block, warps = tile("rms_norm", width)
    with torch.cuda.device_of(x):
        forward_kernel[(programs_for(x, rows, warps),)](
            x.contiguous(), weight.contiguous(), out, rstd, residual, total, rows, width,
            EPS=eps, ROUND=round_first, ACC=triton_dtype(rstd.dtype),
            BLOCK=block, num_warps=warps,
        )  # fmt: skip


@operator("rms_norm_bwd", instead=_backward_by_aten)
def rms_norm_bwd(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, output_mask: list[bool],
    grad_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of x and weight; one that the mask excludes is an empty tensor.

    Args:
        grad_sum: a gradient of x from elsewhere, to add.
    """
    dx, dw = _backward_outputs(x, weight, output_mask)
    rows, width = rows_and_width(x)
    if not rows or not width:
        return dx, dw.zero_()
    block, warps = tile("rms_norm", width)
    programs = programs_for(x, rows, warps)
    acc = acc_dtype(x.dtype)
    partial = x.new_empty(programs, width, dtype=acc) if output_mask[1] else None
    with torch.cuda.device_of(x):
        backward_kernel[(programs,)](
            grad.contiguous(), x.contiguous(), rstd.contiguous(), contiguous(weight),
            dx if output_mask[0] else None, partial, contiguous(grad_sum), rows, width,
            ACC=triton_dtype(acc), BLOCK=block, num_warps=warps,
        )  # fmt: skip
    if partial is not None:
        dw.copy_(partial.sum(dim=0))
    return dx, dw


def _forward_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=acc_dtype(x.dtype))


def _backward_outputs(x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor]:
    dx, dw = (t.new_empty(t.shape if m else 0) for t, m in zip((x, weight), mask, strict=True))
    return dx, dw


@add_rms_norm_fwd.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    out, rstd = _forward_outputs(x)
    return out, torch.empty_like(out), rstd


rms_norm_fwd.register_fake(lambda x, *_: _forward_outputs(x))
rms_norm_bwd.register_fake(
    lambda grad, x, rstd, weight, mask, grad_sum=None: _backward_outputs(x, weight, mask)
)


def _save_for_backward(ctx, inputs, output) -> None:
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, output[1], weight)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_rstd):
    if grad is None:
        return None, None, None, None
    x, rstd, weight = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:2])
    grads = rms_norm_bwd(grad, x, rstd, weight, needed)
    return *(g if need else None for g, need in zip(grads, needed, strict=True)), None, None


def _save_sum_for_backward(ctx, inputs, output) -> None:
    _, total, rstd = output
    ctx.save_for_backward(total, rstd, inputs[2])
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _add_backward(ctx, grad, grad_sum, _grad_rstd):
    dw, needs_weight = None, ctx.needs_input_grad[2]
    if grad is not None:
        needed = [any(ctx.needs_input_grad[:2]), needs_weight]
        grad_sum, dw = rms_norm_bwd(grad, *ctx.saved_tensors, needed, grad_sum)
    return *residual_gradients(ctx, grad_sum), dw if needs_weight else None, None, None


rms_norm_fwd.register_autograd(_backward, setup_context=_save_for_backward)
add_rms_norm_fwd.register_autograd(_add_backward, setup_context=_save_sum_for_backward)
