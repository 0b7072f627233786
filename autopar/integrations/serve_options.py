"""What the process that starts the ranks of a server shares with them, without torch's imports."""

from __future__ import annotations

import multiprocessing.util
import os
import sys
from dataclasses import dataclass
from typing import NoReturn

END_WITHIN_S = 3.0  # after a signal the process ends, whatever runs


@dataclass(frozen=True)
class ServeOptions:
    """
    Args:
        model: a folder with safetensors, or an id of the Hugging Face hub.
        mesh: of devices, as for `auto_engine`.
        memory: budget per device.
        precision: policy, as for `auto_engine`.
        quantization: scheme of `autopar.quantize`.
        host, port: that rank 0 listens on.
        warm_up: have programs for prompts of all lengths before the first request.
        batch: requests with the same options that are generated together, at most.
    """

    model: str
    mesh: str = "1"
    memory: str | None = None
    precision: str | None = None
    quantization: str | None = None
    host: str = "localhost"
    port: int = 8000
    warm_up: bool = True
    batch: int = 4


def leave(code: int = 0) -> NoReturn:
    """End the process without the seconds that torch and a model take to be freed."""
    sys.stdout.flush()
    sys.stderr.flush()
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]
    os._exit(code)
