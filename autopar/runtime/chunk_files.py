"""Chunks of training states as files on a drive: two versions of each, one of them complete.

A version is written while the one before it is complete; a manifest, replaced atomically, names the
complete ones. A process that is killed at any time leaves a complete version behind.

    directory/manifest.json     which versions are complete, and what they hold
    directory/0003.1.bin        chunk 3 of the versions with odd numbers of the slot
    directory/lock              held by the process that writes
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autopar.errors import EngineError
from autopar.files import write_atomically

log = logging.getLogger(__name__)

_FORMAT = 1
_MANIFEST = "manifest.json"
_BUFFERS = 512  # of one call to the operating system, which takes 1024


@dataclass(frozen=True)
class Version:
    """A complete version.

    Args:
        steps: of the optimizer, that it comes after.
        slot: 0 or 1, of its files.
        chunks: by chunk, a row per tensor in the order of the file: whatever tells what it is, as
            plain data.
        numbers: what is not in files, as plain data.
    """

    steps: int
    slot: int
    chunks: Sequence[Sequence[Any]]
    numbers: Any


class ChunkFiles:
    """Chunks in a directory, read and written by threads.

    Attributes:
        versions: the complete ones, by their steps.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="autopar-states")
        self.versions: dict[int, Version] = _read_manifest(directory / _MANIFEST)

    def own(self) -> None:
        """Let nobody else write here, until this object or its process ends.

        Raises:
            EngineError: somebody does.
        """
        self._lock = open(self.directory / "lock", "ab")  # noqa: SIM115 - as long as this object
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EngineError(
                f"another engine, of this process or of another one, keeps its states in "
                f"{self.directory}; end it, or name another directory"
            ) from error
        except OSError:  # the file system has no locks
            log.warning("%s cannot be locked: see that no other run writes there", self.directory)

    def keep_only(self, steps: int | None) -> None:
        """Forget other versions, so that their slot may be written; all if None."""
        kept = {k: v for k, v in self.versions.items() if k == steps}
        if len(kept) < len(self.versions):
            self._write_manifest(kept)

    def free_slot(self) -> int:
        """The slot that no complete version is in; there is one after `keep_only`."""
        return min({0, 1} - {version.slot for version in self.versions.values()})

    def write(self, chunk: int, slot: int, tensors: Sequence[torch.Tensor]) -> Future[None]:
        """Start to write a chunk. The tensors may not change before that is done."""
        return self._threads.submit(self._write, chunk, slot, list(tensors))

    def read(
        self, chunk: int, slot: int, tensors: Sequence[torch.Tensor | int]
    ) -> Future[None]:  # fmt: skip
        """Start to read a chunk into tensors; a number instead of a tensor skips so many bytes."""
        return self._threads.submit(self._read, chunk, slot, list(tensors))

    def commit(self, version: Version) -> None:
        """Declare a version complete, when all of its chunks are written."""
        self._write_manifest({**self.versions, version.steps: version})

    def _path(self, chunk: int, slot: int) -> Path:
        return self.directory / f"{chunk:04d}.{slot}.bin"

    def _write(self, chunk: int, slot: int, tensors: Sequence[torch.Tensor]) -> None:
        file = os.open(self._path(chunk, slot), os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            offset, parts = 0, [memory_of(t) for t in tensors if t.nbytes]
            while parts:
                count = os.pwritev(file, parts[:_BUFFERS], offset)
                offset += count
                parts = _without(parts, count)
            os.ftruncate(file, offset)
            os.fdatasync(file)
        finally:
            os.close(file)

    def _read(self, chunk: int, slot: int, tensors: Sequence[torch.Tensor | int]) -> None:
        path = self._path(chunk, slot)
        file = os.open(path, os.O_RDONLY)
        try:
            offset = 0
            for t in tensors:
                if isinstance(t, int):
                    offset += t
                    continue
                part = memory_of(t)
                while len(part):
                    count = os.preadv(file, [part], offset)
                    if not count:
                        raise EngineError(f"{path} is too short: it ends at {offset} bytes")
                    offset += count
                    part = part[count:]
        finally:
            os.close(file)

    def _write_manifest(self, versions: Mapping[int, Version]) -> None:
        rows = [vars(version) for version in versions.values()]
        text = json.dumps({"autopar_states": _FORMAT, "versions": rows})
        write_atomically(self.directory / _MANIFEST, text, durably=True)
        self.versions = dict(versions)


def memory_of(t: torch.Tensor) -> memoryview:
    """A dense tensor's bytes."""
    size = t.nbytes
    assert t.device.type == "cpu", "states on a drive are loaded to the host"
    if not size:
        return memoryview(b"")
    return memoryview((ctypes.c_char * size).from_address(t.data_ptr())).cast("B")


def _without(parts: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of parts after their first bytes."""
    left = []
    for part in parts:
        skipped = min(count, len(part))
        count -= skipped
        if skipped < len(part):
            left.append(part[skipped:])
    return left


def _read_manifest(path: Path) -> dict[int, Version]:
    """The versions of a manifest; none if there is no file.

    Raises:
        EngineError: it is damaged, or of another format.
    """
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read: {error}; remove its directory") from error
    if not isinstance(data, dict) or data.get("autopar_states") != _FORMAT:
        raise EngineError(f"{path} is no manifest of format {_FORMAT}; remove its directory")
    versions = (Version(**row) for row in data["versions"])
    return {version.steps: version for version in versions}
