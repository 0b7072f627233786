"""Reads a model file: a Python file that defines `build_model()` and `example_inputs()`."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

MODULE_NAME = "autopar_model_file"


@dataclass(frozen=True)
class Example:
    """A model on the meta device, and one batch to call it with."""

    model: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def of_forward(self) -> Example:
        """The same for inference: the model in evaluation mode, without gradients or labels.

        Labels are the keyword argument of that name, as models of transformers have it, if the
        forward does without. Their decoders take the labels for their tokens in training, and take
        `decoder_input_ids` of the same shape instead.
        """
        kwargs = dict(self.kwargs)
        parameter = inspect.signature(self.model.forward).parameters.get("labels")
        if parameter is None or parameter.default is not inspect.Parameter.empty:
            labels = kwargs.pop("labels", None)
            config = getattr(self.model, "config", None)
            if labels is not None and getattr(config, "is_encoder_decoder", False):
                kwargs.setdefault("decoder_input_ids", labels)
        return Example(self.model.eval().requires_grad_(False), self.args, kwargs)


def load_example(path: Path, sizes: Mapping[str, int] | None = None) -> Example:
    """Build the model of a file, without weights and in train mode, and its example inputs.

    Args:
        sizes: of the batch, for `example_inputs`: `batch`, `sequence`.

    Raises:
        ValueError: the file is missing, lacks a function, or fails; the message names the line. Or
            its `example_inputs` does not take the sizes.
    """
    module = _import(path)
    build = _function(module, "build_model", path)
    inputs = _function(module, "example_inputs", path)
    known = inspect.signature(inputs).parameters
    if unknown := [name for name in sizes or {} if name not in known]:
        raise ValueError(
            f"example_inputs() of {path} does not take {' and '.join(unknown)}; define it as "
            f"example_inputs({', '.join(f'{name}=8' for name in unknown)}) to plan for other sizes"
        )

    def on_meta() -> Any:
        with torch.device("meta"):
            return build()

    model = _call(on_meta, f"build_model() of {path}", path)
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"build_model() of {path} returned {type(model).__name__}, not a torch.nn.Module"
        )
    args, kwargs = _arguments(
        _call(partial(inputs, **(sizes or {})), f"example_inputs() of {path}", path), path
    )
    return Example(model.train(), args, kwargs)


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"model file {path} does not exist; give the path of a Python file")
    spec = importlib.util.spec_from_file_location(MODULE_NAME, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"model file {path} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    # as in `python model.py`: its folder is on the path, and pickling finds the module
    sys.modules[MODULE_NAME] = module
    sys.path.insert(0, str(path.parent.resolve()))
    loader = spec.loader
    try:
        _call(lambda: loader.exec_module(module), f"importing {path}", path)
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module


def _function(module: ModuleType, name: str, path: Path) -> Callable[[], Any]:
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(
            f"{path} does not define {name}(); a model file defines build_model(), which returns "
            "the module, and example_inputs(), which returns a batch to call it with"
        )
    return function


def _call(function: Callable[[], Any], name: str, path: Path) -> Any:
    """Run the user's code. An exception becomes a ValueError that names the line."""
    try:
        return function()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        inside = [f for f in frames if Path(f.filename).resolve() == path.resolve()]
        line = inside[-1].lineno if inside else getattr(error, "lineno", None)
        where = f" at {path}:{line}" if line is not None else ""
        raise ValueError(f"{name} failed{where}: {type(error).__name__}: {error}") from error


def _arguments(value: Any, path: Path) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(value, Mapping):
        return (), dict(value)
    if isinstance(value, tuple | list):
        positional = len(value) == 2 and isinstance(value[0], tuple | list)
        if positional and isinstance(value[1], Mapping):
            return tuple(value[0]), dict(value[1])
        return tuple(value), {}
    if isinstance(value, torch.Tensor):
        return (value,), {}
    raise ValueError(
        f"example_inputs() of {path} returned {type(value).__name__}; return a dict of keyword "
        "arguments, a tuple of positional ones, or (args, kwargs)"
    )
