"""A pool of Gloo processes that lives for the test session and runs functions on all ranks."""

from __future__ import annotations

import functools
import importlib
import os
import random
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 480

# What a rank's first step imports, in several times the seconds of the step.
_IMPORTED = (
    "autopar.runtime.auto_engine",
    "autopar.runtime.engine",
    "torch._inductor.codecache",
    "torch.distributed.checkpoint",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.vit.modeling_vit",
)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


class _Nursery:
    """A process that has imported what ranks need, and forks them."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_nurse, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def fork(self, *arguments: Any) -> tuple[int, Connection]:
        """A rank's process, and a pipe to it."""
        mine, theirs = mp.Pipe()
        self._pipe.send(("fork", arguments))
        reduction.send_handle(self._pipe, theirs.fileno(), self._process.pid)
        theirs.close()
        return self._pipe.recv(), mine

    def kill(self, pid: int) -> None:
        self._pipe.send(("kill", pid))
        self._pipe.recv()


def _nurse(pipe: Connection) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    for module in _IMPORTED:
        with suppress(ImportError):  # some tests do without
            importlib.import_module(module)
    while True:
        try:
            what, argument = pipe.recv()
        except EOFError:
            return
        if what == "kill":  # a process that has ended keeps its number until somebody waits for it
            os.kill(argument, signal.SIGKILL)
            os.waitpid(argument, 0)
            pipe.send(None)
            continue
        handle = reduction.recv_handle(pipe)
        pid = os.fork()
        if not pid:
            pipe.close()
            with suppress(BrokenPipeError):  # nobody waits for the answer any more
                _serve(Connection(handle), *argument)
            os._exit(0)
        os.close(handle)
        pipe.send(pid)


@functools.cache
def _nurseries() -> tuple[_Nursery, ...]:
    """Two, so that ranks differ in the seed of their hashes, and with it in the order of sets."""
    return _Nursery(), _Nursery()


def _serve(pipe: Connection, rank: int, world: int, meet: str, launched: bool) -> None:
    torch.set_num_threads(1)
    random.seed()  # the nursery's state is that of all its ranks
    np.random.seed()
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    if not launched:
        os.environ.update(place)
        files = dist.FileStore(meet, world)
        dist.init_process_group("gloo", store=files, rank=rank, world_size=world)
    elif world > 1:
        os.environ.update(
            place, LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT=meet,
            TORCHELASTIC_RUN_ID="none",
        )  # fmt: skip
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        if task is None:
            break
        function, args, last = task
        try:
            answer = "ok", function(*args)
        except BaseException:
            answer = "error", traceback.format_exc()
        pipe.send(answer)
        if last:
            os._exit(0)
    if dist.is_initialized():  # a script may have ended it
        dist.destroy_process_group()


class Pool:
    """`run(function, *args)` on every rank; results by rank. The function must be importable.

    Args:
        launched: leave ranks as a launcher starts them, for a library to find their group; a single
            one is a script that was started without.
    """

    def __init__(self, world: int, *, launched: bool = False) -> None:
        self.world, self._launched = world, launched
        self._folder = tempfile.TemporaryDirectory()
        self._start()

    def _start(self) -> None:
        store = os.path.join(self._folder.name, f"store{os.urandom(4).hex()}")
        meet = str(_free_port()) if self._launched else store
        self._pipes, self._processes = [], []
        for rank in range(self.world):
            nursery = _nurseries()[rank % 2]
            pid, pipe = nursery.fork(rank, self.world, meet, self._launched)
            self._pipes.append(pipe)
            self._processes.append((nursery, pid))

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        timeout: float = TIMEOUT_S,
        last: bool = False,
    ) -> list[Any]:
        """What the ranks return.

        Args:
            last: each rank ends when it has answered, which the others may notice; then there are
                new ones.
        """
        for pipe in self._pipes:
            pipe.send((function, args, last))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout):
                self.restart()
                raise TimeoutError(f"rank {rank} did not answer within {timeout} s")
            try:
                results.append(pipe.recv())
            except EOFError:
                results.append(("error", "its process died"))
        errors = [f"rank {r}:\n{text}" for r, (kind, text) in enumerate(results) if kind == "error"]
        if errors or last:
            self.restart()  # the others may wait in a collective, or be out of step
        if errors:
            raise AssertionError("\n".join(errors))
        return [value for _, value in results]

    def restart(self) -> None:
        self._kill()
        self._start()

    def _kill(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for nursery, pid in self._processes:
            nursery.kill(pid)

    def close(self) -> None:
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(None)
                pipe.poll(10)  # its end, when the process has left the group
        self._kill()
        self._folder.cleanup()


def assert_rank_1_stops_rank_0(two: Pool, task: Callable[..., Any]) -> None:
    """Rank 1 dies in `task`, and rank 0 says so instead of waiting for it."""
    try:
        two.run(task)
    except AssertionError as failed:
        survivor, dead = str(failed).split("rank 1:")
    else:
        raise AssertionError("no rank died")
    assert "EngineError" in survivor
    assert "Another rank has died" in survivor
    assert "its process died" in dead
