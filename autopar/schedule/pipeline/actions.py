"""The actions of a pipeline, and a schedule as the order in which each rank runs them.

Text and CSV are those of `torch.distributed.pipelining` (its compute-only format): torch reads what
`PipelineSchedule.write_csv` writes, and `read_csv` reads what torch's `_dump_csv` writes.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from autopar.errors import PlanError
from autopar.files import write_atomically


class Kind(StrEnum):
    """What an action computes for one stage and one microbatch."""

    FORWARD = "F"
    BACKWARD = "B"  # INPUT and WEIGHT in one
    INPUT = "I"  # gradients of the stage's inputs, which the previous stage waits for
    WEIGHT = "W"  # gradients of its parameters, which nobody waits for


_ACTION = re.compile(r"(\d+)([FBIW])(\d+)", re.ASCII)
# A forward and a backward that torch runs as one action.
_PAIR = re.compile(r"\(([^;()]+);([^;()]+)\)OVERLAP_F_B")


class Action(NamedTuple):
    """One computation of a stage on a microbatch; prints and parses as `2F0`."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @staticmethod
    def parse(text: str) -> Action:
        """The reverse of `str`."""
        match = _ACTION.fullmatch(text.strip())
        if not match:
            raise PlanError(
                f"{text!r} is not an action of a pipeline; write stage, kind (F, B, I or W) and"
                " microbatch, such as 2F0"
            )
        return Action(int(match[1]), Kind(match[2]), int(match[3]))


@dataclass(frozen=True)
class PipelineSchedule:
    """The order of actions on every rank. Whether it can run is for `check` to say.

    Args:
        stages: how many stages the model has. Each is on exactly one rank.
        microbatches: into how many parts the batch is split.
        ranks: by pipeline rank, its actions in order.
    """

    name: str
    stages: int
    microbatches: int
    ranks: tuple[tuple[Action, ...], ...]

    def __post_init__(self) -> None:
        rank_of: dict[int, int] = {}
        if not self.ranks:
            raise PlanError(f"pipeline schedule {self.name} has no ranks; add one with its actions")
        for rank, actions in enumerate(self.ranks):
            if not actions:
                raise PlanError(
                    f"pipeline schedule {self.name}: rank {rank} of {len(self.ranks)} has no"
                    " actions; give it a stage, or leave it out"
                )
            for action in actions:
                stage, _, microbatch = action
                if not (0 <= stage < self.stages and 0 <= microbatch < self.microbatches):
                    raise PlanError(
                        f"pipeline schedule {self.name}: rank {rank} runs {action}, but there are"
                        f" {self.stages} stages and {self.microbatches} microbatches, counted from"
                        " 0; correct the action or these numbers"
                    )
                if rank_of.setdefault(stage, rank) != rank:
                    raise PlanError(
                        f"pipeline schedule {self.name}: stage {stage} is on ranks"
                        f" {rank_of[stage]} and {rank} (in {action}); keep all its actions on one"
                    )
        missing = next((s for s in range(self.stages) if s not in rank_of), None)
        if missing is not None:
            raise PlanError(
                f"pipeline schedule {self.name}: no rank runs stage {missing} of {self.stages};"
                " add its actions to a rank"
            )

    def __hash__(self) -> int:
        # Schedules are keys of caches and have thousands of actions; equal ones have equal sizes.
        return hash((self.name, self.stages, self.microbatches, len(self.ranks)))

    @cached_property
    def rank_of_stage(self) -> tuple[int, ...]:
        """By stage, the rank that runs it."""
        rank_of = {action.stage: r for r, actions in enumerate(self.ranks) for action in actions}
        return tuple(rank_of[stage] for stage in range(self.stages))

    @cached_property
    def stages_of_rank(self) -> tuple[tuple[int, ...], ...]:
        """By rank, its stages in ascending order."""
        return tuple(
            tuple(s for s, owner in enumerate(self.rank_of_stage) if owner == rank)
            for rank in range(len(self.ranks))
        )

    @cached_property
    def trains(self) -> bool:
        """Whether it has backwards; otherwise it evaluates."""
        return any(action.kind is not Kind.FORWARD for row in self.ranks for action in row)

    def forwards(self) -> PipelineSchedule:
        """The same without backwards: evaluates stages on the same ranks."""
        ranks = tuple(tuple(a for a in row if a.kind is Kind.FORWARD) for row in self.ranks)
        return PipelineSchedule(f"{self.name} forwards", self.stages, self.microbatches, ranks)

    def __str__(self) -> str:
        """One line per rank, with actions separated by spaces."""
        return "\n".join(" ".join(map(str, actions)) for actions in self.ranks)

    @staticmethod
    def parse(
        text: str,
        name: str = "custom",
        *,
        stages: int | None = None,
        microbatches: int | None = None,
    ) -> PipelineSchedule:
        """The reverse of `str`. Stages and microbatches are counted unless they are given."""
        rows = [line.split() for line in text.rstrip().split("\n")]
        return _from_rows(rows, name, name, stages, microbatches)

    def to_csv(self) -> str:
        """One row per rank, one cell per action."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.ranks)
        return text.getvalue()

    def write_csv(self, path: str | Path) -> None:
        write_atomically(path, self.to_csv())

    @staticmethod
    def from_csv(
        text: str,
        name: str = "custom",
        *,
        stages: int | None = None,
        microbatches: int | None = None,
        source: str | None = None,
    ) -> PipelineSchedule:
        """The reverse of `to_csv`. Cells that are empty are idle and left out.

        Args:
            source: where the text is from, for errors.
        """
        rows = list(csv.reader(io.StringIO(text.rstrip())))
        return _from_rows(rows, name, source or name, stages, microbatches)

    @staticmethod
    def read_csv(
        path: str | Path, *, stages: int | None = None, microbatches: int | None = None
    ) -> PipelineSchedule:
        """The schedule in a file, under the file's name."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the pipeline schedule {path}: {error}") from error
        return PipelineSchedule.from_csv(
            text, path.stem, stages=stages, microbatches=microbatches, source=str(path)
        )


def _from_rows(
    rows: Iterable[Sequence[str]],
    name: str,
    source: str,
    stages: int | None,
    microbatches: int | None,
) -> PipelineSchedule:
    ranks = []
    for row, cells in enumerate(rows, 1):
        actions: list[Action] = []
        for at, cell in enumerate(cells, 1):
            if not cell.strip():
                continue
            pair = _PAIR.fullmatch(cell.strip())
            try:
                actions += map(Action.parse, pair.groups() if pair else (cell,))
            except PlanError as error:
                raise PlanError(f"{source}, row {row}, cell {at}: {error}") from None
        ranks.append(tuple(actions))
    every = [action for actions in ranks for action in actions]
    if stages is None:
        stages = 1 + max((action.stage for action in every), default=-1)
    if microbatches is None:
        microbatches = 1 + max((action.microbatch for action in every), default=-1)
    return PipelineSchedule(name, stages, microbatches, tuple(ranks))
