"""When the operators of a schedule run: every resource is a queue, in the schedule's order.

The program issues operators one after another. Compute starts when its operands are there and
compute is free. The start of a collective, or a copy to the host, begins where it stands, when the
compute before it is done (so the streams of a GPU are made to wait for each other), its operands
are there and its own stream is free; the compute after it goes on, and whoever reads its results
waits for them. So it hides as far as it stands ahead of its first reader. A collective that is not
split occupies compute as well, and so does all that would run beside compute where the device
cannot do that (CPUs that copy, or whose threads send).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from autopar.schedule.program import Program, Resource


class Run(NamedTuple):
    """When an operator runs. Microseconds from the start of the step.

    Args:
        issued: the program reaches it: what it makes is alive from then on.
        start, end: it runs.
    """

    issued: float
    start: float
    end: float


class Busy(NamedTuple):
    """A step in time.

    Args:
        runs: of every operator of the sequence.
        waited: what each operator kept compute waiting for, which is the time from when compute
            was free to when the operator that needed it could start; by the resource waited for.
        end: of the last operator.
    """

    runs: list[Run]
    waited: dict[Resource, float]
    end: float


def run_times(program: Program, sequence: Sequence[int]) -> Busy:
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
    return Busy(runs, waited, end)
