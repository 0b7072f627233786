"""Batches for Hugging Face models, from their configuration; one function per kind of input."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.zoo.family import Batch
from tests.zoo.shrink import VOCABULARY

BATCH, LENGTH, LABELS = 2, 12, 8
_IGNORED = -100


def tokens(config: Any, generator: torch.Generator, length: int = LENGTH) -> torch.Tensor:
    """Ids of ordinary tokens: the special ones sit at both ends of the vocabulary."""
    low, high = 8, getattr(config, "vocab_size", VOCABULARY) - 16
    return torch.randint(low, max(high, low + 1), (BATCH, length), generator=generator)


def padded(generator: torch.Generator, length: int = LENGTH) -> torch.Tensor:
    """An attention mask whose last sequence is shorter, as a collator makes it."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[-1, int(torch.randint(length // 2, length, (), generator=generator)) :] = 0
    return mask


def text(model: Any, generator: torch.Generator) -> Batch:
    """A language model without a mask."""
    ids = tokens(model.config.get_text_config(), generator)
    return {"input_ids": ids, "labels": ids.clone()}


def masked_text(model: Any, generator: torch.Generator) -> Batch:
    """A language model with padding, which the loss ignores."""
    batch = text(model, generator)
    mask = padded(generator)
    labels = batch["labels"].masked_fill(mask == 0, _IGNORED)
    return batch | {"attention_mask": mask, "labels": labels}


def classified_text(model: Any, generator: torch.Generator) -> Batch:
    """A sequence classifier; the label is one of the model's classes."""
    return {
        "input_ids": tokens(model.config.get_text_config(), generator),
        "attention_mask": padded(generator),
        "labels": classes(model, generator),
    }


def translated_text(model: Any, generator: torch.Generator) -> Batch:
    """An encoder-decoder with another length on each side."""
    config = model.config
    return {
        "input_ids": tokens(config, generator),
        "attention_mask": padded(generator),
        "labels": tokens(config, generator, LENGTH - 3),
    }


def transcribed_features(model: Any, generator: torch.Generator) -> Batch:
    """Log-mel features into text."""
    config = model.config
    shape = (BATCH, config.num_mel_bins, 2 * config.max_source_positions)
    features = torch.randn(shape, generator=generator, dtype=torch.float64)
    return {"input_features": features, "labels": tokens(config, generator)}


def waveform(model: Any, generator: torch.Generator) -> Batch:
    """Raw audio, 20 frames of it, into text by CTC; one label sequence shorter than the other."""
    samples = 20 * math.prod(getattr(model.config, "conv_stride", (80,)))
    values = torch.randn(BATCH, samples, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, model.config.vocab_size, (BATCH, 3), generator=generator)
    labels[-1, -1] = _IGNORED
    return {"input_values": values, "labels": labels}


def classes(model: Any, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, model.config.num_labels, (BATCH,), generator=generator)


def pixels(model: Any, generator: torch.Generator) -> torch.Tensor:
    config = model.config
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or 32
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(config, "num_channels", 3)
    return torch.randn(BATCH, channels, height, width, generator=generator, dtype=torch.float64)


def classified_image(model: Any, generator: torch.Generator) -> Batch:
    return {"pixel_values": pixels(model, generator), "labels": classes(model, generator)}


def segmented_image(model: Any, generator: torch.Generator) -> Batch:
    """A class per pixel, some of them not to be counted."""
    images = pixels(model, generator)
    labels = torch.randint(
        0, model.config.num_labels, (BATCH, *images.shape[2:]), generator=generator
    )
    labels[:, 0] = model.config.semantic_loss_ignore_index
    return {"pixel_values": images, "labels": labels}


def captioned_image(model: Any, generator: torch.Generator) -> Batch:
    """Pairs of image and text for a contrastive loss; the text ends with its end token."""
    config = model.config.text_config
    ids = tokens(config, generator)
    ids[:, -1] = config.eos_token_id
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels(model, generator),
        "return_loss": True,
    }


def detected_image(model: Any, generator: torch.Generator) -> Batch:
    """Boxes per image, a different number in each."""
    labels = []
    for count in range(1, BATCH + 1):
        centers = 0.3 + 0.4 * torch.rand(count, 2, generator=generator, dtype=torch.float64)
        sizes = 0.1 + 0.2 * torch.rand(count, 2, generator=generator, dtype=torch.float64)
        kinds = torch.randint(0, model.config.num_labels, (count,), generator=generator)
        labels.append({"class_labels": kinds, "boxes": torch.cat([centers, sizes], 1)})
    images = pixels(model, generator)
    return {"pixel_values": images, "labels": labels}
