"""The options of `auto_engine`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopar.compiled_step import StepOptions
from autopar.ir.precision import Precision
from autopar.plan import ShardingPlan
from autopar.runtime.batch import BatchDim


@dataclass(frozen=True)
class EngineOptions:
    """The options of `auto_engine`, under its names; `step` says how steps are compiled."""

    step: StepOptions
    plan: ShardingPlan | None = None
    batch: str = "global"
    batch_dim: BatchDim = 0
    constraints: Mapping[str, str] | str | None = None
    weights: Path | None = None
    precision: Precision | None = None
    microbatches: int | None = None
    microbatch: str = "exact"
    schedule: str | None = None
    stages: str | None = None
    loss_fn: Callable[..., Any] | None = None
    resume: bool = False
