"""The smallest budget within which a plan is found, for a refusal that names it.

What a search needs at least depends on the budget that it is given: within a smaller one, other
layouts and other regions are looked at. So the number that a refusal names is tried, and smaller
ones as long as there is time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from autopar.errors import InfeasibleError
from autopar.progress import Deadline
from autopar.units import budget_text, bytes_up

_STEP = 0.03  # of a budget that fits: how much less is tried next
_LARGER = 1.02  # times a budget that does not, at least, is tried next
_MOST = 5  # budgets that are tried


def naming(refused: InfeasibleError, nbytes: float) -> str:
    """What a refusal says, with another budget in the place of the one that it names."""
    return str(refused).replace(budget_text(refused.smallest_bytes), budget_text(nbytes))


def with_smallest_budget(
    refused: InfeasibleError,
    within: Callable[[float], object],
    deadline: Deadline,
) -> InfeasibleError:
    """A refusal that names a budget within which a plan was found, as small as was found in time;
    the one that it names already if there is no time.

    Args:
        within: plans within a budget by the deadline, or raises `InfeasibleError`.
    """
    if not math.isfinite(refused.smallest_bytes):
        return refused
    known: float | None = None
    tried = bytes_up(refused.smallest_bytes)
    least = refused.budget_bytes  # no plan was found within that
    for _ in range(_MOST):
        if tried <= least or deadline.over:
            break
        try:
            within(tried)
        except InfeasibleError as error:
            least = max(least, tried)
            if known is not None:
                break
            more = min(error.smallest_bytes, 2 * tried)  # infinite if no number is known
            tried = bytes_up(max(_LARGER * tried, more))
        else:
            known = tried
            tried = bytes_up((1 - _STEP) * known)
    if known is None:  # its text says no less than it needs
        known = bytes_up(refused.smallest_bytes)
    message = naming(refused, known)
    if budget_text(known) not in message:
        message = f"{message.rstrip('.')}. A plan was found within {budget_text(known)}"
    return InfeasibleError(message, budget_bytes=refused.budget_bytes, smallest_bytes=known)
