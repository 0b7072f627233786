"""The kernels' operators: strides and broadcast operands, derivatives, fake results, what GPUs
compile, and ATen in the place of a kernel that cannot be built."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from autopar.kernels import kernels_run_on
from tests.interpreter import Interpreter, needs_triton, tolerance

TYPES = (torch.float32, torch.float64, torch.bfloat16)
IGNORED = -100
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def ops() -> Any:
    import autopar.kernels.table  # noqa: F401  (defines the operators)

    return torch.ops.autopar


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def equal(actual: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """Within a few roundings of what float64 gives."""
    assert_close(actual, expected.to(actual.dtype), **tolerance(actual.dtype, scale))


def gradients(result: Tensor, operands: list[Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(result, operands, seed)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by tanh, with a derivative that does not cancel, as that of ATen does."""
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return x * F.logsigmoid(2 * inner).exp()


def check_gated(dtype: torch.dtype) -> None:
    """Halves of one product, whose rows lie apart; every second column; a transposed operand."""
    both = draw(3, 1, 2 * 1027, dtype=dtype)
    cases = [
        tuple(both.chunk(2, -1)),
        (both[..., ::2], both[..., 1::2]),
        (draw(7, 5, dtype=dtype).T, draw(5, 7, dtype=dtype)),
        (draw(1, dtype=dtype), draw(1, dtype=dtype)),
        (draw(0, 4, dtype=dtype), draw(0, 4, dtype=dtype)),
    ]
    activations: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": gelu_tanh,
    }
    for kind, activation in activations.items():
        for gate, up in cases:
            operands = [(4 * t).detach().requires_grad_() for t in (gate, up)]
            exact = [t.detach().double().requires_grad_() for t in operands]
            result = ops().glu_fwd(*operands, kind)
            expected = activation(exact[0]) * exact[1]
            equal(result, expected, 20)
            grad = torch.randn_like(result).expand_as(result)
            for a, b in zip(
                gradients(result, operands, grad), gradients(expected, exact, grad.double()),
                strict=True,
            ):  # fmt: skip
                equal(a, b, 20)


def check_rms_norm(dtype: torch.dtype) -> None:
    """Rows of a transposed tensor, and rows of tiny numbers, where eps counts."""
    for x, eps in (
        (draw(2, 5, 3, 257, dtype=dtype).transpose(1, 2), 1e-6),
        (1e-2 * draw(9, 50, dtype=dtype), 1e-4),
        (draw(4, 1, dtype=dtype), 1e-5),
    ):
        width = x.shape[-1]
        operands = [x.detach().requires_grad_(), draw(width, dtype=dtype).requires_grad_()]
        wide, weight = exact = [t.detach().double().requires_grad_() for t in operands]
        result = ops().rms_norm_fwd(*operands, eps, False)[0]
        expected = weight * wide * (wide.square().mean(-1, True) + eps).rsqrt()
        equal(result, expected)
        grad = torch.randn_like(result)
        rstd = (wide.square().mean(-1) + eps).rsqrt().max().item()
        for a, b in zip(
            gradients(result, operands, grad), gradients(expected, exact, grad.double()),
            strict=True,
        ):  # fmt: skip
            equal(a, b, max(rstd, x.numel() ** 0.5))


def check_residual(dtype: torch.dtype) -> None:
    """A norm of a sum, and the sum: of transposed rows and of every second column, with gradients
    of both results or of one; what needs no gradient gets none."""
    operators: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
        "rms": lambda x, residual, weight: ops().add_rms_norm_fwd(x, residual, weight, 1e-5, False),
        "layer": lambda x, residual, weight: ops().add_layer_norm_fwd(
            x, residual, weight, None, 1e-5
        ),
    }

    def norm(kind: str, total: Tensor, weight: Tensor) -> Tensor:
        if kind == "layer":
            return F.layer_norm(total, total.shape[-1:], weight)
        return weight * total * (total.square().mean(-1, True) + 1e-5).rsqrt()

    for x, residual in (
        (draw(2, 5, 3, 257, dtype=dtype).transpose(1, 2), draw(2, 3, 5, 257, dtype=dtype)),
        (draw(9, 100, dtype=dtype)[:, ::2], draw(1, 50, dtype=dtype).expand(9, 50)),
        (draw(4, 1, dtype=dtype), draw(4, 1, dtype=dtype)),
        (draw(0, 8, dtype=dtype), draw(0, 8, dtype=dtype)),
    ):
        weight = draw(x.shape[-1], dtype=dtype)
        for kind, operator in operators.items():
            operands = [t.detach().requires_grad_() for t in (x, residual, weight)]
            out, total, *_ = operator(*operands)
            assert torch.equal(total, (x + residual)) or dtype == torch.bfloat16  # truncated here
            exact = [t.detach().double().requires_grad_() for t in operands]
            wide = exact[0] + exact[1]
            expected = norm(kind, wide, exact[2])
            scale = 1.0
            if x.numel():
                deviation = (
                    wide.var(-1, correction=0) if kind == "layer" else wide.square().mean(-1)
                )
                rstd = (deviation + 1e-5).rsqrt().max().item()
                scale = max(rstd * max(rstd, 1.0), x.numel() ** 0.5)  # the sum is rounded
            equal(total, wide)
            equal(out, expected, scale)
            seeds = [torch.randn_like(out), torch.randn_like(total)]
            for used in ((0, 1), (0,), (1,)):
                of = operands if 0 in used else operands[:2]
                wanted = exact if 0 in used else exact[:2]
                actual = torch.autograd.grad(
                    [(out, total)[k] for k in used], of, [seeds[k] for k in used], retain_graph=True
                )
                others = torch.autograd.grad(
                    [(expected, wide)[k] for k in used], wanted,
                    [seeds[k].double() for k in used], retain_graph=True,
                )  # fmt: skip
                for a, b in zip(actual, others, strict=True):
                    equal(a, b, scale)
            frozen = [operands[0].detach(), operands[1], operands[2].detach()]
            out, total, *_ = operator(*frozen)
            (gradient,) = torch.autograd.grad([out, total], [operands[1]], seeds)
            equal(gradient, torch.autograd.grad(
                [expected, wide], [exact[1]], [s.double() for s in seeds]
            )[0], scale)  # fmt: skip


def check_rotary(dtype: torch.dtype) -> None:
    """Transposed heads, a part of the head, one sequence of angles or one each; two dims."""
    heads = draw(2, 7, 3, 24, dtype=dtype).transpose(1, 2)
    for x, shape in (
        (heads, (1, 1, 7, 24)),
        (heads[..., :10], (2, 1, 7, 10)),
        (draw(5, 6, dtype=dtype), (6,)),
        (draw(3, 5, 2, dtype=dtype), (5, 2)),
    ):
        cos, sin = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype)
        x = x.detach().requires_grad_()
        exact = x.detach().double().requires_grad_()
        half = x.shape[-1] // 2
        turned = torch.cat((-exact[..., half:], exact[..., :half]), -1)
        expected = exact * cos.double() + turned * sin.double()
        result = ops().rotary(x, cos, sin, False)
        assert result.stride() == (x * cos).stride()
        equal(result, expected, 4)
        grad = torch.randn_like(result)
        (actual,), (other,) = (
            gradients(r, [t], g)
            for r, t, g in ((result, x, grad), (expected, exact, grad.double()))
        )
        equal(actual, other, 4)


def check_cross_entropy(dtype: torch.dtype) -> None:
    """More classes than a block, classes that are masked out, ignored rows, and strided rows."""
    for logits, target in (
        (3 * draw(5, 4099, dtype=dtype), torch.tensor([4098, 0, IGNORED, 7, 4096])),
        (draw(2, 3, 11, dtype=dtype)[:, 1:], torch.tensor([[3, IGNORED], [10, 0]])),
        (draw(4, 30, dtype=dtype)[:, ::2], torch.tensor([0, 14, 3, 3])),
        (draw(1, 1, dtype=dtype), torch.tensor([0])),
    ):
        if logits.shape[-1] > 4:
            logits[..., 1] = float("-inf")
        logits = logits.detach().requires_grad_()
        exact = logits.detach().double().requires_grad_()
        result = ops().cross_entropy_fwd(logits, target, IGNORED)[0]
        expected = F.cross_entropy(
            exact.flatten(0, -2), target.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(target.shape)
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(result, expected.to(result.dtype))
        grad = torch.randn_like(result)
        (actual,), (other,) = (
            gradients(r, [t], g)
            for r, t, g in ((result, logits, grad), (expected, exact, grad.double()))
        )
        equal(actual, other)


def check_softmax(dtype: torch.dtype) -> None:
    """A mask of keys, one of a triangle, and none seen; a bias of pairs with a gradient."""
    triangle = torch.full((7, 7), float("-inf"), dtype=dtype).triu(1)
    for shape, mask, bias, scale in (
        ((2, 3, 5, 19), draw(2, 1, 1, 19, dtype=dtype), draw(1, 3, 5, 19, dtype=dtype), 0.3),
        ((2, 7, 7), triangle, None, 1.0),
        ((6, 33), draw(33, dtype=dtype), draw(6, 1, dtype=dtype), 2.0),
    ):
        scores = draw(*shape, dtype=dtype)
        operands = [t.requires_grad_() for t in (scores, mask, bias) if t is not None]
        exact = [t.detach().double().requires_grad_() for t in operands]
        result = ops().masked_softmax_fwd(scores, mask, bias, scale)
        sums = scale * exact[0] + exact[1] + (exact[2] if bias is not None else 0)
        expected = sums.softmax(-1)
        low = 8.0 if dtype in (torch.bfloat16, torch.float16) else 1.0  # sums are rounded
        equal(result, expected, low)
        grad = torch.randn_like(result)
        for a, b in zip(
            gradients(result, operands, grad), gradients(expected, exact, grad.double()),
            strict=True,
        ):  # fmt: skip
            equal(a, b, 4 * low)


def check_unknown_class() -> None:
    losses = ops().cross_entropy_fwd(draw(2, 3), torch.tensor([3, -1]), IGNORED)[0]
    assert losses.isnan().all()


@needs_triton
def test_a_class_that_does_not_exist_gives_no_number(interpreted: Interpreter) -> None:
    interpreted(check_unknown_class)


CHECKS = (
    check_gated, check_rms_norm, check_residual, check_rotary, check_cross_entropy, check_softmax,
)  # fmt: skip


@needs_triton
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_equals_float64(interpreted: Interpreter, check, dtype) -> None:
    interpreted(check, dtype)


def check_custom_operators() -> None:
    def leaf(*shape: int) -> Tensor:
        return draw(*shape).requires_grad_()

    x, angles = leaf(1, 2, 3, 4), draw(3, 4)
    target = torch.tensor([1, IGNORED, 0, 4])
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (ops().glu_fwd, (leaf(3, 4), leaf(3, 4), "silu")),
        (ops().rms_norm_fwd, (leaf(3, 5), leaf(5), 1e-5, False)),
        (ops().add_rms_norm_fwd, (leaf(3, 5), leaf(3, 5), leaf(5), 1e-5, False)),
        (ops().add_layer_norm_fwd, (leaf(3, 5), leaf(3, 5), leaf(5), None, 1e-5)),
        (ops().rotary, (x, angles, angles, False)),
        (ops().cross_entropy_fwd, (leaf(4, 5), target, IGNORED)),
        (ops().masked_softmax_fwd, (leaf(2, 3, 5), leaf(5), leaf(3, 5), 0.5)),
        (ops().masked_softmax_fwd, (leaf(2, 5), leaf(5), None, 1.0)),
    ]
    for op, arguments in cases:
        torch.library.opcheck(op.default, arguments, test_utils=OPCHECKS)
        leaves = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]

        def of_leaves(*given: Tensor, op: Any = op, arguments: Any = arguments) -> Tensor:
            rest = iter(given)
            result = op(*(
                next(rest) if isinstance(t, Tensor) and t.requires_grad else t for t in arguments
            ))  # fmt: skip
            return result if isinstance(result, Tensor) else result[0]

        assert torch.autograd.gradcheck(of_leaves, leaves, fast_mode=True)


@needs_triton
def test_are_sound_custom_operators(interpreted: Interpreter) -> None:
    interpreted(check_custom_operators)


# ---- where Triton does not interpret -------------------------------------------------------------

compiles = pytest.mark.skipif(kernels_run_on("cpu"), reason="Triton interprets")


@needs_triton
@compiles
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_kernel_that_cannot_be_built_is_named_and_replaced(check, monkeypatch, caplog) -> None:
    """Triton has no driver for CPU tensors here."""
    from autopar.kernels import launch

    monkeypatch.setattr(launch, "failed", {})
    for dtype in (torch.float64, torch.bfloat16):
        check(dtype)
    names = list(launch.failed)
    lines = [r.getMessage() for r in caplog.records if "cannot be built" in r.getMessage()]
    assert names and len(lines) == len(names)
    assert all(f"autopar::{name} " in line for name, line in zip(names, lines, strict=True))


@needs_triton
@compiles
@pytest.mark.parametrize("element", ["bf16", "fp64"])
def test_compile_for_a_gpu(element) -> None:
    """What the interpreter takes need not compile. Compiling needs no GPU."""
    import triton.language as tl
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from autopar.kernels import cross_entropy, gated, layer_norm, rms_norm, rotary, softmax

    acc = "fp64" if element == "fp64" else "fp32"
    shared = {"ACC": tl.float64 if acc == "fp64" else tl.float32, "BLOCK": 1024}
    wide = ("mean_ptr", "rstd_ptr", "partial_", "lse_ptr", "loss_ptr")

    def type_of(name: str) -> str:
        if not name.endswith("_ptr"):
            return "i32"
        if name == "target_ptr":
            return "*i64"
        return "*" + (acc if name.startswith(wide) else element)

    alone: dict[str, Any] = {"residual_ptr": None, "sum_ptr": None}
    no_sum: dict[str, Any] = {"grad_sum_ptr": None}
    # Triton compiles an argument that is None, or 1, as a constant.
    cases: list[tuple[Any, dict[str, Any]]] = [
        (layer_norm.forward_kernel, {"EPS": 1e-5}),
        (layer_norm.forward_kernel, {"EPS": 1e-5, **alone}),
        (layer_norm.forward_kernel, {"EPS": 1e-5, "weight_ptr": None, "bias_ptr": None, **alone}),
        (layer_norm.backward_kernel, {}),
        (layer_norm.backward_kernel, {"dx_ptr": None, "partial_db_ptr": None, **no_sum}),
        (layer_norm.backward_kernel, {"weight_ptr": None, "partial_dw_ptr": None, "rows": 1}),
        (rms_norm.forward_kernel, {"EPS": 1e-5, "ROUND": True}),
        (rms_norm.forward_kernel, {"EPS": 1e-5, "ROUND": False, "rows": 1, "width": 1, **alone}),
        (rms_norm.backward_kernel, {}),
        (rms_norm.backward_kernel, {"dx_ptr": None, **no_sum}),
        (rms_norm.backward_kernel, {"partial_dw_ptr": None}),
        *((kernel, {"KIND": kind})
          for kernel in (gated.forward_kernel, gated.backward_kernel) for kind in gated.KINDS),
        *((rotary.rotary_kernel, {"BACKWARD": way, "ROWS": 16, "HALF": 64, "x_d": 1, "out_d": 1})
          for way in (False, True)),
        (cross_entropy.forward_kernel, {}),
        (cross_entropy.backward_kernel, {}),
        (softmax.forward_kernel, {"SCALE": 0.5, "mask_a": 0, "mask_d": 1}),
        (softmax.forward_kernel, {"SCALE": 1.0, "bias_ptr": None}),
        (softmax.backward_kernel, {"SCALE": 0.5}),
        (softmax.backward_kernel, {"SCALE": 1.0, "ds_ptr": None}),
    ]  # fmt: skip
    for kernel, more in cases:
        constants = {k: v for k, v in shared.items() if k in kernel.arg_names} | more
        signature = {
            name: "constexpr" if name in constants else type_of(name) for name in kernel.arg_names
        }
        compiled = triton_compile(
            ASTSource(kernel, signature, constants),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": 4},
        )
        assert compiled.asm["cubin"]
