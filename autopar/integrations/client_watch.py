"""Whether the client of a request is still there.

A web application hears that a client has left only where it reads from it, and transformers'
server reads the request once, at its begin. So everything is read here, from begin to end.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from typing import Any

_Message = MutableMapping[str, Any]
_LEFT: ContextVar[threading.Event | None] = ContextVar("left", default=None)
_GONE = "http.disconnect"


def client_left() -> threading.Event | None:
    """What is set when the client of the request that is being answered has left; None outside of a
    request."""
    return _LEFT.get()


class ClientWatch:
    """Middleware (ASGI) that reads what a client sends, until it leaves or has its answer."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(
        self,
        scope: _Message,
        receive: Callable[[], Awaitable[_Message]],
        send: Callable[[_Message], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        left = threading.Event()
        messages: asyncio.Queue[_Message] = asyncio.Queue()

        async def read() -> None:
            message: _Message = {"type": ""}
            while message["type"] != _GONE:
                message = await receive()
                if message["type"] == _GONE:
                    left.set()
                messages.put_nowait(message)

        async def received() -> _Message:
            if left.is_set() and messages.empty():  # it is told as often as it is asked
                return {"type": _GONE}
            return await messages.get()

        reader = asyncio.create_task(read())
        token = _LEFT.set(left)
        try:
            await self._app(scope, received, send)
        finally:
            _LEFT.reset(token)
            reader.cancel()
