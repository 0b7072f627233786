"""Cross-entropy of rows of logits as one Triton kernel per direction.

With z = log Σ exp(x), a row's loss is z - x[t] for its class t, and

    dx = dloss · (exp(x - z) - [class = t])

The forward reads the logits once and writes two numbers a row; the probabilities are never stored.
Logits in a short dtype are widened in registers, so that no copy of them in float32 exists either.
Arithmetic is in float32, or float64 for float64 logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from autopar.kernels.launch import acc_dtype, as_rows, operator, triton_dtype

_BLOCK = 4096


@triton.jit
def forward_kernel(
    logits_ptr, target_ptr, loss_ptr, lse_ptr, width, stride, ignored,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    cols = tl.arange(0, BLOCK)
    # of each lane, over the blocks of the row: the largest logit, and the sum relative to it
    largest = tl.full([BLOCK], float("-inf"), dtype=ACC)
    total = tl.zeros([BLOCK], dtype=ACC)
    for start in range(0, width, BLOCK):
        inside = start + cols < width
        x = tl.load(logits_ptr + row * stride + start + cols, mask=inside, other=float("-inf"))
        x = x.to(ACC)
        new = tl.maximum(largest, x)
        safe = tl.where(new == float("-inf"), 0.0, new)  # inf - inf is no number
        total = total * tl.exp(largest - safe) + tl.exp(x - safe)
        largest = new
    peak = tl.max(largest, axis=0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    lse = tl.log(tl.sum(total * tl.exp(largest - safe), axis=0)) + safe
    known = (target >= 0) & (target < width)
    picked = tl.load(logits_ptr + row * stride + target, mask=known, other=0.0).to(ACC)
    loss = tl.where(known, lse - picked, float("nan"))  # ATen stops the device
    tl.store(loss_ptr + row, tl.where(target == ignored, 0.0, loss))
    tl.store(lse_ptr + row, lse)


@triton.jit
def backward_kernel(
    grad_ptr, logits_ptr, target_ptr, lse_ptr, dx_ptr, width, stride, ignored, blocks,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    target = tl.load(target_ptr + row)
    lse = tl.load(lse_ptr + row)
    grad = tl.load(grad_ptr + row).to(ACC)
    grad = tl.where(target == ignored, 0.0, grad)
    x = tl.load(logits_ptr + row * stride + cols, mask=inside, other=0.0).to(ACC)
    probability = tl.exp(x - lse)
    dx = grad * (probability - tl.where(cols == target, 1.0, 0.0))
    dx = tl.where(target == ignored, 0.0, dx)
    tl.store(dx_ptr + row * width + cols, dx, mask=inside)


def _forward_by_aten(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    wide = logits.to(acc_dtype(logits.dtype))
    losses = torch.nn.functional.cross_entropy(
        wide.flatten(0, -2), target.flatten(), ignore_index=ignore_index, reduction="none"
    )
    return losses.view(target.shape), wide.logsumexp(-1)


def _backward_by_aten(
    grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int
) -> Tensor:
    valid = (target != ignore_index).unsqueeze(-1)
    dx = (logits.to(lse.dtype) - lse.unsqueeze(-1)).exp()
    index = target.unsqueeze(-1).where(valid, 0)
    dx = dx.scatter_add(-1, index, dx.new_full((), -1.0).expand(index.shape))
    return (dx * grad.unsqueeze(-1)).where(valid, 0).to(logits.dtype).contiguous()


@operator("cross_entropy_fwd", instead=_forward_by_aten)
def cross_entropy_fwd(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The loss of each row, and the log of its sum of exponentials: [*], in float32, or float64 for
    float64 logits. A class that does not exist gives no number (NaN).

    Args:
        logits: [*, classes].
        target: [*], int64; a row of class `ignore_index` has no loss.
    """
    losses, lse = _outputs(logits, target)
    if not target.numel():
        return losses, lse
    rows = as_rows(logits)
    with torch.cuda.device_of(logits):
        forward_kernel[(rows.shape[0],)](
            rows, target.contiguous(), losses, lse, rows.shape[1], rows.stride(0), ignore_index,
            ACC=triton_dtype(lse.dtype), BLOCK=_block(rows), num_warps=8,
        )  # fmt: skip
    return losses, lse


@operator("cross_entropy_bwd", instead=_backward_by_aten)
def cross_entropy_bwd(
    grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int
) -> Tensor:
    """The gradient of the logits, in their dtype; contiguous.

    Args:
        grad: [*], of the losses.
    """
    dx = logits.new_empty(logits.shape)
    if not dx.numel():
        return dx
    rows = as_rows(logits)
    block = _block(rows)
    blocks = triton.cdiv(rows.shape[1], block)
    with torch.cuda.device_of(logits):
        backward_kernel[(rows.shape[0] * blocks,)](
            grad.contiguous(), rows, target.contiguous(), lse.contiguous(), dx,
            rows.shape[1], rows.stride(0), ignore_index, blocks,
            ACC=triton_dtype(lse.dtype), BLOCK=block, num_warps=8,
        )  # fmt: skip
    return dx


def _block(rows: Tensor) -> int:
    return min(_BLOCK, triton.next_power_of_2(rows.shape[1]))


def _outputs(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(target.shape, dtype=acc_dtype(logits.dtype))
    return losses, torch.empty_like(losses)


cross_entropy_fwd.register_fake(lambda logits, target, _: _outputs(logits, target))
cross_entropy_bwd.register_fake(lambda grad, logits, *_: logits.new_empty(logits.shape))


def _save_for_backward(ctx, inputs, output) -> None:
    logits, target, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, target, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_lse):
    if grad is None:
        return None, None, None
    return cross_entropy_bwd(grad, *ctx.saved_tensors, ctx.ignore_index), None, None


cross_entropy_fwd.register_autograd(_backward, setup_context=_save_for_backward)
