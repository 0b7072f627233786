"""A pool of Gloo processes that lives for the test session and runs functions on all ranks."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 480


def _serve(rank: int, world: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    while True:
        task = pipe.recv()
        if task is None:
            break
        function, args = task
        try:
            pipe.send(("ok", function(*args)))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
    dist.destroy_process_group()


class Pool:
    """`run(function, *args)` on every rank; results by rank. The function must be importable."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._folder = tempfile.TemporaryDirectory()
        self._start()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        store = os.path.join(self._folder.name, f"store{os.urandom(4).hex()}")
        self._pipes, self._processes = [], []
        for rank in range(self.world):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world, store, theirs), daemon=True
            )
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT_S
    ) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, args))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout):
                self.restart()
                raise TimeoutError(f"rank {rank} did not answer within {timeout} s")
            results.append(pipe.recv())
        errors = [f"rank {r}:\n{text}" for r, (kind, text) in enumerate(results) if kind == "error"]
        if errors:
            self.restart()  # the others may wait in a collective, or be out of step
            raise AssertionError("\n".join(errors))
        return [value for _, value in results]

    def restart(self) -> None:
        self._kill()
        self._start()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
        self._kill()
        self._folder.cleanup()
