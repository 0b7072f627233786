"""The folder of a model that is served. What is wrong with it is told before torch is imported."""

from __future__ import annotations

import sys
from pathlib import Path

_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", ".metadata")


def model_folder(model: str) -> str:
    """A folder as it is; for an id of the hub, the folder that it is downloaded to.

    Raises:
        OSError: there is neither, or the folder has no model.
    """
    if Path(model).is_dir():
        _check(Path(model))
        return model
    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise OSError(f"{model} is no folder")
    from huggingface_hub import snapshot_download

    print(f"autopar: asking the Hugging Face hub for {model}", file=sys.stderr, flush=True)
    try:
        folder = snapshot_download(model)
    except (OSError, ValueError) as error:  # no connection; a name that the hub has none of
        raise OSError(f"{model} is no folder, nor is it a model of the hub: {error}") from error
    _check(Path(folder))
    return folder


def _check(folder: Path) -> None:
    if not (folder / _CONFIG).is_file():
        raise OSError(f"{folder} has no {_CONFIG}: give the folder that save_pretrained wrote")
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise OSError(
            f"{folder} has a {_CONFIG} and no weights in safetensors ({_WEIGHTS[0]} or "
            f"{_WEIGHTS[1]}): write them by save_pretrained"
        )
