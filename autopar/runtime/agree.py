"""What the ranks decide alike: rank 0 decides, or all compare what they found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from autopar.errors import AutoparError, EngineError
from autopar.schedule.budget import MemoryPlan, StepBudget, describe
from autopar.schedule.program import Program, Schedule, eager_schedule
from autopar.schedule.simulate import peak_bytes
from autopar.units import bytes_text


def from_rank_zero(make: Callable[[], Any]) -> Any:
    """Run on rank 0; its result, or its error, on every rank."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except AutoparError as error:
            box[1] = error
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def check_agreement(what: str, signature: str) -> None:
    """Ranks whose programs communicate in different orders would deadlock.

    Args:
        what: the signature is of.

    Raises:
        EngineError: on all ranks, naming those that differ from rank 0.
    """
    odd = _odd_ranks(signature)
    if odd:
        raise EngineError(
            f"ranks {odd} built another {what} than rank 0; they must run the same model, batch "
            "shapes and autopar version"
        )


def _odd_ranks(signature: str) -> list[int]:
    """Ranks whose signature is not that of rank 0; the same on all ranks."""
    if dist.get_world_size() == 1:
        return []
    signatures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(signatures, signature)
    return [r for r, s in enumerate(signatures) if s != signatures[0]]


class Scheduler:
    """Chooses what a step keeps and computes again: rank 0, whose shards are the largest, for all.

    The small integer programs behind a schedule have limits in seconds, so that ranks by themselves
    might find different ones. Where their programs differ in more than sizes, no schedule is one of
    all, and everything is kept.

    Args:
        budget: of rank 0.
        known: a program with its schedule; what is asked for is often that.

    Attributes:
        found: the schedule with this rank's figures, once it was asked for.
    """

    def __init__(self, budget: StepBudget, known: tuple[Program, MemoryPlan] | None = None) -> None:
        self.budget, self.known = budget, known
        self.found: MemoryPlan | None = None

    def __call__(self, program: Program) -> Schedule:
        """Called while AOTAutograd traces on fake tensors, which the ranks cannot exchange."""
        with _disable_current_modes():
            odd = _odd_ranks(program.signature)
            if odd:
                from_rank_zero(lambda: self._check_fits(program, odd))
                schedule, away = eager_schedule(program), False
            else:
                schedule, away = from_rank_zero(lambda: self._choose(program))
        self.found = replace(describe(program, schedule), state_on_host=away)
        return schedule

    def _choose(self, program: Program) -> tuple[Schedule, bool]:
        known, plan = self.known or (None, None)
        if known is None or plan is None or not known.same_as(program):
            plan = self.budget.choose(program)
        return plan.schedule, plan.state_on_host

    def _check_fits(self, program: Program, odd: list[int]) -> None:
        """Raise if what makes no decisions needs too much."""
        needed = peak_bytes(program, eager_schedule(program))
        if needed > self.budget.step_bytes:
            raise EngineError(
                f"the step needs {bytes_text(needed)} if everything is kept, and there is "
                f"{bytes_text(max(0.0, self.budget.step_bytes))}; what to compute again cannot "
                f"be decided, as the programs of ranks {odd} differ from that of rank 0. Give more "
                "memory, or sizes that the mesh divides"
            )
