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

from autopar.schedule.program import Program, Resource, Schedule


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
    free = dict.fromkeys(Resource, 0.0)
    ready: dict[int, tuple[float, Resource]] = {}  # of a storage, and what makes it
    waited: dict[Resource, float] = dict.fromkeys(Resource, 0.0)
    runs = []
    for i in sequence:
        op = program.ops[i]
        issued = free[Resource.COMPUTE]
        start, by = max((ready[s] for s in op.reads if s in ready), default=(0.0, op.resource))
        start = max(start, issued, free[op.resource])
        end = start + op.us
        free[op.resource] = end
        if op.resource is Resource.COMPUTE:
            if start > issued:
                waited[by] += start - issued
        elif not op.beside or op.resource not in program.beside:
            waited[op.resource] += end - issued
            free[Resource.COMPUTE] = end
        for s in op.makes:
            ready[s] = end, op.resource
        runs.append(Run(issued, start, end))
    end, last = max((free[r], r) for r in Resource)
    if last is not Resource.COMPUTE:
        waited[last] += end - free[Resource.COMPUTE]
    return ResourceTimes(runs, waited, end)


def step_us(program: Program, schedule: Schedule) -> float:
    """Predicted time of a step."""
    return run_times(program, schedule.forward + schedule.backward).end


def host_wait_us(program: Program, schedule: Schedule) -> float:
    """How long compute waits for copies to and from the host."""
    if not schedule.offloaded(program):
        return 0.0
    return run_times(program, schedule.forward + schedule.backward).waited[Resource.HOST]
