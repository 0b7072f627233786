"""What planning tells of itself: a line for each stage, with the time that it took."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

log = logging.getLogger(__name__)

TIME_LIMIT = 90.0  # seconds of planning

Tell = Callable[[str], None]


@dataclass
class Stage:
    """A stage that runs.

    Attributes:
        done: what it has done, for the line at its end.
    """

    done: str


class Progress:
    """Tells of the stages of planning.

    Args:
        tell: called with a line when a stage ends; None tells nothing.
        begin: called with what runs now, for a terminal that shows it for the moment.

    Every line goes to the log of this module as well, what runs now at level DEBUG.
    """

    def __init__(self, tell: Tell | None = None, begin: Tell | None = None) -> None:
        self._tell, self._begin = tell, begin

    @staticmethod
    def of(progress: Progress | Tell | None) -> Progress:
        """A `Progress` for what a caller passes: one, a function of lines, or None."""
        return progress if isinstance(progress, Progress) else Progress(progress)

    def __call__(self, line: str) -> None:
        """Say what runs now: on a terminal for the moment, else in a line."""
        if self._begin is not None:
            self.detail(line)
        else:
            self.tell(line)

    def tell(self, line: str) -> None:
        """Tell what was done."""
        log.info("%s", line)
        if self._tell is not None:
            self._tell(line)

    def detail(self, line: str) -> None:
        """Say what a stage does meanwhile: to the log, and on a terminal for the moment."""
        log.debug("%s", line)
        if self._begin is not None:
            self._begin(line)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """A stage; its line is told unless it raises."""
        self.detail(f"{name} ...")
        stage, start = Stage(name), time.perf_counter()
        yield stage  # what returns from within it is told, too
        self.tell(f"{stage.done} ({seconds_text(time.perf_counter() - start)})")

    @contextmanager
    def as_one(self, name: str) -> Iterator[Stage]:
        """Stages that are told in one line; their own go to the log."""
        before, self._tell = self._tell, None
        try:
            with self.stage(name) as stage:
                yield stage
                self._tell = before  # for the line at the end
        finally:
            self._tell = before


SILENT = Progress()

_BAR = 20  # characters


class Bar:
    """Says which of a known number of steps runs, behind a bar that shows how many are done."""

    def __init__(self, say: Tell, steps: int) -> None:
        self._say, self._steps, self._done = say, steps, 0

    def __call__(self, line: str) -> None:
        """The next step begins."""
        self.at(self._done, line)

    def at(self, step: int, line: str) -> None:
        """This step begins, and those before it are done or left out."""
        share = min(1.0, step / self._steps)
        full = round(_BAR * share)
        self._say(f"[{'=' * full}{' ' * (_BAR - full)}] {share:4.0%}  {line}")
        self._done = step + 1


@dataclass(frozen=True)
class Deadline:
    """The time that several stages share.

    Args:
        seconds: in all.
        clock: processor time of this process unless it says otherwise, so that what is found does
            not depend on other work on the machine.
        end: by the clock; after these seconds unless it says otherwise.
    """

    seconds: float
    clock: Callable[[], float] = time.process_time
    end: float = field(default=math.nan, compare=False)

    def __post_init__(self) -> None:
        if math.isnan(self.end):
            object.__setattr__(self, "end", self.clock() + self.seconds)

    @property
    def left(self) -> float:
        """Seconds; 0 afterwards."""
        return max(0.0, self.end - self.clock())

    @property
    def over(self) -> bool:
        return self.left == 0.0

    def without(self, seconds: float) -> Deadline:
        """One that ends so much earlier, for what leaves time to something else."""
        return replace(self, end=self.end - seconds)

    def share(self, parts: int) -> float:
        """The seconds for each of the parts that are still to do, if they get equal ones."""
        return self.left / max(1, parts)


def seconds_text(seconds: float) -> str:
    """`1.2 s`, `0.04 s`, `3 min 20 s`."""
    if seconds >= 100:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds:.2f} s"


def silent_if_false(progress: Any, default: Tell) -> Tell | None:
    """The function of lines that an option asks for: the default for True, none for False or None.

    Raises:
        TypeError: it is neither of these, nor a function.
    """
    if progress is True:
        return default
    if progress is False or progress is None:
        return None
    if not callable(progress):
        raise TypeError(
            f"progress must be a function of one line, True or False, got {progress!r}; pass "
            "progress=print"
        )
    return progress
