"""Gated linear units, `activation(gate) * up`, as one Triton kernel per direction: SwiGLU and GeGLU
(arXiv:2002.05202).

With a the activation, y = a(gate) · up:

    dgate = dy · up · a'(gate)      dup = dy · a(gate)

The backward computes the activation again: what the forward keeps are its operands alone. Operands
may be halves of one product, whose rows lie apart. Arithmetic is in float32, or float64 for float64
inputs.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from autopar.kernels.launch import acc_dtype, as_rows, operator, triton_dtype

aten = torch.ops.aten

KINDS = ("silu", "gelu", "gelu_tanh")

_BLOCK = 1024


@triton.jit
def activation(x, KIND: tl.constexpr):
    """The activation and its derivative."""
    if KIND == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        rest = 1.0 / (1.0 + tl.exp(x))  # 1 - sigmoid would cancel
        value = x * sigmoid
        slope = sigmoid * (1.0 + x * rest)
    elif KIND == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))  # of the normal distribution
        value = x * below
        slope = below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        sigmoid = 1.0 / (1.0 + tl.exp(-2.0 * inner))  # (1 + tanh(inner)) / 2
        rest = 1.0 / (1.0 + tl.exp(2.0 * inner))
        value = x * sigmoid
        inner_slope = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        slope = sigmoid + 2.0 * x * sigmoid * rest * inner_slope
    return value, slope


@triton.jit
def place(width, blocks, BLOCK: tl.constexpr):
    """The row of a program, its columns, and which of them the row has."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, cols, cols < width


@triton.jit
def forward_kernel(
    gate_ptr, up_ptr, out_ptr, width, gate_stride, up_stride, blocks,
    KIND: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, cols, inside = place(width, blocks, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=inside, other=0.0).to(ACC)
    up = tl.load(up_ptr + row * up_stride + cols, mask=inside, other=0.0).to(ACC)
    value, _ = activation(gate, KIND)
    tl.store(out_ptr + row * width + cols, value * up, mask=inside)


@triton.jit
def backward_kernel(
    grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
    width, grad_stride, gate_stride, up_stride, blocks,
    KIND: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, cols, inside = place(width, blocks, BLOCK)
    grad = tl.load(grad_ptr + row * grad_stride + cols, mask=inside, other=0.0).to(ACC)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=inside, other=0.0).to(ACC)
    up = tl.load(up_ptr + row * up_stride + cols, mask=inside, other=0.0).to(ACC)
    value, slope = activation(gate, KIND)
    tl.store(dgate_ptr + row * width + cols, grad * up * slope, mask=inside)
    tl.store(dup_ptr + row * width + cols, grad * value, mask=inside)


def _forward_by_aten(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return (_activated(gate, kind) * up).contiguous()


def _backward_by_aten(grad: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    through = grad * up
    if kind == "silu":
        dgate = aten.silu_backward(through, gate)
    else:
        dgate = aten.gelu_backward(through, gate, approximate=_approximation(kind))
    return dgate.contiguous(), (grad * _activated(gate, kind)).contiguous()


def _activated(gate: Tensor, kind: str) -> Tensor:
    return F.silu(gate) if kind == "silu" else F.gelu(gate, approximate=_approximation(kind))


def _approximation(kind: str) -> str:
    return "tanh" if kind == "gelu_tanh" else "none"


@operator("glu_fwd", instead=_forward_by_aten)
def glu_fwd(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """`activation(gate) * up`, of equal shapes and dtypes; contiguous.

    Args:
        kind: "silu", "gelu" or "gelu_tanh".
    """
    out = gate.new_empty(gate.shape)
    if not gate.numel():
        return out
    operands = [_rows(x, gate) for x in (gate, up)]
    grid, sizes, options = _launch(operands, kind)
    with torch.cuda.device_of(gate):
        forward_kernel[grid](*operands, out, *sizes, **options)
    return out


@operator("glu_bwd", instead=_backward_by_aten)
def glu_bwd(grad: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up; contiguous."""
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if not gate.numel():
        return dgate, dup
    operands = [_rows(x, gate) for x in (grad, gate, up)]
    grid, sizes, options = _launch(operands, kind)
    with torch.cuda.device_of(gate):
        backward_kernel[grid](*operands, dgate, dup, *sizes, **options)
    return dgate, dup


def _rows(x: Tensor, like: Tensor) -> Tensor:
    """[rows, width]."""
    assert x.shape == like.shape and x.dtype == like.dtype
    return as_rows(x)


def _launch(operands: list[Tensor], kind: str) -> tuple[tuple[int], list[int], dict[str, object]]:
    """The grid, width and strides with the blocks of a row, and what is compiled in. Operands
    without gaps are one long row."""
    if kind not in KINDS:
        raise ValueError(f"autopar::glu: the kind is one of {', '.join(KINDS)}, not {kind!r}")
    rows, width = operands[0].shape
    if all(x.is_contiguous() for x in operands):
        rows, width = 1, rows * width
    blocks = triton.cdiv(width, _BLOCK)
    sizes = [width, *(x.stride(0) for x in operands), blocks]
    acc = triton_dtype(acc_dtype(operands[0].dtype))
    return (rows * blocks,), sizes, {"KIND": kind, "ACC": acc, "BLOCK": _BLOCK}


glu_fwd.register_fake(lambda gate, up, kind: gate.new_empty(gate.shape))
glu_bwd.register_fake(
    lambda grad, gate, up, kind: (gate.new_empty(gate.shape), up.new_empty(up.shape))
)


def _save_for_backward(ctx, inputs, output) -> None:
    gate, up, ctx.kind = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx, grad):
    gate, up = ctx.saved_tensors
    return *glu_bwd(grad, gate, up, ctx.kind), None


glu_fwd.register_autograd(_backward, setup_context=_save_for_backward)
