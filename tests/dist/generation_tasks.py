"""`generate` on engines: tokens and logits beside those of one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from autopar import auto_engine, quantize
from autopar.errors import EngineError
from tests.clusters import eager_to_shard

HOW: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
}
_CACHE = "inputs.past_key_values_tensors_*"


def language_model(family: str) -> Any:
    """A decoder in float64, whose weights are large enough that tokens vary."""
    import transformers as hf

    torch.manual_seed(0)
    common = {"vocab_size": 96, "eos_token_id": 95, "pad_token_id": 0, "initializer_range": 0.2}
    width = {"hidden_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    if family == "gpt2":
        config = hf.GPT2Config(n_layer=2, n_embd=32, n_head=4, bos_token_id=0, **common)
        return hf.GPT2LMHeadModel(config).double().eval()
    if family == "mistral":  # sees the last tokens alone
        config = hf.MistralConfig(sliding_window=6, **width, **heads, **common)
        return hf.MistralForCausalLM(config).double().eval()
    return hf.LlamaForCausalLM(hf.LlamaConfig(**width, **heads, **common)).double().eval()


def model_with_encoder(family: str) -> Any:
    """An encoder with a decoder, in float64, whose weights are large enough that tokens vary."""
    import transformers as hf

    torch.manual_seed(0)
    tokens = {"eos_token_id": 95, "pad_token_id": 0, "decoder_start_token_id": 1}
    width = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "init_std": 0.3}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    inner = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
    if family == "t5":
        config = hf.T5Config(
            vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2,
            num_heads=4, initializer_factor=3.0, **tokens,
        )  # fmt: skip
        return hf.T5ForConditionalGeneration(config).double().eval()
    if family == "bart":
        config = hf.BartConfig(
            vocab_size=96, bos_token_id=1, forced_eos_token_id=None, **width, **heads, **inner,
            **tokens,
        )  # fmt: skip
        return hf.BartForConditionalGeneration(config).double().eval()
    config = hf.WhisperConfig(
        vocab_size=96, bos_token_id=1, num_mel_bins=8, max_source_positions=20,
        max_target_positions=64, begin_suppress_tokens=None, suppress_tokens=None,
        **width, **heads, encoder_ffn_dim=64, decoder_ffn_dim=64, **tokens,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration(config).double().eval()


def encoded_requests(family: str, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Sequences of these lengths to encode, padded at the right; of audio, as many frames."""
    if family != "whisper":
        batch = requests(lengths)
        return {name: x.flip(1) for name, x in batch.items()}
    generator = torch.Generator().manual_seed(1)
    return {"input_features": torch.randn(len(lengths), 8, 40, generator=generator).double()}


def same_tokens_with_encoder(mesh: str, family: str) -> dict[str, Any]:
    """Sequences of two lengths are encoded; keys and values are split by heads, and some weights of
    the encoder."""
    alone = model_with_encoder(family)
    split = "model.encoder.layers.*.fc1.weight"
    if family == "t5":
        split = "encoder.block.*.layer.1.DenseReluDense.wi.weight"
    engine, _ = auto_engine(
        model_with_encoder(family), None, eager_to_shard(mesh),
        constraints={_CACHE: "RS0RR", split: "S0R"}, progress=False,
    )  # fmt: skip
    batch = encoded_requests(family, (5, 9))
    gaps = {}
    for name in ("greedy", "beams"):
        one = generated(alone, batch, 5, **HOW[name])
        gaps[name] = apart(one, generated(engine, batch, 5, **HOW[name]))
    choices = engine.plan.choices
    return {
        "gaps": gaps,
        "caches": {v for k, v in choices.items() if k.startswith("past_key_values_tensors")},
        "split": {
            name.split(".")[0]
            for name, p in engine.named_parameters()
            if p.to_local().numel() < p.numel()
        },
        "programs": len(engine.steps),
    }


def requests(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Prompts of these lengths, padded at the left."""
    ids = torch.randint(
        2, 94, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1)
    )
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def generated(model: Any, batch: dict[str, torch.Tensor], seed: int, **how: Any) -> Any:
    torch.manual_seed(seed)
    return model.generate(
        **batch, max_new_tokens=10, return_dict_in_generate=True, output_logits=True, **how
    )


def apart(a: Any, b: Any) -> float:
    """Of the logits of two runs; infinite where tokens differ."""
    if not torch.equal(a.sequences, b.sequences):
        return float("inf")
    return max(float((x - y).abs().max()) for x, y in zip(a.logits, b.logits, strict=True))


def same_tokens(
    mesh: str,
    family: str,
    cache: str | None,
    ways: tuple[str, ...] = tuple(HOW),
    batches: tuple[tuple[int, ...], ...] = ((7, 7, 7, 7), (3, 7, 6, 5)),
) -> dict[str, Any]:
    """Ways to choose tokens, for requests of one length and of several.

    Args:
        cache: the layout of keys and values that the plan is to have.
        batches: lengths of prompts.
    """
    alone = language_model(family)
    constraints = {} if cache is None else {_CACHE: cache}
    cluster: Any = eager_to_shard(mesh)
    longest = {}
    if cache == "RRS0R":  # long enough that nobody gathers it, over links as they are
        cluster, longest = mesh, {"max_cache_len": 16000}
    engine, _ = auto_engine(
        language_model(family), None, cluster, constraints=constraints, progress=False
    )
    gaps = {}
    for lengths in batches:
        for name in ways:
            batch = requests(lengths)
            one = generated(alone, batch, 5, **HOW[name])
            # ranks draw alike, whatever their seeds
            many = generated(engine, batch, 5 + dist.get_rank(), **longest, **HOW[name])
            gaps[name, len(set(lengths)) > 1] = apart(one, many)
    choices = engine.plan.choices
    return {
        "gaps": gaps,
        "caches": {v for k, v in choices.items() if k.startswith("past_key_values_tensors")},
        "attention": choices.get("scaled_dot_product_attention", ""),
        "programs": len(engine.steps),
        "forwards": all(step.compiled.lowered.backward is None for step in engine.steps),
        "copies": sum(
            node.target is torch.ops.aten.index_copy.default
            for step in engine.steps
            for node in step.compiled.lowered.forward.graph.nodes
        ),
    }


def prompts_of_many_lengths(mesh: str) -> dict[str, Any]:
    """Programs for further lengths come from those that there are."""
    alone = language_model("llama")
    engine, _ = auto_engine(language_model("llama"), None, eager_to_shard(mesh), progress=False)
    gaps = []
    for length in (5, 9, 6, 8, 12):
        batch = requests((length,))
        gaps.append(apart(*(generated(m, batch, 0, do_sample=False) for m in (alone, engine))))
    first = generated(engine, requests((5,)), 0, do_sample=False)
    longer = {"input_ids": torch.cat([first.sequences, first.sequences[:, :3]], 1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    again = engine.generate(**longer, past_key_values=first.past_key_values, max_new_tokens=4)
    whole = alone.generate(**longer, max_new_tokens=4)
    return {
        "gap": max(gaps), "programs": len(engine.steps), "goes on": torch.equal(again, whole),
    }  # fmt: skip


def rounded_weights(mesh: str, scheme: str, sharded: bool) -> dict[str, Any]:
    """Weights of 8 bits, rounded before or after they are sharded."""
    alone = quantize(language_model("llama"), scheme)
    model = language_model("llama")
    if not sharded:
        model = quantize(model, scheme)
    engine, _ = auto_engine(model, None, eager_to_shard(mesh), progress=False)
    batch = requests((4, 7))
    if sharded:
        generated(engine, batch, 0, do_sample=False)
        assert quantize(engine, scheme) is engine
    gap = apart(*(generated(m, batch, 0, do_sample=False) for m in (alone, engine)))
    held = sum(p.to_local().nbytes for p in engine.parameters())
    weights = {p.dtype for n, p in engine.named_parameters() if n.endswith("proj.weight")}
    return {
        "gap": gap, "dtypes": weights,
        "held": held, "predicted": engine.plan.memory.parameters_bytes,
    }  # fmt: skip


def refusals(mesh: str) -> dict[str, str]:
    """What does not run, and why."""
    import transformers as hf

    engine, _ = auto_engine(language_model("llama"), None, mesh, progress=False)
    batch = requests((4, 4))
    other: dict[str, dict[str, Any]] = {
        "a growing cache": {"past_key_values": hf.DynamicCache(config=engine.config)},
        "a quantized cache": {"cache_implementation": "quantized"},
        "an assistant": {"assistant_model": language_model("llama")},
        "first layers": {"assistant_early_exit": 1},
        "first layers, configured": {
            "generation_config": hf.GenerationConfig(assistant_early_exit=1, max_new_tokens=2)
        },
    }
    messages = {}
    for name, arguments in other.items():
        try:
            engine.generate(**{**batch, "max_new_tokens": 2, **arguments})
            messages[name] = "ran"
        except EngineError as error:
            messages[name] = str(error)
    return messages
