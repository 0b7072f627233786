"""The exceptions of autopar. Messages say what is wrong, where, the numbers, and the remedy."""

import math
from collections.abc import Sequence
from typing import Any


class AutoparError(Exception):
    """Base of every error that autopar raises on purpose."""


class CaptureError(AutoparError):
    """The model could not be captured as one graph."""


class PlanError(AutoparError, ValueError):
    """A plan is malformed, or was made for another model, mesh or version."""


class MeshError(AutoparError, ValueError):
    """The mesh does not fit the world, the batch or the cluster description."""


class InfeasibleError(AutoparError, ValueError):
    """No plan fits the memory budget.

    Attributes:
        budget_bytes: the budget per device.
        smallest_bytes: the smallest budget that has a plan, in whole bytes.
        choices: choices of that plan, if the solver knows them.
        proven: whether no plan exists; otherwise none was found in time.
    """

    def __init__(
        self,
        message: str,
        *,
        budget_bytes: float,
        smallest_bytes: float,
        choices: tuple[int, ...] = (),
        proven: bool = True,
    ) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.smallest_bytes = _rounded_up(smallest_bytes)
        self.choices = choices
        self.proven = proven

    def __reduce__(self) -> Any:  # rank 0 sends its errors to the others
        return _infeasible, (str(self), self.budget_bytes, self.smallest_bytes)


def _rounded_up(nbytes: float) -> float:
    """Whole bytes, so that an `int` of them is enough; but for what floats lose."""
    return float(math.ceil(nbytes - 1e-6)) if math.isfinite(nbytes) else nbytes


def _infeasible(message: str, budget_bytes: float, smallest_bytes: float) -> InfeasibleError:
    return InfeasibleError(message, budget_bytes=budget_bytes, smallest_bytes=smallest_bytes)


class EngineError(AutoparError, RuntimeError):
    """The engine cannot do what was requested, or another rank failed."""


class ConstraintError(AutoparError, ValueError):
    """A constraint names nothing, or demands a layout that does not exist."""


class ConflictError(InfeasibleError):
    """Constraints that no plan satisfies together.

    Attributes:
        conflicting: a smallest set of constraints in conflict, as "name: layout".
    """

    def __init__(
        self,
        message: str,
        conflicting: Sequence[str] = (),
        *,
        budget_bytes: float = math.inf,
        smallest_bytes: float = math.inf,
    ) -> None:
        super().__init__(message, budget_bytes=budget_bytes, smallest_bytes=smallest_bytes)
        self.conflicting = tuple(conflicting)
