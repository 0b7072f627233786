"""The Hugging Face families that autopar promises to capture, one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.zoo import assignment, inputs
from tests.zoo.family import Batch, Family
from tests.zoo.shrink import shrunk


@dataclass(frozen=True)
class ModelType:
    """A model type of transformers.

    Args:
        name: model type.
        head: class of the model with its loss.
        draw: its batch.
        label: in reports; the model type if None.
        not_replayed: as in `Family`.
        experts: how a mixture of experts computes; the library's choice if None.
        dtype: of the weights.
    """

    name: str
    head: str
    draw: Callable[[nn.Module, torch.Generator], Batch]
    label: str | None = None
    not_replayed: str | None = None
    experts: str | None = None
    dtype: torch.dtype = torch.float64

    def make(self) -> nn.Module:
        import transformers

        head = getattr(transformers, self.head)
        assignment.install(head.__module__)
        settings = {"num_labels": inputs.LABELS} | OVERRIDES.get(self.name, {})
        model = head(shrunk(head.config_class(), settings))
        if self.experts is not None:
            model.set_experts_implementation(self.experts)
        return model

    def family(self, kind: str) -> Family:
        name = self.label or self.name
        return Family(name, "hf", kind, self.make, self.draw, self.dtype, self.not_replayed)


# what `shrunk` should not choose: windows shorter than the batch, every kind of layer and term
OVERRIDES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"sliding_window": 4},
    "mixtral": {"output_router_logits": True},
    "gemma2": {"sliding_window": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gptj": {"rotary_dim": 4},
    "deepseek_v3": {"n_routed_experts": 8, "n_group": 2, "topk_group": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8},
    "deberta_v2": {
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8, "share_att_key": True,
    },
    "longformer": {"attention_window": [4, 4]},
    "t5": {"decoder_start_token_id": 0},
    "whisper": {"max_source_positions": 16},
    "vit": {"patch_size": 8},
    "swin": {
        "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 2,
    },
    "convnext": {"depths": [1, 1, 2, 1], "hidden_sizes": [16, 24, 32, 48]},
    "segformer": {
        "depths": [1, 1, 2, 1], "hidden_sizes": [16, 24, 32, 48],
        "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 32,
    },
    "detr": {
        "num_queries": 6,
        "backbone_config": {
            "embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1],
        },
    },
    "clip": {"vision_config": {"patch_size": 8}},
    "wav2vec2": {
        "conv_dim": [16, 16, 16], "conv_stride": [5, 4, 4], "conv_kernel": [10, 5, 5],
        "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
    },
}  # fmt: skip

_SINGLE = torch.float32
_SPECAUGMENT = "SpecAugment draws its spans from NumPy"

DECODERS = (
    ModelType("gpt2", "GPT2LMHeadModel", inputs.text),
    ModelType("gpt2", "GPT2LMHeadModel", inputs.masked_text, "gpt2 padded"),
    ModelType("llama", "LlamaForCausalLM", inputs.text),
    ModelType("llama", "LlamaForCausalLM", inputs.masked_text, "llama padded"),
    ModelType("mistral", "MistralForCausalLM", inputs.text),
    # the experts' grouped products, which are the library's choice, do without float64
    ModelType("mixtral", "MixtralForCausalLM", inputs.text, experts="eager"),
    ModelType(
        "mixtral", "MixtralForCausalLM", inputs.text, "mixtral batched", experts="batched_mm"
    ),
    ModelType("mixtral", "MixtralForCausalLM", inputs.text, "mixtral grouped", dtype=_SINGLE),
    ModelType("qwen2", "Qwen2ForCausalLM", inputs.text),
    ModelType("qwen3", "Qwen3ForCausalLM", inputs.text),
    ModelType("gemma2", "Gemma2ForCausalLM", inputs.text),
    ModelType("phi3", "Phi3ForCausalLM", inputs.text),
    ModelType("opt", "OPTForCausalLM", inputs.text),
    ModelType("bloom", "BloomForCausalLM", inputs.text),
    ModelType("falcon", "FalconForCausalLM", inputs.text),
    ModelType("gpt_neo", "GPTNeoForCausalLM", inputs.text),
    ModelType("gptj", "GPTJForCausalLM", inputs.text),
    ModelType("starcoder2", "Starcoder2ForCausalLM", inputs.text),
    ModelType("olmo2", "Olmo2ForCausalLM", inputs.text),
    ModelType("deepseek_v3", "DeepseekV3ForCausalLM", inputs.text, experts="eager"),
    ModelType(
        "deepseek_v3", "DeepseekV3ForCausalLM", inputs.text, "deepseek_v3 grouped", dtype=_SINGLE
    ),
    ModelType("mamba2", "Mamba2ForCausalLM", inputs.text),
    ModelType("rwkv", "RwkvForCausalLM", inputs.text),
)

ENCODERS = (
    ModelType("bert", "BertForMaskedLM", inputs.masked_text),
    ModelType("distilbert", "DistilBertForMaskedLM", inputs.masked_text),
    ModelType("albert", "AlbertForSequenceClassification", inputs.classified_text),
    ModelType("deberta_v2", "DebertaV2ForMaskedLM", inputs.masked_text),
    ModelType("xlm_roberta", "XLMRobertaForSequenceClassification", inputs.classified_text),
    ModelType("longformer", "LongformerForMaskedLM", inputs.masked_text),
    ModelType(
        "longformer",
        "LongformerForSequenceClassification",
        inputs.classified_text,
        "longformer global",
    ),
)

ENCODER_DECODERS = (
    ModelType("t5", "T5ForConditionalGeneration", inputs.translated_text),
    ModelType("bart", "BartForConditionalGeneration", inputs.translated_text),
    ModelType("pegasus", "PegasusForConditionalGeneration", inputs.translated_text),
    ModelType("whisper", "WhisperForConditionalGeneration", inputs.transcribed_features),
)

VISION_AND_SPEECH = (
    ModelType("vit", "ViTForImageClassification", inputs.classified_image),
    ModelType("swin", "SwinForImageClassification", inputs.classified_image),
    ModelType("convnext", "ConvNextForImageClassification", inputs.classified_image),
    ModelType("segformer", "SegformerForSemanticSegmentation", inputs.segmented_image),
    # its sine positions are float32, whatever the weights
    ModelType("detr", "DetrForObjectDetection", inputs.detected_image, dtype=_SINGLE),
    ModelType("clip", "CLIPModel", inputs.captioned_image),
    ModelType("wav2vec2", "Wav2Vec2ForCTC", inputs.waveform, not_replayed=_SPECAUGMENT),
)

_KINDS = {
    "decoder": DECODERS,
    "encoder": ENCODERS,
    "encoder-decoder": ENCODER_DECODERS,
    "vision, speech": VISION_AND_SPEECH,
}
ROWS = tuple(row for rows in _KINDS.values() for row in rows)
FAMILIES = tuple(row.family(kind) for kind, rows in _KINDS.items() for row in rows)
