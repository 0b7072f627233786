"""When the operators of a schedule run: every resource is a queue, in the schedule's order.

The program issues operators one after another. Compute starts when its operands are ready and the
device is free. The start of a collective, or a copy to or from the host, begins at its place in the
sequence: when the compute before it is done, its operands are ready and its own stream is free. The
compute after it goes on; whoever reads its results waits. So it is hidden as far as it is issued
ahead of its first reader. A collective in one piece blocks compute. So does everything on devices
that cannot run anything beside compute, such as CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from autopar.schedule.program import BY_NAME, Program, Resource, Schedule

_COMPUTE = BY_NAME.index(Resource.COMPUTE)


class Run(NamedTuple):
    """When an operator runs. Microseconds from the start of the step.

    Args:
        issued: when the program reaches it, and its results are allocated.
        start, end: when it runs.
    """

    issued: float
    start: float
    end: float


class ResourceTimes(NamedTuple):
    """A step in time.

    Args:
        runs: of every operator of the sequence.
        waited: by resource, how long compute waited for it.
        end: of the last operator.
    """

    runs: list[Run]
    waited: dict[Resource, float]
    end: float


def run_times(program: Program, sequence: Sequence[int]) -> ResourceTimes:
    """Play a sequence of operators on the resources."""
    uses = program.uses
    free, waited = [0.0] * len(BY_NAME), [0.0] * len(BY_NAME)
    ready: dict[int, tuple[float, int]] = {}  # of a storage, and what makes it
    runs = []
    for i in sequence:
        reads, makes, us, resource, blocks = uses[i]
        issued = free[_COMPUTE]
        last: tuple[float, int] | None = None
        for s in reads:
            made = ready.get(s)
            if made is not None and (last is None or made > last):
                last = made
        start, by = last or (0.0, resource)
        start = max(start, issued, free[resource])
        end = start + us
        free[resource] = end
        if resource == _COMPUTE:
            if start > issued:
                waited[by] += start - issued
        elif blocks:
            waited[resource] += end - issued
            free[_COMPUTE] = end
        for s in makes:
            ready[s] = end, resource
        runs.append(Run(issued, start, end))
    end, latest = max(zip(free, range(len(BY_NAME)), strict=True))
    if latest != _COMPUTE:
        waited[latest] += end - free[_COMPUTE]
    return ResourceTimes(runs, dict(zip(BY_NAME, waited, strict=True)), end)


def step_us(program: Program, schedule: Schedule) -> float:
    """Predicted time of a step."""
    return run_times(program, schedule.forward + schedule.backward).end


def host_wait_us(program: Program, schedule: Schedule) -> float:
    """How long compute waits for copies to and from the host."""
    if not schedule.offloaded(program):
        return 0.0
    return run_times(program, schedule.forward + schedule.backward).waited[Resource.HOST]
