"""Models by name, with a batch to plan for: of transformers and timm, and of model files.

    hf:config.json             a configuration of transformers: a file, a folder that has one, or
                               an id that the library can resolve
    timm:vit_large_patch16_224 a model of timm
    model.py                   a file that defines build_model() and example_inputs()

The dtype is that of the configuration. Sizes of the batch follow a question mark
(`hf:config.json?batch=16&sequence=8192`), or are options of the command. A file takes them as
arguments of its example_inputs(batch=8, sequence=128), where it has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import torch

from autopar.cli.model_file import Example, load_example

PREFIXES = ("hf:", "timm:")
FILE = "file"
_BATCH = 8
_PIXELS = 224  # of a side of an image, where the configuration does not say
_MOST_TOKENS = 8192  # of a sequence, where the length is not given
# Classes of transformers by what their names end with; labels are of tokens, or of samples.
_OF_TOKENS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining")
_OF_TEXTS = ("ForSequenceClassification",)
_OF_IMAGES = ("ForImageClassification",)
_ANSWER_WITHIN_S = 10.0
_TRANSLATING = ("ForConditionalGeneration",)


@dataclass(frozen=True)
class Source:
    """A model of a library or of a file.

    Args:
        library: "hf", "timm" or `FILE`.
        name: of the model or its configuration, or the file.
        sizes: of the batch: `batch`, `sequence`.
    """

    library: str
    name: str
    sizes: Mapping[str, int]

    @staticmethod
    def of(text: str, **sizes: int | None) -> Source:
        """Parse a source.

        Args:
            sizes: that go before those in the text; None of what is not given.

        Raises:
            ValueError: a size is unknown, or no positive number.
        """
        library, rest = FILE, text
        if text.startswith(PREFIXES):
            library, _, rest = text.partition(":")
        name, _, query = rest.partition("?")
        known: dict[str, int] = {}
        for key, value in parse_qsl(query, keep_blank_values=True):
            if key not in ("batch", "sequence"):
                raise ValueError(f"{text}: the sizes of a batch are batch and sequence, not {key}")
            if not value.isdecimal() or not int(value):
                raise ValueError(f"{text}: {key} must be a positive number, not {value!r}")
            known[key] = int(value)
        known |= {key: value for key, value in sizes.items() if value is not None}
        if not name and library != FILE:
            example = "hf:config.json" if library == "hf" else "timm:resnet50"
            raise ValueError(f"{text}: a name must follow, as in {example}")
        return Source(library, name, known)

    def __str__(self) -> str:
        query = f"?{urlencode(self.sizes)}" if self.sizes else ""
        prefix = "" if self.library == FILE else f"{self.library}:"
        return f"{prefix}{self.name}{query}"

    def example(self, *, forward: bool = False) -> Example:
        """The model on the meta device, in train mode, and its batch.

        Args:
            forward: for inference: in evaluation mode, without gradients or labels.

        Raises:
            ValueError: the library is missing, does not know the name, or the model takes inputs
                that are not known here; or the file fails.
        """
        if self.library == FILE:
            example = load_example(Path(self.name), self.sizes)
        else:
            example = self._of_transformers() if self.library == "hf" else self._of_timm()
        return example.of_forward() if forward else example

    def _of_transformers(self) -> Example:
        try:
            import transformers
        except ImportError as error:
            raise ValueError(f"{self}: install transformers to plan its models") from error
        try:
            folder = self._folder()
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=not _is_reachable(folder)
            )
        except Exception as error:  # each configuration checks itself in its own way
            raise ValueError(
                f"{self}: {_first_line(error)}; give a config.json, or a folder that has one"
            ) from error
        names = config.architectures or []
        names = [names] if isinstance(names, str) else names
        model_class: Any = getattr(transformers, names[0], None) if names else None
        of_models = isinstance(model_class, type) and issubclass(
            model_class, transformers.PreTrainedModel
        )
        if not of_models:
            raise ValueError(
                f"{self}: its architectures are {names}, and transformers "
                f"{transformers.__version__} has no such class; write a model file"
            )
        config.use_cache = False
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"{self}: its weights are quantized in a form that plans do not know, and that "
                "cannot be trained; leave quantization_config out, or call autopar.quantize in a "
                "model file"
            )
        try:
            with torch.device("meta"):
                model = model_class(config)
        except Exception as error:  # sizes that do not agree fail anywhere in the model's code
            raise ValueError(f"{self}: {names[0]} cannot be built: {_first_line(error)}") from error
        dtype = getattr(config, "dtype", None)
        model = model.to(dtype) if isinstance(dtype, torch.dtype) else model
        return Example(model.train(), (), self._inputs(config, names[0]))

    def _folder(self) -> str:
        path = Path(self.name)
        if path.suffix == ".json" and not path.is_file():
            raise ValueError(f"{path} does not exist")
        return str(path)

    def _inputs(self, config: Any, name: str) -> dict[str, torch.Tensor]:
        """A batch for a class of transformers."""
        text = config.get_text_config()
        samples = self.sizes.get("batch", _BATCH)
        longest = int(getattr(text, "max_position_embeddings", None) or 0)
        length = self.sizes.get("sequence", min(longest or _MOST_TOKENS, _MOST_TOKENS))
        if longest and length > longest:
            raise ValueError(
                f"{self}: its configuration allows {longest:,} tokens (max_position_embeddings), "
                f"not {length:,}"
            )
        tokens = torch.zeros(samples, length, dtype=torch.long, device="meta")
        classes = tokens[:, 0]
        if name.endswith(_OF_TOKENS):
            return {"input_ids": tokens, "labels": tokens}
        if name.endswith(_OF_TEXTS):
            return {"input_ids": tokens, "labels": classes}
        if name.endswith(_TRANSLATING) and config.is_encoder_decoder and text.vocab_size:
            return {"input_ids": tokens, "labels": tokens}
        if name.endswith(_OF_IMAGES):
            size, channels = getattr(config, "image_size", _PIXELS), config.num_channels
            if "sequence" in self.sizes:
                raise ValueError(f"{self}: a model of images has no sequence; leave that out")
            sides = (size, size) if isinstance(size, int) else tuple(size)
            pixels = torch.zeros(samples, channels, *sides, dtype=config.dtype, device="meta")
            return {"pixel_values": pixels, "labels": classes}
        raise ValueError(
            f"{self}: the inputs of {name} are not known here; write a model file with "
            "build_model() and example_inputs()"
        )

    def _of_timm(self) -> Example:
        try:
            import timm
        except ImportError as error:
            raise ValueError(f"{self}: install timm to plan its models") from error
        if "sequence" in self.sizes:
            raise ValueError(f"{self}: a model of images has no sequence; leave that out")
        try:
            with torch.device("meta"):
                model = timm.create_model(self.name)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{self}: {_first_line(error)}") from error
        shape = model.pretrained_cfg["input_size"]
        images = torch.zeros(self.sizes.get("batch", _BATCH), *shape, device="meta")
        return Example(model.train(), (images,), {})


def example_of(model: str, *, forward: bool = False, **sizes: int | None) -> tuple[Example, str]:
    """The example of a model file, or of a library, and the source that names it again.

    Args:
        forward: for inference.
        sizes: of the batch; None of what is not given. A file takes them in `example_inputs`.

    Raises:
        ValueError: it cannot be built, or has no such sizes.
    """
    source = Source.of(model, **sizes)
    return source.example(forward=forward), str(source)


def _is_reachable(name: str) -> bool:
    """Whether a model is at hand, or its hub answers at the first try. The library tries for half a
    minute where there is no network."""
    if Path(name).exists():
        return True
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_ANSWER_WITHIN_S)
    except (HfHubHTTPError, HFValidationError):  # which the library explains
        return True
    except Exception:  # of whichever library makes the connection
        return False
    return True


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
