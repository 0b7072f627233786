"""Batches for model types that nobody has looked at: by head, names of arguments and trial.

`DRAW` has, per head, the batches to try in turn; the first with which the model trains is used.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch

from tests.zoo import inputs
from tests.zoo.family import Batch

Draw = Callable[[Any, torch.Generator], Batch]
_MELS = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "input_dim")
_FEATURES = re.compile(r"features:? \(?(\d+)")


def overrides(config: Any) -> dict[str, Any]:
    """What a configuration has to have for a loss, beyond being small."""
    fields = {"num_labels": inputs.LABELS}
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        fields["decoder_start_token_id"] = 0
    if getattr(config, "pad_token_id", None) is None and hasattr(config, "pad_token_id"):
        fields["pad_token_id"] = 0
    return fields


def number(config: Any, *names: str, default: int) -> int:
    """The first of the names that the configuration, or a part of it, has as a number."""
    parts = [config, *(getattr(config, n, None) for n in getattr(config, "sub_configs", {}))]
    for part in parts:
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, list | tuple) and value and isinstance(value[0], int):
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return default


def takes(model: Any, *names: str) -> bool:
    return set(names) <= set(inspect.signature(model.forward).parameters)


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def images(model: Any, generator: torch.Generator, *lead: int) -> torch.Tensor:
    size = number(model.config, "image_size", "img_size", "input_size", "crop_size", default=32)
    channels = number(model.config, "num_channels", "in_channels", "in_chans", default=3)
    return normal(generator, inputs.BATCH, *lead, channels, size, size)


def spoken(model: Any, generator: torch.Generator) -> Batch:
    """Speech into text with an attention decoder, or by CTC."""
    config = model.config
    decoder = config.get_text_config(decoder=True)
    labels = inputs.tokens(decoder, generator, 4)
    if takes(model, "input_values"):
        return {"input_values": normal(generator, inputs.BATCH, 4000), "labels": labels}
    return {"input_features": _mel(model, generator), "labels": labels}


def _mel(model: Any, generator: torch.Generator) -> torch.Tensor:
    config = model.config
    mels = number(config, *_MELS, default=80)
    frames = 2 * number(config, "max_source_positions", default=32)
    return normal(generator, inputs.BATCH, frames, mels)


def spoken_mel_first(model: Any, generator: torch.Generator) -> Batch:
    batch = spoken(model, generator)
    return batch | {"input_features": batch["input_features"].transpose(1, 2).contiguous()}


def spoken_masked(model: Any, generator: torch.Generator) -> Batch:
    batch = spoken(model, generator)
    shape = next(t for n, t in batch.items() if n != "labels").shape[:2]
    return batch | {"attention_mask": torch.ones(shape, dtype=torch.long)}


def classified_audio(model: Any, generator: torch.Generator) -> Batch:
    labels = inputs.classes(model, generator)
    if takes(model, "input_features"):
        return {"input_features": _mel(model, generator), "labels": labels}
    return {"input_values": normal(generator, inputs.BATCH, 4000), "labels": labels}


def classified_spectrogram(model: Any, generator: torch.Generator) -> Batch:
    config = model.config
    frames = number(config, "max_length", default=64)
    mels = number(config, "num_mel_bins", default=16)
    values = normal(generator, inputs.BATCH, frames, mels)
    return {"input_values": values, "labels": inputs.classes(model, generator)}


def classified_image(model: Any, generator: torch.Generator) -> Batch:
    return {"pixel_values": images(model, generator), "labels": inputs.classes(model, generator)}


def classified_video(model: Any, generator: torch.Generator) -> Batch:
    frames = number(model.config, "num_frames", "frames_per_clip", default=4)
    name = "pixel_values_videos" if takes(model, "pixel_values_videos") else "pixel_values"
    labels = inputs.classes(model, generator)
    return {name: images(model, generator, frames), "labels": labels}


def segmented_image(model: Any, generator: torch.Generator) -> Batch:
    pixels = images(model, generator)
    shape = (inputs.BATCH, *pixels.shape[2:])
    labels = torch.randint(0, model.config.num_labels, shape, generator=generator)
    return {"pixel_values": pixels, "labels": labels}


def masked_instances(model: Any, generator: torch.Generator) -> Batch:
    """A few masks per image with their classes, as the universal segmenters take them."""
    pixels = images(model, generator)
    counts = range(1, inputs.BATCH + 1)
    size = pixels.shape[2:]
    batch = {
        "pixel_values": pixels,
        "mask_labels": [(normal(generator, n, *size) > 0).double() for n in counts],
        "class_labels": [
            torch.randint(0, model.config.num_labels, (n,), generator=generator) for n in counts
        ],
    }
    if takes(model, "task_inputs"):
        length = number(model.config, "task_seq_len", default=8)
        batch["task_inputs"] = torch.ones(inputs.BATCH, length, dtype=torch.long)
        batch["text_inputs"] = torch.ones(
            inputs.BATCH, number(model.config, "num_text", default=4), length, dtype=torch.long
        )
    return batch


def detected_image(model: Any, generator: torch.Generator) -> Batch:
    batch = inputs.detected_image(model, generator)
    return batch | {"pixel_values": images(model, generator)}


def plain_image(model: Any, generator: torch.Generator) -> Batch:
    """No labels: the loss is computed from the results."""
    return {"pixel_values": images(model, generator)}


def masked_image(model: Any, generator: torch.Generator) -> Batch:
    pixels = images(model, generator)
    patch = number(model.config, "patch_size", default=16)
    patches = (pixels.shape[-1] // patch) ** 2
    mask = torch.rand(inputs.BATCH, patches, generator=generator) < 0.5
    return {"pixel_values": pixels, "bool_masked_pos": mask}


def image_and_text(model: Any, generator: torch.Generator) -> Batch:
    """A contrastive pair."""
    config = model.config.get_text_config()
    ids = inputs.tokens(config, generator)
    if isinstance(config.eos_token_id, int):
        ids[:, -1] = config.eos_token_id
    batch = {"input_ids": ids, "pixel_values": images(model, generator)}
    return batch | ({"return_loss": True} if takes(model, "return_loss") else {})


def _captioned(pixels: Callable[[Any, torch.Generator], Batch]) -> Draw:
    """Text with as many placeholders in front as the model has features for an image."""

    def draw(model: Any, generator: torch.Generator) -> Batch:
        base = pixels(model, generator)
        config = model.config
        token = getattr(config, "image_token_id", None) or getattr(
            config, "image_token_index", None
        )
        ids = inputs.tokens(config.get_text_config(), generator)
        return _fitted(model, base, ids, token)

    return draw


def _fitted(model: Any, base: Batch, ids: torch.Tensor, token: int | None) -> Batch:
    """The batch with the number of placeholders that the model asks for when it gets one."""
    batch = base | {"input_ids": ids, "labels": ids.clone()}
    if takes(model, "qformer_input_ids"):
        batch["qformer_input_ids"] = ids.clone()
    if token is None:
        return batch
    fitted, hidden = _with_placeholders(batch, token, 1), model.config.get_text_config().hidden_size
    expected = _FEATURES.search(_complaint(model, fitted) or "")
    if expected is None:
        return fitted
    total = int(expected[1]) // inputs.BATCH
    for count in (total, total // hidden):  # some count the numbers rather than the features
        fitted = _with_placeholders(batch, token, count)
        if _FEATURES.search(_complaint(model, fitted) or "") is None:
            break
    return fitted


def _with_placeholders(batch: Batch, token: int, count: int) -> Batch:
    ids = torch.cat([torch.full((inputs.BATCH, count), token), batch["input_ids"]], 1)
    labels = torch.cat([torch.full((inputs.BATCH, count), -100), batch["labels"]], 1)
    batch = batch | {"input_ids": ids, "labels": labels}
    if "attention_mask" in batch:
        batch["attention_mask"] = torch.ones_like(ids)
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"] = (ids == token).long()
    if "token_type_ids" in batch:
        batch["token_type_ids"] = (ids == token).long()
    return batch


def _complaint(model: Any, batch: Batch) -> str | None:
    """What the model says to a batch, tried on a copy."""
    trial = copy.deepcopy(model).eval()
    dtype = next(trial.parameters()).dtype
    cast = {
        n: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for n, v in batch.items()
    }
    try:
        with torch.no_grad(), torch.random.fork_rng():
            trial(**cast)
    except Exception as error:
        return str(error)
    return None


def _image(model: Any, generator: torch.Generator) -> Batch:
    batch: Batch = {"pixel_values": images(model, generator)}
    if takes(model, "token_type_ids"):
        batch["token_type_ids"] = torch.zeros(1)
    return batch


def _sized_image(model: Any, generator: torch.Generator) -> Batch:
    pixels = images(model, generator)
    sizes = torch.tensor([list(pixels.shape[-2:])] * inputs.BATCH)
    return {"pixel_values": pixels, "image_sizes": sizes}


def _tiled_image(model: Any, generator: torch.Generator) -> Batch:
    """One or several tiles per image."""
    return {"pixel_values": images(model, generator, 1)}


def _sized_tiles(model: Any, generator: torch.Generator) -> Batch:
    pixels = images(model, generator, 3)
    sizes = torch.tensor([list(pixels.shape[-2:])] * inputs.BATCH)
    return {"pixel_values": pixels, "image_sizes": sizes}


def _patches(model: Any, generator: torch.Generator) -> Batch:
    """Flattened patches of 4 × 4 per image, with the grid they are of."""
    vision = model.config.vision_config
    patch = number(vision, "patch_size", default=14)
    channels = number(vision, "in_channels", "num_channels", "in_chans", default=3)
    temporal = number(vision, "temporal_patch_size", default=1)
    width = channels * temporal * patch * patch
    batch: Batch = {
        "pixel_values": normal(generator, inputs.BATCH * 16, width),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * inputs.BATCH),
    }
    if takes(model, "mm_token_type_ids"):
        batch["mm_token_type_ids"] = torch.zeros(1)
    return batch


def answered_text(model: Any, generator: torch.Generator) -> Batch:
    ids = inputs.tokens(model.config.get_text_config(), generator)
    where = torch.randint(0, inputs.LENGTH, (2, inputs.BATCH), generator=generator)
    return {"input_ids": ids, "start_positions": where[0], "end_positions": where[1]}


def series(model: Any, generator: torch.Generator) -> Batch:
    """A window of the past and the values that follow."""
    config = model.config
    past = number(config, "context_length", default=16)
    channels = number(config, "num_input_channels", default=1)
    ahead = number(config, "prediction_length", default=8)
    if takes(model, "past_values", "future_values") and takes(model, "past_time_features"):
        past += max(config.lags_sequence)
        features = config.num_time_features
        return {
            "past_values": normal(generator, inputs.BATCH, past),
            "past_time_features": normal(generator, inputs.BATCH, past, features),
            "past_observed_mask": torch.ones(inputs.BATCH, past),
            "future_values": normal(generator, inputs.BATCH, ahead),
            "future_time_features": normal(generator, inputs.BATCH, ahead, features),
        }
    return {
        "past_values": normal(generator, inputs.BATCH, past, channels),
        "future_values": normal(generator, inputs.BATCH, ahead, channels),
    }


def _heard(features: Callable[[Any, torch.Generator], Batch]) -> Draw:
    """Text with as many placeholders in front as the model has features for the sound."""

    def draw(model: Any, generator: torch.Generator) -> Batch:
        base = features(model, generator) | {"attention_mask": torch.ones(1)}
        base.pop("labels")
        config = model.config
        token = getattr(config, "audio_token_id", None) or getattr(
            config, "audio_token_index", None
        )
        ids = inputs.tokens(config.get_text_config(), generator)
        return _fitted(model, base, ids, token)

    return draw


def _mel_with_mask(model: Any, generator: torch.Generator) -> Batch:
    """Mel bins first, as Whisper's encoder has them, and a mask over the frames."""
    batch = spoken_mel_first(model, generator)
    mask = torch.ones(inputs.BATCH, batch["input_features"].shape[-1], dtype=torch.long)
    return batch | {n: mask for n in _MASKS if takes(model, n)}


_MASKS = ("input_features_mask", "feature_attention_mask")
_HEARD = tuple(_heard(f) for f in (_mel_with_mask, spoken))
_CAPTIONED = tuple(
    _captioned(p) for p in (_image, _patches, _sized_tiles, _tiled_image, _sized_image)
)

DRAW: dict[str, tuple[Draw, ...]] = {
    "SEQ_TO_SEQ_CAUSAL_LM": (inputs.translated_text, *_HEARD, inputs.masked_text),
    "MASKED_LM": (inputs.masked_text, inputs.text, plain_image),
    "CAUSAL_LM": (inputs.text, inputs.masked_text),
    "IMAGE_TEXT_TO_TEXT": _CAPTIONED,
    "CTC": (inputs.waveform, spoken, spoken_masked),
    "SPEECH_SEQ_2_SEQ": (spoken_mel_first, spoken, spoken_masked),
    "OBJECT_DETECTION": (detected_image, plain_image),
    "SEMANTIC_SEGMENTATION": (segmented_image,),
    "UNIVERSAL_SEGMENTATION": (masked_instances, plain_image),
    "IMAGE_CLASSIFICATION": (classified_image, inputs.classified_text),
    "AUDIO_CLASSIFICATION": (classified_audio, classified_spectrogram),
    "VIDEO_CLASSIFICATION": (classified_video,),
    "DEPTH_ESTIMATION": (plain_image,),
    "ZERO_SHOT_IMAGE_CLASSIFICATION": (image_and_text,),
    "ZERO_SHOT_OBJECT_DETECTION": (image_and_text,),
    "MASKED_IMAGE_MODELING": (masked_image, plain_image),
    "SEQUENCE_CLASSIFICATION": (inputs.classified_text,),
    "QUESTION_ANSWERING": (answered_text,),
    "TIME_SERIES_PREDICTION": (series,),
    "MULTIMODAL_LM": (*_CAPTIONED, inputs.text),
}
