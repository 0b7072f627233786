"""Tiny configurations of Hugging Face models, by the names that their fields have in common.

A configuration is built again from its class with small numbers, rather than changed in place, so
that what the library derives (layer types, head sizes, stages) fits them. Where a model has several
types of layer, one layer of each remains.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

Rule = int | Callable[[Any, Any], Any]

WIDTH, HEADS, HEAD, VOCABULARY, LENGTH = 32, 4, 8, 96, 64


def _kv_heads(value: Any, config: Any) -> Any:
    if value == getattr(config, "num_attention_heads", None):
        return HEADS
    return value if value in (None, 1) else HEADS // 2


def _per_stage(first: int, factor: int = 1) -> Callable[[Any, Any], Any]:
    """Numbers for a list of stages, growing as they do in the default."""

    def shrink(value: Any, config: Any) -> Any:
        if not isinstance(value, list | tuple):
            return first
        ranks = {v: i for i, v in enumerate(sorted({v for v in value if isinstance(v, int)}))}
        return type(value)(first * factor ** ranks[v] if isinstance(v, int) else v for v in value)

    return shrink


def _all(number: int) -> Callable[[Any, Any], Any]:
    def shrink(value: Any, config: Any) -> Any:
        return type(value)(number for _ in value) if isinstance(value, list | tuple) else number

    return shrink


_COUNTS: tuple[tuple[str, Rule], ...] = (
    (r"^(num_hidden_layers|num_layers|n_layers?|layers|depth|num_(en|de)coder_layers)$", 2),
    (r"^(encoder_layers|decoder_layers|num_blocks|[lxr]_layers|.*_num_(hidden_)?layers)$", 2),
    (r"^(depths|num_block_repeats|stage_num_blocks|layer_depths)$", _all(1)),
    (r"^(vocab_size|.*_vocab_size)$", VOCABULARY),
    (r"^(max_position_embeddings|n_positions|max_source_positions|max_target_positions)$", LENGTH),
    (r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts)$", 4),
    (r"^(num_experts_per_tok|moe_topk|moe_k|num_experts_per_token|top_k_experts)$", 2),
    (r"^(n_group|topk_group|n_shared_experts)$", 1),
    (r"^(first_k_dense_replace|num_dense_layers)$", 1),
    (r"^(image_size|crop_size)$", _all(32)),
    (r"^(num_frames|frames_per_clip)$", 4),
    (r"^num_queries$", 6),
    (r"^num_kv_shared_layers$", 0),
    (r"^(attn|expert)_layer_period$", 2),
    (r"^(attn|expert)_layer_offset$", 1),
    (r"_byte_group_vocab$|^vocab_size_per_layer_input$|^ngram_vocab_size_base$", VOCABULARY),
)
_WIDTHS: tuple[tuple[str, Rule], ...] = (
    (
        r"^(num_heads|num_attention_heads|n_heads?|attention_heads|.*_attention_heads)$",
        _per_stage(HEADS),
    ),
    (r"^(num_key_value_heads|num_kv_heads|.*_num_key_value_heads)$", _kv_heads),
    (
        r"^(head_dim|d_kv|attention_head_dim|.*_head_dim|d_head|rotary_dim|attention_head_size)$",
        HEAD,
    ),
    (r"^(hidden_size|d_model|n_embd|dim|embed_dim|emb_dim|embedding_size)$", _per_stage(WIDTH, 2)),
    (r"^(hidden_sizes|embed_dims)$", _per_stage(16, 2)),
    (r"(^|_)(hidden|output|projection|proj|conv|mid|text|pooler)_(size|dim)$", _per_stage(WIDTH)),
    (r"^(intermediate_size|ffn_dim|d_ff|d_inner|n_inner|mlp_dim|hidden_dim|.*_ffn_dim)$", 48),
    (r"intermediate_size|feedforward_dim|dim_feedforward|ffn_hidden", 48),
    (r"^(sliding_window|window_size)$", 8),
    (r"_lora_rank$", 16),
    (r"^num_mel_bins$", 16),
    (r"^(mamba_n_heads|mamba_d_head|mamba_d_state|mamba_chunk_size|context_size)$", 8),
    (r"^(indexer_n_heads|index_n_heads|linear_num_(key|value)_heads)$", HEADS),
)
# these must be set where the default is None, or the model is as large as it can be
_FILLED = {
    "head_dim": HEAD,
    "num_key_value_heads": HEADS,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "vocab_size": VOCABULARY,
    "mamba_dt_rank": 4,
    "lru_width": WIDTH,
}

# first match wins; a field of another type, or already smaller, does not change
RULES = {"all": (*_COUNTS, *_WIDTHS), "depth": _COUNTS}


def _sections(*sections: int, turned: float = 1.0) -> dict[str, Any]:
    """Rotary sections for time, height and width; the code has its own for large heads."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": turned}
    return {"rope_parameters": rope | {"mrope_section": list(sections)}}


_SWIN = {
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 2, 4],
    "window_size": 2,
    "patch_size": 2,
}
# what a type needs beyond the rules of names
EXTRAS: dict[str, dict[str, Any]] = {
    "beit": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "data2vec-vision": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "xmod": {"default_language": "en_XX"},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [3, 4],
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
        "is_decoder": False,
    },
    "swin": _SWIN,
    "donut-swin": _SWIN,
    "deepseek_v2": {"n_group": 1, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1]},
    "qwen2_5_vl_vision": {"window_size": 112},
    "exaone4_5_vision": {"window_size": 112},
    "idefics3": {"scale_factor": 1},
    "smolvlm": {"scale_factor": 1},
    "blip-2": {"image_token_index": 80},
    "instructblip": {"image_token_index": 80},
    "glm4v_text": _sections(2, 1, 1),
    "glm_ocr_text": _sections(2, 1, 1),
    "glmga_text": _sections(2, 1, 1),
    "qwen2_vl_text": _sections(2, 1, 1),
    "qwen2_5_vl_text": _sections(2, 1, 1),
    "hunyuan_vl_text": _sections(2, 1, 1),
    "glm4v_moe_text": _sections(1, 1, 0, turned=0.5),
    "canine": {"local_transformer_stride": 4},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "mobilevitv2": {"image_size": 64},
    "vipllava": {"vision_feature_layers": [-2, -1]},
}

# follow from the others
_DERIVED = ("per_layer_config", "_out_features", "_out_indices")
_TYPES = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")
_TOKEN = re.compile(r"(_token_id|_token_index|_start_id|_end_id)$")


def shrunk(config: Any, overrides: Mapping[str, Any] | None = None, *, level: str = "all") -> Any:
    """A small configuration of the same class; `overrides` are set too.

    Level "depth" keeps the widths.

    An override whose name is that of a sub-configuration is a mapping of overrides for it.
    """
    cls, overriding = type(config), dict(overrides or {})
    plain = cls()
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in _DERIVED}
    kwargs: dict[str, Any] = {}
    for name, field in fields.items():
        value = _read(config, name)
        if name in config.sub_configs:
            if value is not None:
                nested = overriding.pop(name, {})
                small = shrunk(value, nested, level=level) if isinstance(nested, dict) else nested
                kwargs[name] = small
            continue
        derived = field.default is None and value == _read(plain, name)
        smaller = _rule(RULES[level], name, value, config)
        if level == "all" and field.default is None and name in _FILLED:
            kwargs[name] = _FILLED[name]
        elif smaller is not None and smaller != value and not derived:
            kwargs[name] = smaller
        elif not derived and value != _read(plain, name):
            kwargs[name] = value
    kwargs |= EXTRAS.get(config.model_type, {})
    kwargs |= _layer_types(config, fields)
    kwargs |= _stages(config, plain, fields)
    return cls(**(kwargs | _tokens(config, fields, kwargs) | overriding))


def _read(config: Any, name: str) -> Any:
    """A field's value; the class's default where every layer has a value of its own."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return getattr(type(config), name, None)


def _stages(config: Any, plain: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """As many features of a backbone as its owner asks for, from a depth that has them."""
    indices = getattr(config, "out_indices", None)
    if indices is None or indices == getattr(plain, "out_indices", None):
        return {}
    if "num_hidden_layers" not in fields:
        return {"out_indices": list(indices)}
    return {
        "num_hidden_layers": max(2, len(indices)),
        "out_indices": list(range(1, len(indices) + 1)),
    }


def _rule(rules: tuple[tuple[str, Rule], ...], name: str, value: Any, config: Any) -> Any:
    rule = next((rule for pattern, rule in rules if re.search(pattern, name)), None)
    if rule is None or isinstance(value, bool) or not isinstance(value, int | list | tuple):
        return None
    small = rule(value, config) if callable(rule) else rule
    if isinstance(small, int) and isinstance(value, int):
        return min(small, value) if value > 0 else value
    return small if isinstance(small, type(value)) else None


def _layer_types(config: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """One layer of each type, in the order they first come, at least two."""
    lists = {n: _read(config, n) for n in _TYPES if n in fields and _read(config, n)}
    depth = len(next(iter(lists.values()), ()))
    lists = {n: v for n, v in lists.items() if len(v) == depth}
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=True)))
    if not kinds:
        return {}
    kinds = kinds if len(kinds) > 1 else kinds * 2
    columns: dict[str, Any] = {
        n: list(c) for n, c in zip(lists, zip(*kinds, strict=True), strict=True)
    }
    if "num_hidden_layers" in fields:
        columns["num_hidden_layers"] = len(kinds)
    return columns


def _tokens(config: Any, fields: Mapping[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens moved into the small vocabulary, each to a place of its own.

    Those of a composite come before those of its text model.
    """
    vocabulary = kwargs.get("vocab_size") or _read(config, "vocab_size")
    parts = [_read(kwargs.get(n), "vocab_size") for n in config.sub_configs if n in kwargs]
    inner = [v for v in parts if isinstance(v, int)]
    if inner:
        vocabulary = min(inner) - 8
    if not isinstance(vocabulary, int):
        return {}
    moved, place = {}, vocabulary - 1
    for name in fields:
        value = _read(config, name)
        if _TOKEN.search(name) and isinstance(value, int) and value >= vocabulary:
            moved[name], place = place, place - 1
    return moved
