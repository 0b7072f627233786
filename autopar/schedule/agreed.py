"""One schedule for all ranks of a run."""

from __future__ import annotations

import math
import time
from dataclasses import replace

from autopar.comm.ranks import Ranks
from autopar.errors import EngineError
from autopar.schedule.budget import MemoryPlan, StepBudget, describe
from autopar.schedule.program import Program, Schedule, eager_schedule
from autopar.schedule.simulate import peak_bytes
from autopar.units import bytes_text


def agreed_schedule(
    program: Program, budget: StepBudget, ranks: Ranks, known: MemoryPlan | None = None,
    seconds: float = math.inf,
) -> MemoryPlan:  # fmt: skip
    """What the step keeps, recomputes and offloads: rank 0 decides, whose shards are the largest.

    Ranks by themselves might decide differently, as the small integer programs behind a schedule
    have limits in seconds. If the ranks' programs differ in more than sizes, no schedule fits all,
    and everything is kept.

    Args:
        program, budget: of this rank.
        known: rank 0's schedule, if planning has made it.
        seconds: of processor time, after which the search for one ends with what it has.

    Raises:
        InfeasibleError: nothing fits the budget of rank 0.
        EngineError: the ranks' programs differ, and keeping everything does not fit.
    """

    def choose() -> tuple[Schedule, bool]:
        memory = known or budget.choose(program, until=time.process_time() + seconds)
        return memory.schedule, memory.state_on_host

    def keep_everything() -> tuple[Schedule, bool]:
        needed = peak_bytes(program, eager_schedule(program))
        if needed > budget.step_bytes:
            free = bytes_text(max(0.0, budget.step_bytes))
            raise EngineError(
                f"the step needs {bytes_text(needed)} if everything is kept, and there is {free}; "
                f"what to recompute cannot be decided, as the programs of ranks {differing} differ "
                "from that of rank 0. Give more memory, or sizes that the mesh divides"
            )
        return eager_schedule(program), False

    differing = ranks.differing(program.signature)
    schedule, state_on_host = ranks.from_rank_zero(keep_everything if differing else choose)
    if differing:
        schedule = eager_schedule(program)
    memory = describe(program, schedule)
    return budget.with_host_step(replace(memory, state_on_host=state_on_host), program)
