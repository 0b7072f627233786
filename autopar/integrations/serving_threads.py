"""Threads for a server's requests: each waits for its own result."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class ThreadPerRequest:
    """In the place of the one thread that transformers' server generates in."""

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a function in a thread of its own."""
        future: Future[Any] = Future()

        def run() -> None:
            # its loop has ended, or nobody waits any more
            with contextlib.suppress(RuntimeError, asyncio.InvalidStateError):
                try:
                    result = function(*args, **kwargs)
                except Exception as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)

        threading.Thread(target=run, daemon=True).start()
        return future

    def async_submit(
        self, function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> asyncio.Future[Any]:
        """The same, to await."""
        return asyncio.wrap_future(self.submit(function, *args, **kwargs))
