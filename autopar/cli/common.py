"""What several commands share: defaults, progress on stderr, errors as messages."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import typer

from autopar.progress import Progress

_SHOW_CURSOR = "\x1b[?25h\n"  # which a spinner hides

_MOST_DEVICES = 2**20  # a search takes longer for more, and no cluster has them
_MOST_PROCESSES = 2**10

DEFAULT_DEVICE = "A100-80G"

# those of `autopar.planner.optimizer_state`, whose import takes seconds
OPTIMIZERS = ("adamw", "adam", "adafactor", "momentum", "sgd")


def check_optimizer(optimizer: str) -> None:
    """Raises ValueError if the optimizer is unknown."""
    if optimizer.lower() not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}; known: {', '.join(OPTIMIZERS)}")


def check_devices(what: str, devices: int, *, started: bool = False) -> None:
    """Refuse a mesh that is larger than any machine.

    Args:
        what: has the devices.
        started: whether this host starts a process for each.

    Raises:
        ValueError: with both numbers.
    """
    if started and devices > _MOST_PROCESSES:
        raise ValueError(
            f"{what} has {devices:,} devices, and one host starts a process for each of at most "
            f"{_MOST_PROCESSES:,}; on several hosts, torchrun starts them"
        )
    if devices > _MOST_DEVICES:
        raise ValueError(
            f"{what} has {devices:,} devices, and plans are made for at most {_MOST_DEVICES:,}"
        )


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """Tells of the stages on stderr, a line each; on a terminal a spinner shows the one that runs.
    What a model file prints meanwhile goes to stderr."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)

    def tell(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    if not console.is_terminal:
        with contextlib.redirect_stdout(sys.stderr):
            yield Progress(tell)
        return
    with console.status("autopar ...") as status, contextlib.redirect_stdout(sys.stderr):
        yield Progress(tell, status.update)


@contextlib.contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """While on, Ctrl-C ends the process at once, with code 130. An exception would take seconds, to
    free a large search space, and torch may abort where one passes through its C++."""

    def end(number: int, frame: FrameType | None) -> None:
        if solver := sys.modules.get("autopar.solver.linear_program"):
            solver.stop_processes()
        if sys.stderr.isatty():
            sys.stderr.write(_SHOW_CURSOR)
        sys.stderr.flush()
        os._exit(128 + number)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, or somebody else's
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def short_errors(*also: type[Exception]) -> Iterator[None]:
    """Show errors that a user can act upon as a message and an exit code, not as a traceback.

    The exit code is 1 if the model cannot be captured or nothing fits the memory, else 2.

    Args:
        also: exceptions besides autopar's own.
    """
    from autopar.errors import AutoparError, CaptureError, InfeasibleError

    shown: tuple[type[Exception], ...] = (AutoparError, *also)
    try:
        yield
    except (CaptureError, InfeasibleError) as error:
        _fail(error, 1)
    except shown as error:
        _fail(error, 2)


def _fail(error: Exception, code: int) -> NoReturn:
    print(f"autopar: {error}", file=sys.stderr)
    raise typer.Exit(code) from error
