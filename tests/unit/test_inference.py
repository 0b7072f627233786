"""Forwards are planned as such; weights of 8 bits keep what a model has learned."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from autopar import ClusterInfo, auto_engine, autoplan, quantize
from autopar.operators.quantized_linear import (
    GROUP,
    float8_linear,
    int4_linear,
    int4_packed,
    int8_linear,
    int8_mm,
)
from autopar.quantization import SCHEMES


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 8)).double().eval()


def test_a_call_without_gradients_is_planned_as_a_forward():
    model, x = mlp(), torch.randn(32, 16, dtype=torch.float64)
    engine, _ = auto_engine(copy.deepcopy(model), None, "1", progress=False)
    with torch.no_grad():
        assert torch.equal(engine(x), model(x))
    memory = engine.plan.memory
    assert memory.gradients_bytes == memory.optimizer_bytes == memory.activations_bytes == 0
    assert engine.steps[0].compiled.lowered.backward is None
    # and trains all the same
    optimizer = torch.optim.SGD(engine.parameters(), lr=0.1)
    alone = torch.optim.SGD(model.parameters(), lr=0.1)
    for m, o in ((engine, optimizer), (model, alone)):
        m(x).square().mean().backward()
        o.step()
        o.zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(engine(x), model(x), rtol=1e-12, atol=1e-12)
    assert [step.compiled.lowered.backward is None for step in engine.steps] == [True, False]


def test_a_forward_holds_less_where_that_costs_little():
    """Of one row, copies of the weights are a little faster than a sum over ranks."""
    model = nn.Sequential(nn.Linear(1024, 2048), nn.GELU(), nn.Linear(2048, 256))
    x = (torch.zeros(1, 1024),)
    plans = {
        memory: autoplan(model, x, cluster=ClusterInfo.of("2", "cpu"), forward=True, memory=memory)
        for memory in (None, 1.0)
    }
    weighed, fastest = (plans[memory].plan for memory in (None, 1.0))
    less = 1 - weighed.memory.parameters_bytes / fastest.memory.parameters_bytes
    longer = weighed.time.step_us / fastest.time.step_us - 1
    assert 0 < longer < less
    assert weighed.solver.bound_us == pytest.approx(fastest.time.step_us, rel=1e-3)


@pytest.mark.parametrize(("evaluates", "backwards"), [(True, [False]), (False, [True])])
def test_examples_are_planned_for_the_mode_of_the_model(evaluates, backwards):
    model = mlp().train(not evaluates)
    example = {"input": torch.zeros(32, 16, dtype=torch.float64)}
    engine, _ = auto_engine(model, None, "1", example_inputs=example, progress=False)
    found = [step.compiled.lowered.backward is not None for step in engine.steps]
    assert found == backwards


def test_a_server_says_what_to_install(monkeypatch):
    from autopar.cli import app, serve_command

    monkeypatch.setattr(serve_command, "find_spec", lambda name: None if name == "openai" else True)
    result = CliRunner().invoke(app.app, ["serve", "folder"])
    assert result.exit_code == 2
    assert "the server needs openai: pip install autopar[serve]" in result.output


def test_a_model_without_generate_says_so():
    engine, _ = auto_engine(mlp(), None, "1", progress=False)
    assert not hasattr(engine, "generate")
    with pytest.raises(AttributeError, match=r"GenerationMixin.* call the engine for each token"):
        engine.generate(torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1500), (2, 1536), (40, 1500)])
def test_products_with_8_bits(rows, width, dtype):
    generator = torch.Generator().manual_seed(0)
    # more than one block of the weight
    weight = torch.randint(-127, 128, (300, width), generator=generator).to(torch.int8)
    x = torch.randn(2, rows, width, generator=generator).to(dtype)
    scale = (torch.rand(300, generator=generator) / 100).to(dtype)
    want = F.linear(x.double(), weight.double() * scale.double()[:, None])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        int8_linear(x, weight, scale).double(),
        want,
        rtol=4 * eps,
        atol=8 * eps * float(want.abs().max()),
    )
    whole = torch.randint(-127, 128, (2, rows, width), generator=generator).to(torch.int8)
    assert torch.equal(int8_mm(whole, weight), (whole.long() @ weight.long().T).int())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 40])
def test_products_with_4_bits_and_floats_of_8(rows, dtype):
    generator = torch.Generator().manual_seed(0)
    groups = 47  # more than one block of the weight
    x = torch.randn(2, rows, groups * GROUP, generator=generator).to(dtype)
    levels = torch.randint(0, 16, (300, groups, GROUP), generator=generator)
    scale = (torch.rand(300, groups, generator=generator) / 100).to(dtype)
    weight = ((levels - 8) * scale.double()[..., None]).flatten(1)
    packed = int4_packed(levels.to(torch.uint8))
    assert packed.nbytes == weight.numel() // 2
    grouped = x.unflatten(-1, (groups, GROUP)).requires_grad_()
    got = int4_linear(grouped, packed, scale)
    numbers = torch.randn(300, groups * GROUP, generator=generator).to(torch.float8_e4m3fn)
    floats = float8_linear(x, numbers.view(torch.uint8), scale[:, 0].contiguous())
    scaled = numbers.double() * scale[:, :1].double()
    eps = torch.finfo(dtype).eps
    for out, exact in ((got, weight), (floats, scaled)):
        want = F.linear(x.double(), exact)
        most = 16 * eps * float(want.abs().max())
        torch.testing.assert_close(out.double(), want, rtol=4 * eps, atol=most)
    got.sum().backward()
    slope = weight.sum(0).to(dtype).expand(2, rows, -1)
    torch.testing.assert_close(
        grouped.grad.flatten(-2), slope, rtol=0, atol=32 * eps * float(slope.abs().max())
    )


def trained_language_model():
    """A small Llama that has learned sequences of a constant step."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=48, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        ids = sequences(32)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


def sequences(count):
    start, step = torch.randint(0, 48, (count, 1)), torch.randint(1, 5, (count, 1))
    noise = (torch.rand(count, 24) < 0.1) * torch.randint(0, 48, (count, 24))
    return (start + step * torch.arange(24) + noise) % 48


def test_perplexity_is_within_a_percent_with_8_bits_and_within_5_with_4():
    model = trained_language_model()
    ids = sequences(256)

    def perplexity(m):
        with torch.no_grad():
            return float(m(input_ids=ids, labels=ids).loss.exp())

    before = perplexity(model)
    assert before < 30  # of 48 by chance
    for scheme in ("int8", "int8-dynamic", "float8", "int4"):
        rounded = quantize(copy.deepcopy(model), scheme)
        after = perplexity(rounded)
        assert after == pytest.approx(before, rel=0.05 if scheme == "int4" else 0.01)
        assert after != before
        engine, _ = auto_engine(rounded, None, "1", progress=False)
        assert perplexity(engine) == pytest.approx(after, rel=1e-5)


def test_layers_that_stay_as_they_are():
    import transformers as hf

    model = hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=40))
    quantize(model, skip=["*.c_proj"])
    kinds = {
        n: type(m).__name__
        for n, m in model.named_modules()
        if n.endswith(("head", "c_fc", "c_proj"))
    }
    assert kinds == {
        "lm_head": "Linear",  # tied to the embedding
        "transformer.h.0.mlp.c_fc": "QuantizedLinear",
        "transformer.h.0.mlp.c_proj": "Conv1D",
        "transformer.h.0.attn.c_proj": "Conv1D",
    }
    with pytest.raises(ValueError, match=r"scheme must be one of .*'int4'.*, got 'int2'"):
        quantize(model, "int2")
    with pytest.raises(ValueError, match=r"^0 has 48 inputs and int4 rounds groups of 32 of them"):
        quantize(nn.Sequential(nn.Linear(48, 8)), "int4")
    with pytest.raises(
        ValueError, match=r"skip= names \['head'\], and linear layers are \['lm_head'"
    ):
        quantize(model, skip=["head"])
    with pytest.raises(ValueError, match="ReLU has no linear layer"):
        quantize(nn.ReLU())
    with pytest.raises(RuntimeError, match=r"0\.weight has no values to round yet"):
        with torch.device("meta"):
            empty = nn.Sequential(nn.Linear(4, 4))
        quantize(empty)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_models_on_the_meta_device_are_rounded_for_their_plan(scheme):
    torch.manual_seed(0)

    def build() -> nn.Module:
        return quantize(nn.Sequential(nn.Linear(64, 32), nn.GELU()), scheme).requires_grad_(False)

    real, x = build(), torch.randn(4, 64)
    with torch.device("meta"):
        empty = build()
    planned = autoplan(empty, (x.to("meta"),), cluster="2", forward=True).plan
    assert planned.fingerprint == autoplan(real, (x,), cluster="2", forward=True).plan.fingerprint


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_pass_through_rounded_layers(scheme):
    """And inputs that are rounded: as if they were not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    x = torch.randn(5, 64, requires_grad=True)
    (want,) = torch.autograd.grad(model(x).square().sum(), x)
    out = quantize(model, scheme)(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), out, rtol=1e-5, atol=1e-6)
    (got,) = torch.autograd.grad(out.square().sum(), x)
    assert (got - want).norm() < {"int4": 0.2, "float8": 0.06}.get(scheme, 0.03) * want.norm()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [1e-2, 1e-5])
def test_float16_has_scales_of_float32(scheme, size):
    """Those of small weights are below its range, sums of what is not scaled above it."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(512, 4, bias=False))
    with torch.no_grad():
        layer[0].weight.normal_(std=size)
    x = 50 * torch.randn(3, 512)
    want = layer.half()(x.half()).float()
    assert want.isfinite().all()
    got = quantize(layer, scheme)(x.half()).float()
    assert layer[0].scale.dtype == torch.float32
    assert (got - want).norm() < {"int4": 0.2, "float8": 0.06}.get(scheme, 0.03) * want.norm()


def test_what_cannot_be_quantized_says_why():
    shared = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    shared[1].weight = shared[0].weight
    done = quantize(nn.Sequential(nn.Linear(8, 8)))
    for model, message in (
        (nn.Linear(8, 8), r"give nn\.Sequential\(layer\)"),
        (done, "is quantized already"),
        (shared, "share their weights"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(model)
