"""Where nodes come from, recorded in a fraction of the time that torch takes.

`torch.export` symbolizes the whole stack for every node, in C++ and from source files, and keeps
the frames of `forward` methods; a fifth of a capture goes into that. Files and lines are enough
here. `torch.fx.proxy.CapturedTraceback` is private (tested with torch 2.13).
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch.fx.proxy

from autopar.tracer.modes import replaced


class _Stack:
    """Stands in for a `CapturedTraceback`."""

    def __init__(self, frames: traceback.StackSummary) -> None:
        self._frames = frames

    @staticmethod
    def extract() -> _Stack:
        """The frames of `forward` methods in the caller's stack, outermost first, without text."""
        frames = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_name == "forward":
                line = frame.f_lineno
                frames.append(traceback.FrameSummary(code.co_filename, line, "forward", line=""))
            frame = frame.f_back
        return _Stack(traceback.StackSummary.from_list(frames[::-1]))

    def summary(self) -> traceback.StackSummary:
        return self._frames


@contextmanager
def lines_only() -> Iterator[None]:
    """Record files and lines of nodes that are traced meanwhile, and no text."""
    with replaced(torch.fx.proxy, "CapturedTraceback", lambda original: _Stack):
        yield
