"""Chunks of an optimizer's state on their way between a drive and memory: read ahead of their use,
written behind it."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from autopar.runtime.chunk_files import ChunkFiles
from autopar.runtime.chunks import is_away

_WRITTEN = 2  # chunks that may be in memory while they are written


class Item(NamedTuple):
    """A tensor of a chunk's file.

    Args:
        parameter: its name.
        key: of its state; empty for the parameter itself.
        tensor: this rank's shard.
        counter: of writes to the tensor, at the time that the item tells of.
    """

    parameter: str
    key: str
    tensor: torch.Tensor
    counter: int

    @property
    def row(self) -> list[Any]:
        """What it is, as plain data."""
        t = self.tensor
        return [self.parameter, self.key, list(t.shape), list(t.stride()), str(t.dtype)]


@dataclass
class Chunk:
    """
    Args:
        number: of its file.
        shards: its parameters.
        held: what its file of the complete version has.
    """

    number: int
    shards: list[torch.Tensor]
    held: list[Item]


class ChunkMoves:
    """Reads and writes that are under way.

    Args:
        files: of the chunks.

    Attributes:
        written: what was written of each chunk of a version, by number.
        only_here: ids of tensors that no complete version has as they are; they stay in memory.
    """

    def __init__(self, files: ChunkFiles) -> None:
        self._files = files
        self._reading: dict[int, Future[None]] = {}
        self._writing: dict[int, tuple[list[Item], Future[None]]] = {}
        self.written: dict[int, list[Item]] = {}
        self.only_here: set[int] = set()

    def start_reading(self, chunk: Chunk, slot: int) -> None:
        """Read what is on the drive alone, unless that is under way."""
        if chunk.number in self._reading:
            return
        parts = []
        for item in chunk.held:
            away = is_away(item.tensor)
            if away:
                item.tensor.untyped_storage().resize_(item.tensor.nbytes)
            parts.append(item.tensor if away else item.tensor.nbytes)
        if any(isinstance(part, torch.Tensor) for part in parts):
            self._reading[chunk.number] = self._files.read(chunk.number, slot, parts)

    def finish_reading(self, number: int) -> None:
        """Wait for a chunk, if it is read."""
        if (future := self._reading.pop(number, None)) is not None:
            future.result()

    def start_writing(self, number: int, slot: int, items: list[Item]) -> None:
        """Write a chunk of a version."""
        future = self._files.write(number, slot, [item.tensor for item in items])
        self._writing[number] = items, future

    def make_room(self, number: int) -> None:
        """Wait until few chunks before one are in memory."""
        self._finish_writing(number - _WRITTEN)

    def finish_writing(self) -> None:
        """Wait until all chunks are written, and free their state."""
        for number in list(self._writing):
            self._finish_writing(number)

    def _finish_writing(self, number: int) -> None:
        if number in self._writing:
            items, future = self._writing[number]
            future.result()
            del self._writing[number]
            free(t for _, key, t, _ in items if key and id(t) not in self.only_here)
            self.written[number] = items

    def settle(self) -> None:
        """Wait for all reads and writes, whatever becomes of them."""
        for future in (*self._reading.values(), *(f for _, f in self._writing.values())):
            future.exception()
        self._reading.clear()
        self._writing.clear()
        self.written.clear()
        self.only_here.clear()


def free(tensors: Iterable[torch.Tensor]) -> None:
    """Release the memory of tensors that are on a drive."""
    for t in tensors:
        storage = t.untyped_storage()
        if storage.resizable() and storage.nbytes() == t.nbytes:
            storage.resize_(0)
