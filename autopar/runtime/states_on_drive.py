"""An optimizer whose state is on a drive, and is stepped on the host, chunk by chunk.

A chunk is a part of the parameters with all of their state. While one is stepped, the next is read
and those before are written, as a new version (`chunk_files.py`). When all are written, the new
version is complete and takes the place of the old one. If a write fails, the old one is loaded
again: nothing is lost, and the step may be repeated.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autopar.errors import EngineError
from autopar.runtime.chunk_files import ChunkFiles, Version
from autopar.runtime.chunk_moves import Chunk, ChunkMoves, Item, free
from autopar.runtime.chunks import StoredShard, is_away, partition


class StatesOnDrive:
    """The state of an optimizer over this rank's shards.

    Args:
        optimizer: in whose groups and state shards are while it steps.

    Attributes:
        steps: of the optimizer, in the version that is complete.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, files: ChunkFiles) -> None:
        self._own, self._files = weakref.ref(optimizer), files
        self.steps = 0
        self._names: dict[torch.Tensor, str] = {}
        self._chunks: list[Chunk] = []
        self._stand_ins: list[StoredShard] = []
        self._version: Version | None = None
        self._slot = 0  # that is being written
        self._all: list[list[torch.Tensor]] | None = None  # shards by group, while a step runs
        self._moves = ChunkMoves(files)
        self._stepped = False  # parameters may differ from the complete version
        self._accepted: set[int] = set()  # chunks of the step that runs

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._own()
        assert optimizer is not None
        return optimizer

    # -- a step --------------------------------------------------------------------------------

    def begin(
        self, names: Mapping[torch.Tensor, str], accept: Callable[[], Collection[int]]
    ) -> None:
        """Step all chunks but the last one, and leave that to the optimizer.

        Args:
            names: of parameters, by their shards.
            accept: takes over chunks that were stepped and written beside the backward, and gives
                their numbers; nothing if states are not those of the complete version.

        Raises:
            EngineError: the states cannot be read or written; they are as before.
        """
        groups = self._optimizer.param_groups
        self._all, self._names = [group["params"] for group in groups], dict(names)
        try:
            self._accepted = set(accept())
            self._stepped = bool(self._accepted)
            if not self._accepted:
                self._follow()
            self._start(self.steps)
            self._stepped = True
            for chunk in self._chunks:
                if chunk.number in self._accepted:
                    self._moves.written[chunk.number] = self._items(chunk)
            for chunk in self._left[:-1]:
                self._load(chunk)
                self._select(chunk.shards)
                with torch.no_grad():
                    inspect.unwrap(type(self._optimizer).step)(self._optimizer)
                self._store(chunk)
            for chunk in self._left[-1:]:
                self._load(chunk)
            self._select([shard for chunk in self._left[-1:] for shard in chunk.shards])
        except BaseException as error:
            self.roll_back()
            if isinstance(error, OSError):
                raise self._unwritten(error) from error
            raise

    def end(self) -> None:
        """Write the last chunk, and declare the new version complete.

        Raises:
            EngineError: that failed; the states are as before the step.
        """
        if self._all is None:
            return
        try:
            for chunk in self._left[-1:]:
                self._store(chunk)
            self._commit(self.steps + 1)
        except BaseException as error:
            self.roll_back()
            if isinstance(error, OSError):
                raise self._unwritten(error) from error
            raise
        self._restore_groups()

    def roll_back(self) -> None:
        """Return to the version that is complete, from a step that failed.

        Raises:
            EngineError: that cannot be read.
        """
        if self._all is None:
            return
        self._moves.settle()
        try:
            self._reload()
        except OSError as error:
            raise EngineError(
                f"the states after step {self.steps} cannot be read from {self._files.directory}: "
                f"{error.strerror or error}. Those in memory are a mixture of two steps: begin "
                "anew, with resume=True if the files can be read then, else from a checkpoint"
            ) from error
        finally:
            self._restore_groups()

    def _reload(self) -> None:
        """Load the version that is complete."""
        state, version = self._optimizer.state, self._version
        for chunk in self._chunks if self._stepped else ():
            assert version is not None
            free(item.tensor for item in self._items(chunk) if item.key)
            for shard in chunk.shards:
                state.pop(shard, None)
                numbers = version.numbers.get(self._names[shard])
                if numbers:
                    state[shard].update({k: _number(x) for k, x in numbers.items()})
            shards = {self._names[shard]: shard for shard in chunk.shards}
            for item in chunk.held:
                if item.key:
                    state[shards[item.parameter]][item.key] = item.tensor
            parts = [item.tensor.nbytes if item.key else item.tensor for item in chunk.held]
            self._files.read(chunk.number, version.slot, parts).result()
            chunk.held = [item._replace(counter=item.tensor._version) for item in chunk.held]

    def _unwritten(self, error: OSError) -> EngineError:
        return EngineError(
            f"the states after step {self.steps + 1} cannot be written to "
            f"{self._files.directory}: {error.strerror or error}. Nothing is lost: parameters and "
            f"the optimizer's state are those after step {self.steps} (without what was written "
            "to them since), and gradients are there still. Free space, and call "
            "optimizer.step() again"
        )

    @property
    def _left(self) -> list[Chunk]:
        """Those that the step itself steps."""
        return [chunk for chunk in self._chunks if chunk.number not in self._accepted]

    def _select(self, chosen: Sequence[torch.Tensor]) -> None:
        assert self._all is not None
        own = set(map(id, chosen))
        for group, shards in zip(self._optimizer.param_groups, self._all, strict=True):
            group["params"] = [shard for shard in shards if id(shard) in own]

    def _restore_groups(self) -> None:
        if self._all is not None:
            for group, shards in zip(self._optimizer.param_groups, self._all, strict=True):
                group["params"] = shards
        self._all, self._stepped, self._accepted = None, False, set()

    # -- beside the backward -------------------------------------------------------------------

    def partition(
        self, state: Mapping[torch.Tensor, Mapping[str, Any]]
    ) -> list[list[torch.Tensor]]:
        """The shards of each chunk; nothing if states are not those of the complete version, on the
        drive alone.

        Args:
            state: of all shards, in the order of the optimizer.
        """
        known = [shard for chunk in self._chunks for shard in chunk.shards]
        if list(map(id, state)) != list(map(id, known)) or not self.is_unchanged(state):
            return []
        return [list(chunk.shards) for chunk in self._chunks]

    def is_unchanged(self, state: Mapping[torch.Tensor, Mapping[str, Any]]) -> bool:
        """Whether states are those of the complete version, on the drive alone."""
        held = (item.tensor for chunk in self._chunks for item in chunk.held if item.key)
        return self._version is not None and not self._changed(state) and all(map(is_away, held))

    def read(self, number: int, state: Mapping[torch.Tensor, Mapping[str, torch.Tensor]]) -> None:
        """Read the state of a chunk of the complete version into other tensors.

        Args:
            state: these, by shard.
        """
        assert self._version is not None
        chunk = self._chunks[number]
        own = {self._names[shard]: state[shard] for shard in chunk.shards}
        parts = [
            own[item.parameter][item.key] if item.key else item.tensor.nbytes for item in chunk.held
        ]
        self._files.read(number, self._version.slot, parts).result()

    def write(self, number: int, tensors: Sequence[torch.Tensor]) -> None:
        """Write a chunk of the next version, in the order of its items."""
        self._files.keep_only(self.steps)
        self._files.write(number, self._files.free_slot(), tensors).result()

    # -- going on ------------------------------------------------------------------------------

    def resume(
        self, names: Mapping[torch.Tensor, str], version: Version
    ) -> dict[torch.Tensor, dict[str, Any]]:
        """Load the parameters of a complete version; its state is loaded when it is needed.

        Args:
            names: of parameters, by their shards, in the order of the optimizer.

        Returns:
            the state of each shard.

        Raises:
            EngineError: the version is of other parameters.
        """
        self._names = dict(names)
        self._chunks = [Chunk(k, part, []) for k, part in enumerate(partition(list(names)))]
        own = [[name, list(shard.shape), str(shard.dtype)] for shard, name in names.items()]
        rows = [[row[0], row[2], row[4]] for rows in version.chunks for row in rows if not row[1]]
        if own != rows or len(self._chunks) != len(version.chunks):
            pairs = zip_longest([*own, None], [*rows, None])
            differing = next((a, b) for a, b in pairs if a != b)
            raise EngineError(
                f"the states in {self._files.directory} are of other parameters than this "
                f"rank's: {differing[1]} instead of {differing[0]}; resume with the same model, "
                "mesh and plan, or remove the directory"
            )
        state: dict[torch.Tensor, dict[str, Any]] = {}
        for chunk, chunk_rows in zip(self._chunks, version.chunks, strict=True):
            shards = {names[shard]: shard for shard in chunk.shards}
            for name, key, shape, stride, dtype in chunk_rows:
                t = shards[name]
                if key:
                    t = torch.empty_strided(shape, stride, dtype=_dtype(dtype))
                    state.setdefault(shards[name], {})[key] = t
                chunk.held.append(Item(name, key, t, t._version))
            parts = [item.tensor.nbytes if item.key else item.tensor for item in chunk.held]
            self._files.read(chunk.number, version.slot, parts).result()
            free(item.tensor for item in chunk.held if item.key)
        for shard, name in names.items():
            numbers = version.numbers.get(name)
            if numbers:
                own_state = state.setdefault(shard, {})
                state[shard] = {k: _number(x) for k, x in numbers.items()} | own_state
        self._files.keep_only(version.steps)
        self._version, self.steps = version, version.steps
        return state

    # -- versions ------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Write what was changed since the complete version (parameters that were loaded, another
        state), so that it can be returned to."""
        assert self._all is not None
        shards = [shard for group in self._all for shard in group]
        known = [shard for chunk in self._chunks for shard in chunk.shards]
        if list(map(id, shards)) != list(map(id, known)):
            self.load_all()
            self._chunks = [Chunk(k, part, []) for k, part in enumerate(partition(shards))]
            self._version = None
        if self._version is not None and not self._changed(self._optimizer.state):
            return
        self._start(None if self._version is None else self.steps)
        items = (item for chunk in self._chunks for item in self._items(chunk))
        self._moves.only_here = {id(item.tensor) for item in items if not is_away(item.tensor)}
        for chunk in self._chunks:
            self._load(chunk)
            self._store(chunk)
        self._commit(self.steps)

    def _changed(self, state: Mapping[torch.Tensor, Mapping[str, Any]]) -> bool:
        assert self._version is not None
        for chunk in self._chunks:
            items = self._items(chunk, state)
            held = [(id(item.tensor), item.counter) for item in chunk.held]
            if [(id(item.tensor), item.counter) for item in items] != held:
                return True
        return bool(self._numbers(state) != self._version.numbers)

    def _start(self, steps: int | None) -> None:
        """Begin a version, in the slot that the version of so many steps is not in."""
        self._files.keep_only(steps)
        self._slot = self._files.free_slot()
        self._start_reading(0)

    def _commit(self, steps: int) -> None:
        """Declare the version that was written complete."""
        self._moves.finish_writing()
        written = self._moves.written
        version = Version(
            steps, self._slot, [[item.row for item in written[c.number]] for c in self._chunks],
            self._numbers(self._optimizer.state),
        )  # fmt: skip
        self._files.commit(version)
        self._version, self.steps = version, steps
        self._moves.only_here.clear()
        for chunk in self._chunks:
            chunk.held = written.pop(chunk.number)
            free(item.tensor for item in chunk.held if item.key)

    def _numbers(
        self, state: Mapping[torch.Tensor, Mapping[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """The state that is in no file, by name of the parameter and key."""
        return {
            self._names[shard]: {
                key: [value.item(), str(value.dtype)] if isinstance(value, torch.Tensor) else value
                for key, value in state[shard].items()
                if not isinstance(value, torch.Tensor) or not value.ndim
            }
            for chunk in self._chunks
            for shard in chunk.shards
            if state.get(shard)
        }

    def _items(
        self, chunk: Chunk, state: Mapping[torch.Tensor, Mapping[str, Any]] | None = None
    ) -> list[Item]:
        """What a chunk has now; with the state of the optimizer if None."""
        items, state = [], self._optimizer.state if state is None else state
        for shard in chunk.shards:
            name = self._names[shard]
            items.append(Item(name, "", shard, shard._version))
            for key, value in state.get(shard, {}).items():
                if isinstance(value, torch.Tensor) and value.ndim:
                    items.append(Item(name, key, value, value._version))
        return items

    # -- moving chunks -------------------------------------------------------------------------

    def _start_reading(self, number: int) -> None:
        """Read a chunk of the complete version, if there is one that the step needs."""
        if self._version is None or not 0 <= number < len(self._chunks):
            return
        if number not in self._accepted:
            self._moves.start_reading(self._chunks[number], self._version.slot)

    def _load(self, chunk: Chunk) -> None:
        """Wait for a chunk, while the next is read."""
        self._start_reading(chunk.number)
        self._moves.make_room(chunk.number)
        self._start_reading(chunk.number + 1)
        self._moves.finish_reading(chunk.number)

    def _store(self, chunk: Chunk) -> None:
        """Start to write a chunk."""
        self._moves.start_writing(chunk.number, self._slot, self._items(chunk))

    def load_all(self) -> None:
        """Load the state into memory, for whoever reads it as a whole."""
        for chunk in self._chunks:
            self._start_reading(chunk.number)
        for chunk in self._chunks:
            self._moves.finish_reading(chunk.number)
        for stored in self._stand_ins:
            stored.reload()
        self._stand_ins.clear()

    def stand_in(self, owners: Mapping[torch.Tensor, Mapping[str, Any]]) -> None:
        """Let DTensors of the state load it if they are used between steps.

        Args:
            owners: the state of each shard's parameter, as DTensors.
        """
        self._stand_ins.clear()
        for chunk in self._chunks:
            shards = {self._names[shard]: shard for shard in chunk.shards}
            for item in chunk.held:
                owner = owners.get(shards[item.parameter], {}).get(item.key)
                if not isinstance(owner, DTensor) or not is_away(item.tensor):
                    continue
                if owner._local_tensor is item.tensor:
                    stored = StoredShard(item.tensor, item.tensor, weakref.ref(owner))
                    stored.load = partial(self._load_tensor, item.tensor)
                    owner._local_tensor = stored
                    self._stand_ins.append(stored)

    def _load_tensor(self, t: torch.Tensor) -> None:
        """Load the chunk that has a tensor now; chunks follow the optimizer's parameters."""
        for chunk in self._chunks if is_away(t) else ():
            if any(item.tensor is t for item in chunk.held):
                self._start_reading(chunk.number)
                self._moves.finish_reading(chunk.number)
                return


def _number(value: Any) -> Any:
    """Inverse of how a manifest has it."""
    if isinstance(value, list):
        return torch.tensor(value[0], dtype=_dtype(value[1]))
    return value


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name.removeprefix("torch."))
    return dtype
