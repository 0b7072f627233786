"""What several commands share: defaults, progress on stderr, errors as messages."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

import typer

DEFAULT_DEVICE = "A100-80G"

# those of `autopar.planner.optimizer_state`, whose import takes seconds
OPTIMIZERS = ("adamw", "adam", "adafactor", "momentum", "sgd")


def check_optimizer(optimizer: str) -> None:
    """Raises ValueError if the optimizer is unknown."""
    if optimizer.lower() not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}; known: {', '.join(OPTIMIZERS)}")


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that reports the current stage: a spinner on a terminal, else lines on stderr.
    What a model file prints meanwhile goes to stderr."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        with contextlib.redirect_stdout(sys.stderr):
            yield lambda line: console.print(line, markup=False, soft_wrap=True)
        return
    with console.status("autopar ...") as status, contextlib.redirect_stdout(sys.stderr):
        yield lambda line: status.update(line)


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
