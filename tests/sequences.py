"""Models with attention of every kind, in float64, and training them over a split sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from tests.models import OPTIMIZERS

_SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 4, "use_cache": False, "attn_implementation": "sdpa",
}  # fmt: skip
TOKENS, BATCH = 20, 2


class Text(nn.Module):
    """A decoder of transformers, with the loss in the model's precision."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        import transformers

        sizes = {k: v for k, v in _SIZES.items() if kind != "GPT2" or "num" not in k}
        config = getattr(transformers, f"{kind}Config")(**{**sizes, **options})
        self.lm = transformers.AutoModelForCausalLM.from_config(config)

    def forward(self, input_ids, labels, attention_mask=None):
        logits = self.lm(input_ids=input_ids, attention_mask=attention_mask).logits
        # torch's shift: the loss of a token is that of the next
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Bert(nn.Module):
    """An encoder whose batch is padded."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        sizes = {k: v for k, v in _SIZES.items() if k != "use_cache"}
        config = transformers.BertConfig(
            **sizes, max_position_embeddings=TOKENS, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.lm = transformers.BertForMaskedLM(config)

    def forward(self, input_ids, attention_mask, labels):
        logits = self.lm(input_ids=input_ids, attention_mask=attention_mask).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Whisper(nn.Module):
    """Self-attention, causal and not, and attention from one sequence to another."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        config = transformers.WhisperConfig(
            vocab_size=61, num_mel_bins=4, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=24,
            decoder_ffn_dim=24, max_source_positions=16, max_target_positions=TOKENS,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            use_cache=False, dropout=0.0, attn_implementation="sdpa",
        )  # fmt: skip
        self.lm = transformers.WhisperForConditionalGeneration(config)

    def forward(self, input_features, decoder_input_ids, labels):
        logits = self.lm(input_features=input_features, decoder_input_ids=decoder_input_ids).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Vit(nn.Module):
    """17 tokens, which no mesh divides."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        config = transformers.ViTConfig(
            image_size=32, patch_size=8, num_hidden_layers=1, hidden_size=16,
            num_attention_heads=4, intermediate_size=24, num_labels=5, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, attn_implementation="sdpa",
        )  # fmt: skip
        self.vit = transformers.ViTForImageClassification(config)

    def forward(self, pixel_values, labels):
        return F.cross_entropy(self.vit(pixel_values=pixel_values).logits, labels)


class Masked(nn.Module):
    """Attention with a mask that is trained (relative positions), and one head for the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 16)
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 8)
        self.bias = nn.Parameter(torch.randn(4, TOKENS, TOKENS) / 3)
        self.head = nn.Linear(16, 61)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        q = self.query(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.key(x).unflatten(-1, (2, 1, 4)).unbind(-3)
        h = F.scaled_dot_product_attention(
            q, k.transpose(1, 2), v.transpose(1, 2), self.bias, enable_gqa=True
        )
        logits = self.head(x + h.transpose(1, 2).flatten(-2))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Packed(nn.Module):
    """Documents in one row: a token sees those before it of its document.

    Args:
        given: the batch holds the mask, not the numbers of documents.
        window: how many tokens before it a token sees at most; None for all.
    """

    def __init__(self, given: bool = False, window: int | None = None) -> None:
        super().__init__()
        self.given, self.window = given, window
        self.embed, self.head = nn.Embedding(61, 16), nn.Linear(16, 61)
        self.query, self.key, self.value = (nn.Linear(16, n) for n in (16, 8, 8))

    def forward(self, input_ids, documents, labels):
        x = self.embed(input_ids)
        q, k, v = (
            f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        mask = documents if self.given else self._mask(documents)[:, None]
        h = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        logits = self.head(x + h.transpose(1, 2).flatten(-2))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def _mask(self, documents: torch.Tensor) -> torch.Tensor:
        place = torch.arange(documents.shape[1], device=documents.device)
        mask = (documents[:, :, None] == documents[:, None, :]) & (place <= place[:, None])
        return mask if self.window is None else mask & (place > place[:, None] - self.window)


def _tokens(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7 * step + 1)
    ids = torch.randint(3, 61, (BATCH, TOKENS), generator=generator)
    return {"input_ids": ids, "labels": ids.roll(1, 1)}


def _seven(step: int) -> dict[str, torch.Tensor]:
    return {name: x[:, :7] for name, x in _tokens(step).items()}


def _padded(step: int) -> dict[str, torch.Tensor]:
    batch = _tokens(step)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    mask[0, TOKENS - 3 - step :] = 0
    return {**batch, "attention_mask": mask}


def _documents(step: int) -> dict[str, torch.Tensor]:
    begins = torch.zeros(BATCH, TOKENS, dtype=torch.int64)
    begins[0, [4 + step, 11]] = 1
    begins[1, 7] = 1
    ids, labels = _tokens(step).values()
    return {"input_ids": ids, "documents": begins.cumsum(1), "labels": labels}


def _block_diagonal(step: int) -> dict[str, torch.Tensor]:
    """Each document sees itself, causally; the last token sees none, as padding does."""
    batch = _documents(step)
    same = batch["documents"][:, :, None] == batch["documents"][:, None, :]
    mask = same.tril()[:, None]
    mask[:, :, -1] = False
    return {**batch, "documents": mask}


def _spoken(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7 * step + 1)
    batch = _tokens(step)
    features = torch.randn(BATCH, 4, 32, generator=generator, dtype=torch.float64)
    return {
        "input_features": features,
        "decoder_input_ids": batch["input_ids"],
        "labels": batch["labels"],
    }


def _seen(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7 * step + 1)
    pixels = torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.randint(5, (BATCH,), generator=generator)}


@dataclass(frozen=True)
class Case:
    """A model and its batches.

    Args:
        tolerance: 1e-9; more where the model computes some values in float32 whatever its type.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, torch.Tensor]] = _tokens
    tolerance: float = 1e-9

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().double()


def _llama() -> nn.Module:
    return Text("Llama", num_key_value_heads=2)


def _mistral() -> nn.Module:
    return Text("Mistral", num_key_value_heads=2, sliding_window=6)


def _gemma() -> nn.Module:
    return Text(
        "Gemma2", num_key_value_heads=2, head_dim=4, sliding_window=6,
        attn_implementation="eager",
    )  # fmt: skip


def _gpt2(layers: int = 1) -> nn.Module:
    return Text("GPT2", n_embd=16, n_layer=layers, n_head=4, n_positions=TOKENS, resid_pdrop=0.0,
                embd_pdrop=0.0, bos_token_id=None, eos_token_id=None, attn_pdrop=0.0)  # fmt: skip


CASES = {
    "gpt2": Case(_gpt2),
    "seven tokens": Case(_gpt2, _seven),
    "two blocks": Case(lambda: _gpt2(2)),
    "llama": Case(_llama, tolerance=1e-6),
    "mistral": Case(_mistral, tolerance=1e-6),
    "gemma": Case(_gemma, tolerance=1e-6),
    "bert": Case(Bert, _padded),
    "whisper": Case(Whisper, _spoken),
    "masked": Case(Masked),
    "padded": Case(_llama, _padded, tolerance=1e-6),
    "padded window": Case(_mistral, _padded, tolerance=1e-6),
    "documents": Case(Packed, _documents),
    "documents in a window": Case(lambda: Packed(window=5), _documents),
    "block diagonal": Case(lambda: Packed(given=True), _block_diagonal),
    "vit": Case(Vit, _seen),
}


def train(model: nn.Module, optimizer: Any, case: Case, steps: int) -> list[float]:
    """Losses of some steps."""
    losses = []
    for step in range(steps):
        loss = model(**case.batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def error(
    name: str, mesh: str, constraints: dict[str, str] | str, steps: int = 3, overlaps: bool = False
) -> float:
    """Largest difference from single-device training of losses and parameters.

    Args:
        overlaps: plan for devices that communicate beside compute.
    """
    from autopar import auto_engine
    from tests.clusters import eager_to_shard

    case = CASES[name]
    alone, model = case.build(), case.build()
    optimizers = [OPTIMIZERS["adamw"](list(m.parameters())) for m in (alone, model)]
    engine, optimizer = auto_engine(
        model, optimizers[1], eager_to_shard(mesh, overlaps=overlaps), constraints=constraints
    )
    expected = train(alone, optimizers[0], case, steps)
    losses = train(engine, optimizer, case, steps)
    worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    whole = dict(alone.named_parameters())
    for n, p in engine.named_parameters():
        value = p.full_tensor() if isinstance(p, DTensor) else p
        worst = max(worst, (value - whole[n]).abs().max().item())
    return worst
