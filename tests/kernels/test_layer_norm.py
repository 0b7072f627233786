"""The LayerNorm kernels against ATen, and the pass that substitutes them.

Without a GPU the kernels run through Triton's interpreter. Triton decides that once, when it is
imported, so the checks (`check_*`) run in a process of their own; the tests only send them there.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_module, make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from autopar.kernels import kernels_run_on, triton_available
from autopar.kernels.substitute import substitute_kernels
from autopar.passes.runner import run_passes

aten = torch.ops.aten
Interpreter = Callable[..., None]

needs_triton = pytest.mark.skipif(not triton_available(), reason="Triton is not installed")

SHAPES = [(7,), (3, 50), (2, 3, 257), (2, 1, 3, 64), (5, 1000), (9, 1), (0, 8)]
AFFINES = [(True, True), (True, False), (False, True), (False, False)]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreter]:
    """Runs a check, with its arguments, where Triton interprets."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            pool.submit(torch.set_num_threads, 1).result()  # starts the process
        yield lambda check, *args: pool.submit(check, *args).result()


# ---- the kernels ------------------------------------------------------------------------------


def check_values(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, affine: tuple[bool, bool]
) -> None:
    """Outputs and gradients equal those of ATen in float64, rounded to the dtype."""
    from autopar.kernels.layer_norm import acc_dtype, layer_norm_bwd, layer_norm_fwd

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


def tolerance(dtype: torch.dtype, scale: float = 1.0) -> dict[str, float]:
    """A few roundings of numbers of this scale."""
    epsilon = torch.finfo(dtype).eps
    return {"rtol": 10 * epsilon, "atol": 30 * epsilon * scale}


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
        torch.library.opcheck(layer_norm_fwd, (leaf(2, 3, 10), weight, bias, 1e-5))
    torch.autograd.gradcheck(
        lambda *args: layer_norm_fwd(*args, 1e-5)[0], (leaf(4, 6), leaf(6), leaf(6))
    )


@needs_triton
def test_is_a_sound_custom_op(interpreted: Interpreter) -> None:
    interpreted(check_custom_op)


def check_too_wide() -> None:
    from autopar.kernels.layer_norm import MAX_WIDTH, layer_norm_fwd

    with pytest.raises(ValueError, match=f"rows of {MAX_WIDTH + 1} elements .* {MAX_WIDTH} "):
        layer_norm_fwd(torch.zeros(1, MAX_WIDTH + 1), None, None, 1e-5)


@needs_triton
def test_too_wide_rows_are_refused(interpreted: Interpreter) -> None:
    interpreted(check_too_wide)


@needs_triton
@pytest.mark.skipif(kernels_run_on("cpu"), reason="Triton interprets, so it cannot compile")
@pytest.mark.parametrize("element", ["fp32", "bf16", "fp64"])
def test_compiles_for_a_gpu(element) -> None:
    """What the interpreter takes need not compile. Compiling needs no GPU."""
    import triton.language as tl
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from autopar.kernels.layer_norm import backward_kernel, forward_kernel, tile

    acc = "fp64" if element == "fp64" else "fp32"

    def type_of(name: str) -> str:
        if name in ("rows", "width"):
            return "i32"
        return "*" + (acc if name.startswith(("mean", "rstd", "partial")) else element)

    block, warps = tile(1000)
    options = {"ACC": tl.float64 if acc == "fp64" else tl.float32, "BLOCK": block}
    # Triton compiles an argument that is None, or 1, as a constant.
    cases = [
        (forward_kernel, {"EPS": 1e-5}),
        (forward_kernel, {"EPS": 1e-5, "weight_ptr": None, "bias_ptr": None}),
        (forward_kernel, {"EPS": 1e-5, "rows": 1, "width": 1}),
        (backward_kernel, {}),
        (backward_kernel, {"dx_ptr": None, "partial_db_ptr": None}),
        (backward_kernel, {"weight_ptr": None, "partial_dw_ptr": None, "partial_db_ptr": None}),
        (backward_kernel, {"rows": 1, "width": 1}),
    ]
    for kernel, more in cases:
        constants = options | more
        signature = {
            name: "constexpr" if name in constants else type_of(name) for name in kernel.arg_names
        }
        compiled = triton_compile(
            ASTSource(kernel, signature, constants),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": warps},
        )
        assert compiled.asm["cubin"]


# ---- the pass ---------------------------------------------------------------------------------


class Norms(nn.Module):
    """Layer norms with every combination of required gradients."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.LayerNorm(width)  # of an input without gradient
        self.linear = nn.Linear(width, width)
        self.no_bias = nn.LayerNorm(width, bias=False)
        self.frozen = nn.LayerNorm(width)
        self.frozen.weight.requires_grad_(False)
        self.plain = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.first(x))
        x = x + self.no_bias(x)
        return self.plain(torch.tanh(self.frozen(x)))


def substituted(gm: fx.GraphModule, device_type: str) -> fx.GraphModule:
    return run_passes(gm, [partial(substitute_kernels, device_type=device_type)])


def lowered(module: nn.Module, device_type: str = "cpu") -> tuple[nn.Module, list[fx.GraphModule]]:
    """The module run by its AOTAutograd graphs after the pass, and those graphs."""
    graphs: list[fx.GraphModule] = []

    def compiler(gm: fx.GraphModule, _):
        graphs.append(substituted(gm, device_type))
        return make_boxed_func(gm)

    return aot_module(module, fw_compiler=compiler, bw_compiler=compiler), graphs


def run(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and the gradients of all parameters."""
    out = module(x)
    torch.manual_seed(1)
    trained = [p for p in module.parameters() if p.requires_grad]
    return [out, *torch.autograd.grad(out, trained, torch.randn_like(out))]


def count(graphs: list[fx.GraphModule], namespace: str) -> int:
    """How many layer norms, of either direction, of this namespace."""
    names = [str(node.target) for gm in graphs for node in gm.graph.nodes]
    return sum("layer_norm" in name and name.startswith(namespace) for name in names)


def check_substitution(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, x = Norms(width).to(dtype), torch.randn(2, 3, width, dtype=dtype)
    lowered_module, graphs = lowered(module)
    assert_close(run(lowered_module, x), run(module, x), **tolerance(dtype))
    assert count(graphs, "autopar.layer_norm_fwd") == 4
    assert count(graphs, "autopar.layer_norm_bwd") == 4
    assert count(graphs, "aten") == 0
    for gm in graphs:
        for node in gm.graph.nodes:
            if str(node.target).startswith("autopar"):
                assert [val.dtype for val in node.meta["val"]] == [dtype] * 3


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [7, 64])
def test_substitution_keeps_values(interpreted: Interpreter, width, dtype) -> None:
    interpreted(check_substitution, width, dtype)


@needs_triton
def test_substitutes_in_low_precision_for_gpus() -> None:
    """On fake tensors, for there may be no GPU: ATen's statistics are in float32 there, as ours."""

    def norm(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        out, mean, rstd = aten.native_layer_norm(x, [8], weight, weight, 1e-5)
        mask = [True, True, False]
        dx, dw, _ = aten.native_layer_norm_backward(grad, x, [8], mean, rstd, weight, None, mask)
        return out + dx, dw

    with FakeTensorMode():
        x, weight = (
            torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in ((2, 8), (8,))
        )
        gm = substituted(make_fx(norm)(x, x, weight), "cuda")
        out, dw = gm(x, x, weight)
    assert count([gm], "autopar") == 2 and count([gm], "aten") == 0
    assert out.shape == (2, 8) and dw.shape == (8,) and dw.dtype == torch.bfloat16


def check_left_alone() -> None:
    from autopar.kernels.layer_norm import MAX_WIDTH

    cases = [
        (nn.LayerNorm([3, 8]), torch.randn(2, 3, 8), "cpu"),  # over two dims
        (nn.LayerNorm(MAX_WIDTH + 1), torch.randn(1, MAX_WIDTH + 1), "cpu"),
        (nn.LayerNorm(8), torch.randn(2, 8), "cuda"),  # for another device than the graph's
        (nn.BatchNorm1d(8), torch.randn(2, 8), "cpu"),
    ]
    for module, x, device_type in cases:
        lowered_module, graphs = lowered(module, device_type)
        assert_close(run(lowered_module, x), run(module, x))
        assert len(graphs) == 2 and count(graphs, "autopar") == 0


@needs_triton
def test_other_nodes_are_left_alone(interpreted: Interpreter) -> None:
    interpreted(check_left_alone)


def check_rounded_statistics() -> None:
    module, x = nn.LayerNorm(50, dtype=torch.bfloat16), torch.randn(4, 50, dtype=torch.bfloat16)
    lowered_module, graphs = lowered(module)
    assert_close(run(lowered_module, x), run(module, x), **tolerance(torch.bfloat16))
    assert count(graphs, "autopar.layer_norm_fwd") == 0


@needs_triton
def test_forward_with_rounded_statistics_is_left_alone(interpreted: Interpreter) -> None:
    """On CPUs, and only there, ATen returns the mean and rstd of bfloat16 in bfloat16."""
    interpreted(check_rounded_statistics)


@pytest.mark.skipif(kernels_run_on("cpu"), reason="Triton interprets")
def test_does_nothing_on_cpus() -> None:
    module, x = Norms(8), torch.randn(2, 8)
    lowered_module, graphs = lowered(module)
    assert_close(run(lowered_module, x), run(module, x))
    assert count(graphs, "autopar") == 0 and count(graphs, "aten") == 8


def test_imports_without_triton() -> None:
    program = """
import sys
sys.modules["triton"] = None  # importing it now raises ImportError
from torch import fx, nn
from autopar.kernels import kernels_run_on, triton_available
from autopar.kernels.substitute import substitute_kernels
assert not triton_available()
assert not kernels_run_on("cuda")
substitute_kernels(fx.symbolic_trace(nn.LayerNorm(4)), device_type="cuda")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
