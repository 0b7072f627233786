"""What all ranks decide in the same way, without ranks."""

import pytest

from autopar.cluster.cluster import ClusterInfo
from autopar.comm.groups import planning_groups
from autopar.comm.ranks import Ranks
from autopar.compile import autoplan, compile_step
from autopar.compiled_step import Arguments, Place, StepOptions, StepPlan
from autopar.errors import EngineError
from autopar.passes.local_step import fake_arguments
from autopar.planner.planner import trainable_inputs
from tests.models import CASES


class Differing(Ranks):
    """Rank 0, and another that differs the n-th time they compare: first their local programs, then
    what a schedule decides on."""

    def __init__(self, time: int) -> None:
        self.left = time

    def differing(self, signature: str) -> list[int]:
        self.left -= 1
        return [1] if not self.left else []


def compiled(ranks: Ranks, memory: float | None):
    case = CASES["mlp"]
    model = case.build()
    planned = autoplan(model, (), case.batch(0), cluster="2")
    trainable = trainable_inputs(planned.graph, model)
    place = Place((0,), planning_groups((2,), (0,)), ranks=ranks)
    return compile_step(
        planned.graph,
        lambda: StepPlan(planned.plan),
        place,
        lambda plan, local: Arguments(fake_arguments(planned.graph, local, trainable)),
        StepOptions(ClusterInfo.of("2").with_memory(memory)),
        trainable=trainable,
    )


def test_programs_that_differ_are_refused():
    with pytest.raises(EngineError, match=r"ranks \[1\] built another sequence of collectives"):
        compiled(Differing(1), None)


def test_a_step_keeps_everything_if_schedules_cannot_agree():
    step = compiled(Differing(2), 2.0**30)
    assert step.memory is not None
    assert step.memory.peak_bytes == step.memory.eager_bytes
    with pytest.raises(EngineError, match=r"programs of ranks \[1\] differ"):
        compiled(Differing(2), 20_000.0)
