"""A link to the host of stated bandwidth, emulated in this machine's memory."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Link:
    """A link of stated bandwidth: copies run one after another in a thread, and take their time."""

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth, self.nbytes = bandwidth, 0
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def copy(self, target: Any, source: Any) -> threading.Event:
        """Start a copy."""
        done = threading.Event()
        self.nbytes += target.nbytes
        self._jobs.put((target.detach(), source.detach(), done))
        return done

    def _run(self) -> None:
        import torch

        while True:
            target, source, done = self._jobs.get()
            start = time.perf_counter()
            with torch.no_grad():
                target.copy_(source)
            # the copy of this machine's memory is a part of it
            time.sleep(max(0.0, start + target.nbytes / self.bandwidth - time.perf_counter()))
            del target, source
            done.set()


@contextmanager
def emulated(link: Link) -> Iterator[None]:
    """autopar's copies to and from the host go over a link."""
    from autopar.comm import host_copies

    running: dict[int, threading.Event] = {}
    before = host_copies.copy, host_copies.wait

    def copy(target: Any, source: Any) -> None:
        running[target.untyped_storage()._cdata] = link.copy(target, source)

    def wait(target: Any) -> None:
        done = running.pop(target.untyped_storage()._cdata, None)
        if done is not None:
            done.wait()

    host_copies.copy, host_copies.wait = copy, wait  # type: ignore[assignment]
    try:
        yield
    finally:
        host_copies.copy, host_copies.wait = before
