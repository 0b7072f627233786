"""Checkpoints read slice by slice: safetensors files, folders of torch.distributed.checkpoint."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from autopar.comm.stored_layout import StoredLayout
from autopar.errors import EngineError
from autopar.runtime.freed_memory import return_freed_memory

# The names that safetensors has for dtypes.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: its shape, and its dtype (or how the file calls one that torch does
    not have)."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


class Weights(Protocol):
    """A checkpoint."""

    path: Path

    def tensors(self) -> Mapping[str, Stored]:
        """All tensors by name."""

    def read(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Read into tensors in place; of a DTensor, this rank's shard."""


class SafetensorsWeights:
    """A safetensors file, or several with an index.

    Args:
        path: of the file or folder, for messages.
        files: the file of each tensor by name; None for all that are in `path`.
    """

    def __init__(self, path: Path, files: Mapping[str, Path] | None = None) -> None:
        self.path = path
        if files is None:
            with _open(path) as file:
                files = dict.fromkeys(file.keys(), path)
        self._files = files

    def tensors(self) -> dict[str, Stored]:
        stored: dict[str, Stored] = {}
        for path in sorted(set(self._files.values())):
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118 - it is not a dict
                    part = file.get_slice(name)
                    kind = part.get_dtype()
                    stored[name] = Stored(tuple(part.get_shape()), _DTYPES.get(kind, kind))
        return stored

    @torch.no_grad()
    def read(self, targets: Mapping[str, torch.Tensor]) -> None:
        for name, target in targets.items():
            if isinstance(target, DTensor) and not target._local_tensor.numel():
                continue
            # closed after each tensor: pages of the file that were read count as this process's
            with _open(self._files[name]) as file:
                if isinstance(target, DTensor):
                    local = target._local_tensor
                    index = _local_slices(target)
                    whole = all(s == slice(0, n) for s, n in zip(index, target.shape, strict=True))
                else:
                    local, index, whole = target, (), True
                part = file.get_tensor(name) if whole else file.get_slice(name)[index]
                local.copy_(part)
                del part
            return_freed_memory(local.nbytes)


class DistributedWeights:
    """A folder of torch.distributed.checkpoint.

    Args:
        prefix: of the model's names in it, such as "model.", where the state dict was saved as one
            of several.
    """

    def __init__(self, path: Path, names: set[str]) -> None:
        self.path = path
        entries = FileSystemReader(path).read_metadata().state_dict_metadata
        self._entries = {k: v for k, v in entries.items() if isinstance(v, TensorStorageMetadata)}
        self._prefix = self._prefix_of(names)

    def _prefix_of(self, names: set[str]) -> str:
        """What stands before the model's names: the shortest with the most of them."""
        prefixes = {""} | {
            key.removesuffix(name)
            for name in sorted(names, key=len)[-1:]
            for key in self._entries
            if key.endswith("." + name)
        }
        hits = {p: sum(p + name in self._entries for name in names) for p in prefixes}
        return min(prefixes, key=lambda p: (-hits[p], len(p), p))

    def tensors(self) -> dict[str, Stored]:
        return {
            key.removeprefix(self._prefix): Stored(tuple(entry.size), entry.properties.dtype)
            for key, entry in self._entries.items()
            if key.startswith(self._prefix)
        }

    def read(self, targets: Mapping[str, torch.Tensor]) -> None:
        state: dict[str, Any] = {self._prefix + name: x.detach() for name, x in targets.items()}
        with warnings.catch_warnings():
            # every rank reads its own slices; torch takes that for a process that is alone
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(state, storage_reader=FileSystemReader(self.path), no_dist=True)


def _local_slices(x: DTensor) -> tuple[slice, ...]:
    """Where this rank's shard lies in a DTensor."""
    coords = x.device_mesh.get_coordinate()
    assert coords is not None, "the mesh is over all processes"
    return StoredLayout.of(x).slices(x.shape, x.device_mesh, coords)


def _open(path: Path) -> Any:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise EngineError(
            f"weights={path} is read with the package safetensors, which is not installed; "
            "pip install safetensors"
        ) from error
    return safe_open(path, framework="pt", device="cpu")


def open_weights(path: Path, names: set[str]) -> Weights:
    """A checkpoint by what lies at a path.

    Args:
        path: a .safetensors file, a folder with model.safetensors or model.safetensors.index.json,
            or a folder of torch.distributed.checkpoint.
        names: of the model's tensors.

    Raises:
        EngineError: nothing of these lies there.
    """
    index = path / "model.safetensors.index.json"
    if path.is_file() and path.suffix == ".safetensors":
        return SafetensorsWeights(path)
    if index.is_file():
        files = json.loads(index.read_text())["weight_map"]
        return SafetensorsWeights(path, {name: path / file for name, file in files.items()})
    if (path / "model.safetensors").is_file():
        return SafetensorsWeights(path / "model.safetensors")
    if (path / ".metadata").is_file():
        return DistributedWeights(path, names)
    raise EngineError(
        f"weights={path} is no checkpoint that autopar reads: a .safetensors file, a folder with "
        "model.safetensors or model.safetensors.index.json, or a folder that "
        "torch.distributed.checkpoint wrote"
    )


def names_in(weights: Weights, model: torch.nn.Module, *, converts: bool = False) -> dict[str, str]:
    """The name in a checkpoint of each of a model's parameters and persistent buffers. Tied ones
    have the same, the first of their names that is there.

    Args:
        converts: parameters may have another floating-point dtype there.

    Raises:
        EngineError: names, shapes or dtypes do not fit; all of them at once.
    """
    stored = weights.tensors()
    expected = saved_tensors(model)
    aliases: dict[int, list[str]] = {}
    for name, x in expected.items():
        aliases.setdefault(id(x), []).append(name)
    known = {key: next((n for n in names if n in stored), None) for key, names in aliases.items()}
    missing = [names[0] for key, names in aliases.items() if known[key] is None]
    unexpected = [name for name in stored if name not in expected]
    wrong = [
        f"{name} is {stored[name]} there and {own} in the model"
        for name, x in expected.items()
        if name in stored
        and stored[name] != (own := Stored(tuple(x.shape), x.dtype))
        and not (converts and _converts(stored[name], x))
    ]
    problems = [
        f"{len(listed)} {what}: {', '.join(listed[:8])}{', ...' if len(listed) > 8 else ''}"
        for what, listed in (
            ("missing in it", missing),
            ("unknown to the model", unexpected),
            ("of another shape or dtype", wrong),
        )
        if listed
    ]
    if problems:
        raise EngineError(
            f"weights={weights.path} does not fit the model. Tensors "
            + "; ".join(problems)
            + ". Save the state dict of this very model, or rename and convert its tensors first"
        )
    return {name: str(known[id(x)]) for name, x in expected.items()}


def _converts(stored: Stored, x: torch.Tensor) -> bool:
    """Whether a parameter takes what is stored, in its own dtype."""
    floating = isinstance(stored.dtype, torch.dtype) and stored.dtype.is_floating_point
    is_parameter = isinstance(x, torch.nn.Parameter)
    same_shape = stored.shape == tuple(x.shape)
    return floating and is_parameter and same_shape and x.dtype.is_floating_point


def saved_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers under all their names, as state dicts have them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    transient = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    buffers = model.named_buffers(remove_duplicate=False)
    return parameters | {name: x for name, x in buffers if name not in transient}
