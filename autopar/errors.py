"""The exceptions a user of autopar can meet. Messages say what, where, the numbers, the remedy."""

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
        budget_bytes: what was allowed per device.
        smallest_bytes: the smallest budget with which a plan exists.
        choices: of the plan that needs so much, where the solver says so.
        proven: that there is none, rather than none was found in time.
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
        self.smallest_bytes = smallest_bytes
        self.choices = choices
        self.proven = proven

    def __reduce__(self) -> Any:  # rank 0 sends its errors to the others
        return _infeasible, (str(self), self.budget_bytes, self.smallest_bytes)


def _infeasible(message: str, budget_bytes: float, smallest_bytes: float) -> InfeasibleError:
    return InfeasibleError(message, budget_bytes=budget_bytes, smallest_bytes=smallest_bytes)


class EngineError(AutoparError, RuntimeError):
    """The engine was used in a way it cannot serve, or another rank failed."""


class ConstraintError(AutoparError, ValueError):
    """A constraint names nothing, or asks for what does not exist."""


class ConflictError(InfeasibleError):
    """Constraints that no plan satisfies together.

    Attributes:
        conflicting: the smallest set of them that was found, as "name: layout".
    """

    conflicting: tuple[str, ...] = ()
