"""LayerNorm over the last dim as one Triton kernel per direction.

With x̂ = (x - mean) · rstd, y = x̂ · w + b, and g = dy · w, all means taken over a row:

    dx = rstd · (g - mean(g) - x̂ · mean(g · x̂))      dw = Σ_rows dy · x̂      db = Σ_rows dy

A program loops over its rows with one row in registers. In the backward, registers also accumulate
its share of dw and db, which it writes once; a sum over the programs gives the result. Without
atomics, the results are deterministic.

With a residual, x is the sum of both, rounded as an addition rounds it; the sum is a result, too,
and dx gets its gradient.

Arithmetic and statistics are in float32, or float64 for float64 inputs, as in ATen on GPUs.
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

aten = torch.ops.aten


@triton.jit
def forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    residual_ptr,  # as the next; or None
    sum_ptr,
    rows,
    width,
    EPS: tl.constexpr,  # as an argument it would be rounded to float32
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    row_stride = tl.cast(width, tl.int64)  # row * width may pass 2**31
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(ACC)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        offsets = row * row_stride + cols
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(ACC)
        if residual_ptr is not None:
            x += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(ACC)
            x = x.to(x_ptr.dtype.element_ty).to(ACC)
            tl.store(sum_ptr + offsets, x, mask=inside)
        mean = tl.sum(x, axis=0) / width
        centered = tl.where(inside, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=0) / width + EPS)
        out = centered * rstd
        if weight_ptr is not None:
            out = out * weight
        if bias_ptr is not None:
            out = out + bias
        tl.store(out_ptr + offsets, out, mask=inside)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)


@triton.jit
def backward_kernel(
    grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dx_ptr,
    partial_dw_ptr,  # [programs, width], as the next; None if not required
    partial_db_ptr,
    grad_sum_ptr,  # the gradient of the sum, or None
    rows,
    width,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    row_stride = tl.cast(width, tl.int64)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(ACC)
    if partial_dw_ptr is not None:
        dw = tl.zeros([BLOCK], dtype=ACC)
    if partial_db_ptr is not None:
        db = tl.zeros([BLOCK], dtype=ACC)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        offsets = row * row_stride + cols
        grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(ACC)
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(ACC)
        mean = tl.load(mean_ptr + row).to(ACC)
        rstd = tl.load(rstd_ptr + row).to(ACC)
        # Beyond the width x_hat is not zero, but grad is, and only their products are summed.
        x_hat = (x - mean) * rstd
        if partial_dw_ptr is not None:
            dw += grad * x_hat
        if partial_db_ptr is not None:
            db += grad
        if dx_ptr is not None:
            if weight_ptr is not None:
                grad = grad * weight
            mean_grad = tl.sum(grad, axis=0) / width
            mean_grad_x_hat = tl.sum(grad * x_hat, axis=0) / width
            dx = rstd * (grad - mean_grad - x_hat * mean_grad_x_hat)
            if grad_sum_ptr is not None:
                dx += tl.load(grad_sum_ptr + offsets, mask=inside, other=0.0).to(ACC)
            tl.store(dx_ptr + offsets, dx, mask=inside)
    partial = tl.program_id(0) * row_stride + cols
    if partial_dw_ptr is not None:
        tl.store(partial_dw_ptr + partial, dw, mask=inside)
    if partial_db_ptr is not None:
        tl.store(partial_db_ptr + partial, db, mask=inside)


def _forward_by_aten(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, mean, rstd = aten.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    acc = acc_dtype(x.dtype)  # ATen rounds the statistics on CPUs
    return out.contiguous(), mean.to(acc), rstd.to(acc)


def _add_forward_by_aten(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.contiguous() + residual.contiguous()
    out, mean, rstd = _forward_by_aten(total, weight, bias, eps)
    return out, total, mean, rstd


def _backward_by_aten(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, output_mask: list[bool], grad_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    acc, rows = acc_dtype(x.dtype), tuple(range(x.ndim - 1))
    x_hat, dy = (x.to(acc) - mean) * rstd, grad.to(acc)
    g = dy if weight is None else dy * weight.to(acc)
    dx = rstd * (g - g.mean(-1, True) - x_hat * (g * x_hat).mean(-1, True))
    dx = dx if grad_sum is None else dx + grad_sum.to(acc)
    totals = (dx, (dy * x_hat).sum(rows), dy.sum(rows))
    dx, dw, db = _backward_outputs(x, weight, bias, output_mask)
    for result, total in zip((dx, dw, db), totals, strict=True):
        if result.numel():
            result.copy_(total)
    return dx, dw, db


@operator("layer_norm_fwd", instead=_forward_by_aten)
def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`aten.native_layer_norm` over the last dim: the output, and each row's mean and rstd."""
    results = _forward_outputs(x)
    _launch_forward(x, weight, bias, *results, None, None, eps)
    return results


@operator("add_layer_norm_fwd", instead=_add_forward_by_aten)
def add_layer_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LayerNorm of x + residual, which have one shape and dtype: the output, the sum, and each
    row's mean and rstd."""
    out, mean, rstd = _forward_outputs(x)
    total = torch.empty_like(out)
    _launch_forward(x, weight, bias, out, mean, rstd, residual.contiguous(), total, eps)
    return out, total, mean, rstd


def _launch_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor, mean: Tensor, rstd: Tensor,
    residual: Tensor | None, total: Tensor | None, eps: float,
) -> None:  # fmt: skip
    rows, width = rows_and_width(x)
    if not rows or not width:
        return
    block, warps = tile("layer_norm", width)
    with torch.cuda.device_of(x):
        forward_kernel[(programs_for(x, rows, warps),)](
            x.contiguous(),
            contiguous(weight),
            contiguous(bias),
            out,
            mean,
            rstd,
            residual,
            total,
            rows,
            width,
            EPS=eps,
            ACC=triton_dtype(mean.dtype),
            BLOCK=block,
            num_warps=warps,
        )


@operator("layer_norm_bwd", instead=_backward_by_aten)
def layer_norm_bwd(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: list[bool],
    grad_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`aten.native_layer_norm_backward` over the last dim: the gradients of x, weight and bias.

    A custom op cannot return None: a gradient that the mask excludes is an empty tensor.

    Args:
        grad_sum: a gradient of x from elsewhere, to add.
    """
    dx, dw, db = _backward_outputs(x, weight, bias, output_mask)
    rows, width = rows_and_width(x)
    if not rows or not width:
        return dx, dw.zero_(), db.zero_()
    block, warps = tile("layer_norm", width)
    programs = programs_for(x, rows, warps)
    acc = acc_dtype(x.dtype)
    partial_dw, partial_db = (
        x.new_empty(programs, width, dtype=acc) if total.numel() else None for total in (dw, db)
    )
    with torch.cuda.device_of(x):
        backward_kernel[(programs,)](
            grad.contiguous(),
            x.contiguous(),
            mean.contiguous(),
            rstd.contiguous(),
            contiguous(weight),
            dx if dx.numel() else None,
            partial_dw,
            partial_db,
            contiguous(grad_sum),
            rows,
            width,
            ACC=triton_dtype(acc),
            BLOCK=block,
            num_warps=warps,
        )
    for total, partial in ((dw, partial_dw), (db, partial_db)):
        if partial is not None:
            total.copy_(partial.sum(dim=0))
    return dx, dw, db


def _forward_outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    stats = (*x.shape[:-1], 1)
    acc = acc_dtype(x.dtype)
    return x.new_empty(x.shape), x.new_empty(stats, dtype=acc), x.new_empty(stats, dtype=acc)


def _backward_outputs(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, db = (
        like.new_empty(like.shape) if needed and like is not None else x.new_empty(0)
        for like, needed in zip((x, weight, bias), output_mask, strict=True)
    )
    return dx, dw, db


layer_norm_fwd.register_fake(lambda x, weight, bias, eps: _forward_outputs(x))
layer_norm_bwd.register_fake(
    lambda grad, x, mean, rstd, weight, bias, mask, grad_sum=None: _backward_outputs(
        x, weight, bias, mask
    )
)


@add_layer_norm_fwd.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, mean, rstd = _forward_outputs(x)
    return out, torch.empty_like(out), mean, rstd


def _save_for_backward(ctx, inputs, output) -> None:
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight, bias)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_mean, _grad_rstd):
    if grad is None:
        return None, None, None, None
    x, mean, rstd, weight, bias = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:3])
    grads = layer_norm_bwd(grad, x, mean, rstd, weight, bias, needed)
    return *(g if need else None for g, need in zip(grads, needed, strict=True)), None


def _save_sum_for_backward(ctx, inputs, output) -> None:
    _, _, weight, bias, _ = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(total, mean, rstd, weight, bias)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _add_backward(ctx, grad, grad_sum, _grad_mean, _grad_rstd):
    dw = db = None
    needed = list(ctx.needs_input_grad[2:4])
    if grad is not None:
        mask = [any(ctx.needs_input_grad[:2]), *needed]
        grad_sum, dw, db = layer_norm_bwd(grad, *ctx.saved_tensors, mask, grad_sum)
    affine = (g if need else None for g, need in zip((dw, db), needed, strict=True))
    return *residual_gradients(ctx, grad_sum), *affine, None


layer_norm_fwd.register_autograd(_backward, setup_context=_save_for_backward)
add_layer_norm_fwd.register_autograd(_add_backward, setup_context=_save_sum_for_backward)
