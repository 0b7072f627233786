"""What a case is, how a rank runs one, and what counts as right, refused and wrong.

A case trains (or evaluates, saves, ...) a model by itself and the same model behind `wrap`, and
returns {what: largest difference between the two, or whether it holds}.
"""

from __future__ import annotations

import itertools
import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from autopar import auto_engine
from autopar.errors import AutoparError
from tests.clusters import eager_to_shard

TOLERANCE = 1e-9

Found = dict[str, float | bool]
# wrap(model, optimizer, **options of auto_engine) -> (engine, optimizer)
Wrap = Callable[..., tuple[Any, Any]]

# How a message tells what to do: a sentence, or a part of one, that begins with a verb.
_REMEDY = re.compile(
    r"(?:[;:.,(\n]|\band|\bor|\binstead)\s+(?:every rank must|add|build|call|choose|compute|"
    r"convert|drop|give|keep|leave|let|look|make|move|pass|plan|put|register|remove|replace|"
    r"return|run|save|seed|set|split|take|turn|use|wrap|write)\b",
    re.IGNORECASE,
)
# An error of Python or torch that autopar passes on under a class of its own is no refusal.
_CRASH = re.compile(
    r"(?:failed|one graph)[^:\n]*: (?:\w+\.)*(?:Type|Attribute|Key|Index|Assertion|Runtime|Value|"
    r"Name|NotImplemented|UnboundLocal|Recursion|Import)Error\b"
)


@dataclass(frozen=True)
class Case:
    """A script.

    Args:
        name: the function's, with its arguments.
        report: where the habit is reported, or who has it.
        body: called with `wrap` and the arguments.
        may_refuse: a clear refusal is as good as the right result.
        says: what the message of a refusal must have in it.
        dtype: the default while it runs.
        ends_apart: its ranks end at different places, and their processes with them.
    """

    name: str
    report: str
    body: Callable[..., Found]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    may_refuse: bool = False
    says: str = ""
    dtype: torch.dtype = torch.float64
    ends_apart: bool = False

    def accepts(self, outcome: Outcome) -> bool:
        """Whether the outcome is one that the case's report asks for."""
        refused = self.may_refuse and outcome.kind == "refused" and self.says in outcome.text
        return outcome.kind == "right" or refused

    def run(self, wrap: Wrap) -> Found:
        """Run it under its default dtype and the same seed on all ranks."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        torch.manual_seed(0)
        try:
            return self.body(wrap, **self.arguments)
        finally:
            torch.set_default_dtype(before)


@dataclass(frozen=True)
class Outcome:
    """What came of a case on all ranks.

    Args:
        kind: "right", "refused" or "wrong".
        text: what differs, or what was raised.
        out_of_step: ranks have stopped at different places, and may wait for each other.
    """

    kind: str
    text: str
    out_of_step: bool = False


CASES: dict[str, Case] = {}


def case(
    report: str,
    *,
    may_refuse: bool = False,
    says: str = "",
    dtype: torch.dtype = torch.float64,
    ends_apart: bool = False,
    **arguments: Sequence[Any],
) -> Callable[[Callable[..., Found]], Callable[..., Found]]:
    """Register a function as a case, or as one for each combination of its arguments' values.

    Args:
        report: where the habit is reported, or who has it.
        may_refuse: a clear refusal is as good as the right result.
        says: what the message of a refusal must have in it.
        dtype: the default while it runs.
        ends_apart: its ranks end at different places, and their processes with them.
        arguments: values by the names of the function's arguments.
    """

    def register(body: Callable[..., Found]) -> Callable[..., Found]:
        for values in itertools.product(*arguments.values()):
            given = dict(zip(arguments, values, strict=True))
            words = [v if isinstance(v, str) else f"{k}={v}" for k, v in given.items()]
            name = ", ".join([body.__name__, *words])
            assert name not in CASES, f"two cases are called {name!r}"
            CASES[name] = Case(name, report, body, given, may_refuse, says, dtype, ends_apart)
        return body

    return register


# -- on a rank ------------------------------------------------------------------------------------


def attempt(name: str, mesh: str | None) -> dict[str, Any]:
    """Run a case on this rank.

    Args:
        mesh: of the processes; None runs the script without autopar.

    Returns:
        {"found": ...}, or {"refused": whether autopar raised it, "error": its class and message,
        "where": the traceback}.
    """
    import tests.scripts.catalog  # noqa: F401 (registers the cases)

    def wrap(model: Any, optimizer: Any, **options: Any) -> tuple[Any, Any]:
        if mesh is None:
            return model, optimizer
        return auto_engine(model, optimizer, eager_to_shard(mesh), **options)

    try:
        return {"found": CASES[name].run(wrap)}
    except Exception as error:
        return {
            "refused": isinstance(error, AutoparError),
            "error": f"{type(error).__name__}: {error}",
            "where": traceback.format_exc(),
        }


def rank() -> int:
    """This process's rank; 0 for a script that runs by itself."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """The number of ranks."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def short_wait(seconds: float) -> Iterator[None]:
    """Ranks that do not come are given up after so many seconds."""
    from autopar.runtime import agreement

    before = agreement._WARN_AFTER_S, agreement._GIVE_UP_AFTER_S
    agreement._WARN_AFTER_S, agreement._GIVE_UP_AFTER_S = seconds / 2, seconds
    try:
        yield
    finally:
        agreement._WARN_AFTER_S, agreement._GIVE_UP_AFTER_S = before


# -- the verdict ----------------------------------------------------------------------------------


def outcome_of(answers: Sequence[Mapping[str, Any]]) -> Outcome:
    """The verdict on what `attempt` returned on each rank; {} of a rank that did not end."""
    for r, answer in enumerate(answers):
        if not answer:
            return Outcome("wrong", f"rank {r} crashed or hangs", True)
        if "error" in answer and not answer["refused"]:
            return Outcome("wrong", f"rank {r}: {answer['error']}\n{answer['where']}", True)
    refused = [r for r, answer in enumerate(answers) if "error" in answer]
    if refused:
        return _outcome_of_refusal({r: answers[r]["error"] for r in refused}, len(answers))
    bad = {
        f"rank {r}: {what}": value
        for r, answer in enumerate(answers)
        for what, value in answer["found"].items()
        if value is False or not (value is True or value <= TOLERANCE)
    }
    if bad or not all(answer["found"] for answer in answers):
        return Outcome("wrong", ", ".join(f"{k} {_shown(v)}" for k, v in bad.items()) or "empty")
    numbers = [v for a in answers for v in a["found"].values() if v is not True]
    return Outcome("right", f"largest difference {max(numbers, default=0.0):.1e}")


def _outcome_of_refusal(errors: Mapping[int, str], ranks: int) -> Outcome:
    """The verdict on refusals, by rank."""
    first = next(iter(errors.values()))
    if len(errors) < ranks:
        return Outcome("wrong", f"ranks {list(errors)} of {ranks} refuse: {first}", True)
    for error in errors.values():
        if _CRASH.search(error):
            return Outcome("wrong", f"a crash in the words of a refusal: {error}")
        if not _REMEDY.search(error):
            return Outcome("wrong", f"refused without a remedy: {error}")
    return Outcome("refused", first, out_of_step=len(set(errors.values())) > 1)


def _shown(value: float | bool) -> str:
    return "does not hold" if value is False else f"differs by {value:.3g}"
