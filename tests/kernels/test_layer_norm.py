"""The LayerNorm kernels against ATen."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.interpreter import Interpreter, needs_triton, tolerance

aten = torch.ops.aten
SHAPES = [(7,), (3, 50), (2, 3, 257), (2, 1, 3, 64), (5, 1000), (9, 1), (0, 8)]
AFFINES = [(True, True), (True, False), (False, True), (False, False)]


def check_values(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, affine: tuple[bool, bool]
) -> None:
    """Outputs and gradients equal those of ATen in float64, rounded to the dtype."""
    from autopar.kernels.launch import acc_dtype
    from autopar.kernels.layer_norm import layer_norm_bwd, layer_norm_fwd

    torch.manual_seed(0)
    width = shape[-1:]
    x, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    x = x * 3 + 1
    weight, bias = (
        torch.randn(width, device=device, dtype=dtype) if present else None for present in affine
    )
    mask = [True, *affine]
    out, mean, rstd = layer_norm_fwd(x, weight, bias, 1e-5)
    grads = layer_norm_bwd(grad, x, mean, rstd, weight, bias, mask)

    x64, grad64, weight64, bias64 = (
        None if t is None else t.double() for t in (x, grad, weight, bias)
    )
    expected = aten.native_layer_norm(x64, width, weight64, bias64, 1e-5)
    expected_grads = aten.native_layer_norm_backward(
        grad64, x64, width, *expected[1:], weight64, bias64, mask
    )
    assert_close(out, expected[0].to(dtype))
    assert_close(mean, expected[1].to(acc_dtype(dtype)))
    assert_close(rstd, expected[2].to(acc_dtype(dtype)))
    for ours, reference, needed in zip(grads, expected_grads, mask, strict=True):
        if needed:
            # Sums may cancel, so errors are relative to the terms: of x̂, and in dx times rstd. They
            # add up like a random walk over the rows.
            scale = max(1.0, rstd.max().item(), rstd.numel() ** 0.5) if rstd.numel() else 1.0
            assert_close(ours, reference.to(dtype), **tolerance(dtype, scale))
        else:
            assert ours.numel() == 0


@needs_triton
@pytest.mark.parametrize("affine", AFFINES, ids=["both", "weight", "bias", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_aten(interpreted: Interpreter, shape, dtype, affine) -> None:
    interpreted(check_values, "cpu", shape, dtype, affine)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_accumulates_in_float32(interpreted: Interpreter, dtype) -> None:
    interpreted(check_values, "cpu", (4, 257), dtype, (True, True))


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_equals_aten_on_the_gpu(dtype) -> None:
    for shape, affine in product([*SHAPES, (3000, 768), (40, 8192)], AFFINES):
        check_values("cuda", shape, dtype, affine)


def check_strided_inputs() -> None:
    from autopar.kernels.layer_norm import layer_norm_bwd, layer_norm_fwd

    x, grad = torch.randn(2, 5, 3, 6).transpose(1, 2), torch.randn(6).expand(2, 3, 5, 6)
    weight = torch.randn(12)[::2]
    out, mean, rstd = layer_norm_fwd(x, weight, None, 1e-5)
    expected = aten.native_layer_norm(x, [6], weight, None, 1e-5)
    assert_close((out, mean, rstd), expected, check_stride=True)
    mask = [True, True, False]
    grads = layer_norm_bwd(grad, x, mean, rstd, weight, None, mask)
    expected = aten.native_layer_norm_backward(grad, x, [6], *expected[1:], weight, None, mask)
    assert_close(grads[:2], expected[:2], check_stride=True)


@needs_triton
def test_strided_inputs(interpreted: Interpreter) -> None:
    interpreted(check_strided_inputs)


def check_custom_op() -> None:
    from autopar.kernels.layer_norm import layer_norm_fwd

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    for weight, bias in ((leaf(10), leaf(10)), (leaf(10), None), (None, None)):
        torch.library.opcheck(
            layer_norm_fwd, (leaf(2, 3, 10), weight, bias, 1e-5),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )  # fmt: skip
    torch.autograd.gradcheck(
        lambda *args: layer_norm_fwd(*args, 1e-5)[0], (leaf(4, 6), leaf(6), leaf(6)), fast_mode=True
    )


@needs_triton
def test_is_a_sound_custom_op(interpreted: Interpreter) -> None:
    interpreted(check_custom_op)


def check_too_wide() -> None:
    from autopar.kernels.launch import MAX_WIDTH
    from autopar.kernels.layer_norm import layer_norm_fwd

    with pytest.raises(ValueError, match=f"rows of {MAX_WIDTH + 1} elements .* {MAX_WIDTH} "):
        layer_norm_fwd(torch.zeros(1, MAX_WIDTH + 1), None, None, 1e-5)


@needs_triton
def test_too_wide_rows_are_refused(interpreted: Interpreter) -> None:
    interpreted(check_too_wide)
