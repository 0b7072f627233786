"""The pass that substitutes kernels: what it matches in models as their authors wrote them, that
results and gradients stay, and what it leaves alone."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

from tests.interpreter import Interpreter, needs_triton

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2,
    "vocab_size": 61, "max_position_embeddings": 16, "use_cache": False,
}  # fmt: skip
GPT2 = transformers.GPT2Config(
    n_embd=32, n_head=2, n_layer=2, vocab_size=61, n_positions=16, use_cache=False,
    attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
GATED = Counter(rms_norm_fwd=5, glu_fwd=2, rotary=4, cross_entropy_fwd=1)
# the model's configuration, and the kernels in its forward
MODELS: dict[str, tuple[Callable[[], Any], Counter[str]]] = {
    "Llama": (lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=1), GATED),
    "Mistral": (lambda: transformers.MistralConfig(**SMALL, num_key_value_heads=1), GATED),
    "Gemma": (
        lambda: transformers.GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=16), GATED
    ),
    "GPT-2": (lambda: GPT2, Counter(layer_norm_fwd=5, cross_entropy_fwd=1)),
}  # fmt: skip


def check_row(name: str) -> None:
    from autopar.kernels.table import ROWS
    from autopar.testing.kernels import roundings_off

    (row,) = [row for row in ROWS if row.name == name]
    for shape, dtype in (
        ((6, 50), torch.float64),
        ((17, 258), torch.float32),
        ((5, 130), torch.bfloat16),
        ((5, 34), torch.float16),
    ):
        assert roundings_off(row, *shape, dtype) < 8


@needs_triton
@pytest.mark.parametrize(
    "name",
    ["SwiGLU", "GeGLU", "RMSNorm", "LayerNorm", "rotary embedding", "cross-entropy",
     "softmax with mask and bias"],
)  # fmt: skip
def test_rows_match_their_samples_and_equal_float64(interpreted: Interpreter, name) -> None:
    interpreted(check_row, name)


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


def check_model(name: str, dtype: torch.dtype, expected: Counter[str]) -> None:
    from autopar.testing.kernels import kernels_in, with_kernels_in_model

    model = built(name, dtype)
    graph = with_kernels_in_model(model, tokens())
    assert Counter(kernels_in(graph.gm)) == expected
    low = dtype == torch.bfloat16
    for a, b in zip(step(graph.bind(model), model), step(model, model), strict=True):
        assert_close(a, b, rtol=0, atol=float(b.abs().max()) * (4e-2 if low else 3e-6))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(MODELS))
def test_models_as_written(interpreted: Interpreter, name, dtype) -> None:
    interpreted(check_model, name, dtype, MODELS[name][1])
