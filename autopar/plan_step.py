"""A scheduled step in short, as it stands in a plan and in its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModuleMemory:
    """What becomes of the values of a module's forward, and of its parameters.

    Args:
        kept_bytes: handed to the backward on the device.
        moved_bytes: handed to it by way of the host.
        parameters_bytes: of parameters that are on the host for a part of the step.
        again_us, again_flops: of its operators that run again.
        gathered_us: of its collectives that run again.
    """

    module: str
    kept_bytes: int
    moved_bytes: int
    parameters_bytes: int
    again_us: float
    again_flops: float
    gathered_us: float


@dataclass(frozen=True)
class StepSummary:
    """A scheduled step.

    Args:
        us: predicted, without the optimizer's step.
        backward_us: when the backward starts.
        added_us: by what runs again and by waiting for the host.
        waited_us: by resource, how long compute waits for it.
        peak_bytes, eager_bytes: of what the step makes, less the parameters that are on the host
            meanwhile, as it is and if everything were kept.
        peak_at: where that is.
        resident_bytes: what is there before the step.
        state_on_host: the optimizer's state is on the host but for its step.
        parameters_on_host: names of those that are there for a part of the step.
        live: over time, (us, bytes kept, computed again, of all else, of parameters on the host).
        modules: per block, in the order of the forward.
    """

    us: float
    backward_us: float
    added_us: float
    waited_us: Mapping[str, float]
    peak_bytes: int
    eager_bytes: int
    peak_at: str
    resident_bytes: float
    state_on_host: bool
    parameters_on_host: tuple[str, ...]
    live: tuple[tuple[float, int, int, int, int], ...]
    modules: tuple[ModuleMemory, ...]

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> StepSummary:
        """Inverse of `dataclasses.asdict`, after JSON."""
        read = {
            "live": tuple((us, *counts) for us, *counts in data["live"]),
            "modules": tuple(ModuleMemory(**m) for m in data["modules"]),
            "parameters_on_host": tuple(data["parameters_on_host"]),
        }
        return StepSummary(**{**data, **read})
