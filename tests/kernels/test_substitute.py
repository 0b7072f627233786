"""The pass that substitutes kernels: what it matches in models as their authors wrote them, that
results and gradients stay, and what it leaves alone."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from autopar import ColoTracer, auto_engine
from autopar.cluster.device import DEVICES
from autopar.comm import world
from autopar.errors import InfeasibleError
from autopar.kernels import kernels_run_on
from autopar.kernels.substitute import substitute_kernels
from autopar.passes.split_regions import with_shapes
from autopar.testing.kernels import Function
from autopar.testing.live_memory import LiveMemory
from tests.interpreter import Interpreter, needs_triton

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2,
    "vocab_size": 61, "max_position_embeddings": 16, "use_cache": False,
}  # fmt: skip
GPT2 = transformers.GPT2Config(
    n_embd=32, n_head=2, n_layer=2, vocab_size=61, n_positions=16, use_cache=False,
    attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
GATED = Counter(add_rms_norm_fwd=4, rms_norm_fwd=1, glu_fwd=2, rotary=4, cross_entropy_fwd=1)
# the model's configuration, and the kernels in its forward
MODELS: dict[str, tuple[Callable[[], Any], Counter[str]]] = {
    "Llama": (lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=1), GATED),
    "Mistral": (lambda: transformers.MistralConfig(**SMALL, num_key_value_heads=1), GATED),
    "Gemma": (
        lambda: transformers.GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=16), GATED
    ),
    "Phi-3": (  # gate and up are halves of one product
        lambda: transformers.Phi3Config(**SMALL, pad_token_id=0, eos_token_id=1), GATED
    ),
    "Llama, attention written out": (
        lambda: transformers.LlamaConfig(**SMALL, attn_implementation="eager"),
        GATED + Counter(masked_softmax_fwd=2),
    ),
    "GPT-2": (lambda: GPT2, Counter(add_layer_norm_fwd=4, layer_norm_fwd=1, cross_entropy_fwd=1)),
}  # fmt: skip


NAMES = [
    "SwiGLU", "GeGLU", "residual and RMSNorm", "RMSNorm", "residual and LayerNorm", "LayerNorm",
    "rotary embedding", "cross-entropy", "softmax with mask and bias",
]  # fmt: skip


def check_row(name: str) -> None:
    from autopar.kernels.table import ROWS
    from autopar.testing.kernels import roundings_off

    assert [row.name for row in ROWS] == NAMES
    row = ROWS[NAMES.index(name)]
    for shape, dtype in (
        ((6, 50), torch.float64),
        ((17, 258), torch.float32),
        ((5, 130), torch.bfloat16),
        ((5, 34), torch.float16),
    ):
        assert roundings_off(row, *shape, dtype) < 4


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_rows_match_their_samples_and_equal_float64(interpreted: Interpreter, name) -> None:
    interpreted(check_row, name)


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_rows_on_the_gpu(name) -> None:
    from autopar.kernels import launch
    from autopar.kernels.table import ROWS
    from autopar.testing.kernels import roundings_off

    row = ROWS[NAMES.index(name)]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for shape in ((300, 1000), (4096, 4096)):
            assert roundings_off(row, *shape, dtype, "cuda") < 4
    assert not launch.failed


def check_losses_of_rows() -> None:
    """As on a rank that has a part of the batch: the cast stands before a view, and rows are not
    summed yet."""
    from autopar.testing.kernels import KernelCalls, kernels_in, with_kernels

    target = torch.tensor([3, -100, 0, 5, 1, 6])

    def losses(logits: Tensor, target: Tensor) -> Tensor:
        rows = logits.float().flatten(0, -2)
        return F.cross_entropy(rows, target, ignore_index=-100, reduction="none")

    logits = torch.randn(2, 3, 7, dtype=torch.float16).requires_grad_()
    gm = with_kernels(losses, [logits, target])
    assert kernels_in(gm) == ["cross_entropy_fwd"]
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten._to_copy.default)
    with KernelCalls() as calls:
        (actual,) = gm(logits, target)
        seed = torch.randn_like(actual)
        (gradient,) = torch.autograd.grad(actual, logits, seed)
    assert calls.names == ["cross_entropy_fwd", "cross_entropy_bwd"]
    expected = losses(logits, target)
    assert_close(actual, expected)
    assert_close(gradient, torch.autograd.grad(expected, logits, seed)[0])


@needs_triton
def test_a_cast_before_a_view_is_the_kernels(interpreted: Interpreter) -> None:
    interpreted(check_losses_of_rows)


def check_where_a_residual_is_added() -> None:
    """The norm's kernel adds the residual where its weight is known by then, and no schedule wants
    to recompute the norm alone; the sum goes to all who read it."""
    from autopar.testing.kernels import kernels_in, with_kernels

    def stream(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        total = x + residual
        doubled = total * 2  # before the norm
        return F.layer_norm(total, (6,), weight) + doubled + total.sin()

    def weight_of_the_sum(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        total = x + residual
        return F.layer_norm(total, (6,), weight * (total * 2).mean())

    def norm_alone(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return F.layer_norm(x + residual, (6,), weight)

    def broadcast(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return F.layer_norm(x + residual[:1], (6,), weight)

    for run, name in (
        (stream, "add_layer_norm_fwd"), (weight_of_the_sum, "layer_norm_fwd"),
        (norm_alone, "add_layer_norm_fwd"), (broadcast, "layer_norm_fwd"),
    ):  # fmt: skip
        operands = _leaves((4, 6), (4, 6), (6,))
        gm = with_kernels(run, operands)
        assert kernels_in(gm) == [name]
        (actual,), expected = gm(*operands), run(*operands)
        seed = torch.randn_like(expected)
        assert_close(actual, expected)
        pairs = (torch.autograd.grad(result, operands, seed) for result in (actual, expected))
        for a, b in zip(*pairs, strict=True):
            assert_close(a, b)
    graph = ColoTracer().trace(Function(stream), tuple(operands))
    gm = with_shapes(graph.gm, [n.meta["val"] for n in graph.placeholders.values()])
    slow = replace(DEVICES["cpu"], bandwidth=1.0, launch_us=0.0)
    assert kernels_in(substitute_kernels(gm, device=slow, scheduled=True)) == ["layer_norm_fwd"]


@needs_triton
def test_residuals_are_added_where_that_can_be(interpreted: Interpreter) -> None:
    interpreted(check_where_a_residual_is_added)


def built(name: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = MODELS[name][0]()
    for option, value in options.items():
        setattr(config, option, value)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype)


def tokens() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 61, (2, 8))
    return {"input_ids": ids, "labels": ids}


def step(run: Callable[..., Any], model: nn.Module) -> list[Tensor]:
    """The loss, and the gradients of all parameters."""
    loss = run(**tokens()).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def distance(values: list[Tensor], exact: list[Tensor]) -> float:
    """The relative errors of the values, each by its norm, added up."""
    return sum(float((a.float() - b).norm() / b.norm()) for a, b in zip(values, exact, strict=True))


def check_model(name: str, dtype: torch.dtype, expected: Counter[str]) -> None:
    from autopar.testing.kernels import kernels_in, with_kernels_in_model

    model = built(name, dtype)
    graph = with_kernels_in_model(model, tokens())
    assert Counter(kernels_in(graph.gm)) == expected
    actual, eager = step(graph.bind(model), model), step(model, model)
    if dtype == torch.float32:
        for a, b in zip(actual, eager, strict=True):
            assert_close(a, b, rtol=0, atol=float(b.abs().max()) * 3e-6)
        return
    # Roundings of a whole model add up: kernels, which round less often, are not farther off. This
    # is float16, as the interpreter truncates to bfloat16 where GPUs round.
    exact = step(wide := model.to(torch.float32), wide)
    assert distance(actual, exact) < 1.1 * distance(eager, exact)


@needs_triton
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in MODELS),
        *((name, torch.float16) for name in ("Llama", "Gemma", "GPT-2")),
    ],
    ids=str,
)
def test_models_as_written(interpreted: Interpreter, name, dtype) -> None:
    interpreted(check_model, name, dtype, MODELS[name][1])


def check_engine(name: str) -> None:
    """In the smallest budget gradients stay, and the peak is the predicted one: the schedule knows
    what the kernels keep."""
    from autopar.kernels import launch

    expected = step(model := built(name, torch.float32, num_hidden_layers=1), model)

    def run(memory: float) -> list[Tensor]:
        world.stop()
        trained = built(name, torch.float32, num_hidden_layers=1)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        engine, _ = auto_engine(trained, optimizer, "1", memory=memory)
        loss = engine(**tokens()).loss
        loss.backward()
        actual = [loss.detach(), *(p.grad.to_local().clone() for p in engine.parameters())]
        del loss
        engine.zero_grad()
        data = tokens()
        # the interpreter keeps operands alive, so ATen runs in the place of the kernels
        with mock.patch.dict(launch.failed, dict.fromkeys(launch.names, "")), LiveMemory() as live:
            engine(**data).loss.backward()
        assert live.peak == pytest.approx(engine.memory_plan.peak_bytes, rel=0.01)
        return actual

    with pytest.raises(InfeasibleError) as error:
        run(1000)
    actual = run(1.001 * error.value.smallest_bytes)
    world.stop()
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, rtol=0, atol=float(b.abs().max()) * 3e-6)


@needs_triton
def test_engine_in_the_smallest_budget(interpreted: Interpreter) -> None:
    interpreted(check_engine, "Llama")


# ---- what is left alone --------------------------------------------------------------------------


def _double_use(gate: Tensor, up: Tensor) -> Tensor:
    activated = F.silu(gate)
    return activated * up + activated


def _angles_with_gradients(x: Tensor, cos: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[..., 3:], x[..., :3]), -1) * cos


def _double_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)  # narrower, in truth
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


LEFT: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "a value that another operator reads": (_double_use, [(4, 6), (4, 6)]),
    "a broadcast operand": (lambda gate, up: F.silu(gate) * up, [(4, 6), (6,)]),
    "angles with gradients": (_angles_with_gradients, [(4, 6), (4, 6)]),
    "a norm in less than the dtype": (_double_norm, [(4, 6), (6,)]),
    "a norm over two dims": (lambda x: F.layer_norm(x, x.shape[-2:]), [(2, 4, 6)]),
    "a norm over another dim": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6)), [(6, 6), (6,)]
    ),
    "wide rows": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        [(1, 8193), (8193,)],
    ),
    "smoothed labels": (
        lambda x: F.cross_entropy(x, torch.zeros(4, dtype=torch.int64), label_smoothing=0.1),
        [(4, 6)],
    ),
    "a softmax over another dim": (lambda x, mask: (x + mask).softmax(0), [(4, 6), (6,)]),
}  # fmt: skip


def check_left_alone(name: str) -> None:
    from autopar.testing.kernels import kernels_in, with_kernels

    run, shapes = LEFT[name]
    operands = _leaves(*shapes)
    gm = with_kernels(run, operands)
    assert not kernels_in(gm)
    assert torch.equal(gm(*operands)[0], run(*operands))


@needs_triton
@pytest.mark.parametrize("name", list(LEFT))
def test_leaves_alone(interpreted: Interpreter, name) -> None:
    interpreted(check_left_alone, name)


# ---- where Triton does not interpret -------------------------------------------------------------


@needs_triton
@pytest.mark.skipif(kernels_run_on("cpu"), reason="Triton interprets")
@pytest.mark.parametrize(
    ("device", "rows", "width", "count"),
    [("H200", 8192, 4096, 1), ("L4", 8192, 4096, 1), ("H200", 16, 64, 0), ("cpu", 8192, 4096, 0)],
)  # fmt: skip
def test_the_cost_model_decides(device, rows, width, count) -> None:
    """On fake tensors, as there may be no GPU; a forward alone, for torch without CUDA
    differentiates nothing there. On CPUs no kernel runs."""
    from autopar.kernels.table import ROWS
    from autopar.testing.kernels import kernels_in

    (row,) = [row for row in ROWS if row.name == "RMSNorm"]
    small = row.sample.operands(2, 4, torch.bfloat16)
    graph = ColoTracer().trace(Function(row.sample.run), tuple(small))
    with FakeTensorMode():
        operands = [
            torch.empty(shape, dtype=torch.bfloat16, device=DEVICES[device.lower()].kind)
            for shape in ((rows, width), (width,))
        ]
        gm = with_shapes(graph.gm, operands)
    assert len(kernels_in(substitute_kernels(gm, device=DEVICES[device.lower()]))) == count


def test_without_triton_nothing_changes() -> None:
    program = """
import sys
sys.modules["triton"] = None  # importing it now raises ImportError
from torch import fx, nn
from autopar.cluster.device import DEVICES
from autopar.kernels import kernels_run_on, triton_available
from autopar.kernels.substitute import substitute_kernels
assert not triton_available()
assert not kernels_run_on("cuda")
gm = fx.symbolic_trace(nn.LayerNorm(4))
assert substitute_kernels(gm, device=DEVICES["h200"]) is gm
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
