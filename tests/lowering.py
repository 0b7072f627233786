"""Lowers programs without planning, for tests of passes and schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from autopar.passes.lower import LoweredStep, lower, trace_step
from autopar.passes.pipeline import LowerOptions
from autopar.runtime.program import Program as RunnableStep
from autopar.runtime.program import bind
from autopar.schedule.program import Program, Schedule


def graphs_of(
    gm: fx.GraphModule,
    arguments: Sequence[torch.Tensor],
    schedule: Schedule | None = None,
    **options: Any,
) -> LoweredStep:
    """The forward and the backward graph of a program, with the options of `LowerOptions`."""
    scheduled = LowerOptions(scheduled=schedule is not None, **options)
    return lower(trace_step(gm, arguments, scheduled), schedule)


def lowered(
    gm: fx.GraphModule,
    arguments: Sequence[torch.Tensor],
    schedule: Schedule | None = None,
    **options: Any,
) -> RunnableStep:
    """The same, to be called."""
    return bind(graphs_of(gm, arguments, schedule, **options))


def program_of(gm: fx.GraphModule, arguments: Sequence[torch.Tensor], **options: Any) -> Program:
    """What schedules of a program decide on."""
    return trace_step(gm, arguments, LowerOptions(scheduled=True, **options)).program
