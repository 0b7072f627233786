"""What ranks decide alike, without ranks."""

import pytest

from autopar.errors import EngineError
from autopar.runtime import agree
from autopar.schedule.budget import StepBudget
from autopar.schedule.program import eager_schedule
from tests.unit.test_memory_schedule import chain


@pytest.fixture
def alone(monkeypatch):
    """Rank 0, and another whose programs differ."""
    monkeypatch.setattr(agree, "_odd_ranks", lambda signature: [1])
    monkeypatch.setattr(agree, "from_rank_zero", lambda make: make())


def test_programs_that_differ_keep_everything_if_that_fits(alone):
    program = chain([4, 2, 1])
    scheduler = agree.Scheduler(StepBudget(7, 0, 0, 0, 0))
    assert scheduler(program) == eager_schedule(program)
    assert scheduler.found is not None and scheduler.found.peak_bytes == 7
    with pytest.raises(EngineError, match=r"needs 7 B .*programs of ranks \[1\] differ"):
        agree.Scheduler(StepBudget(6, 0, 0, 0, 0))(program)
    with pytest.raises(EngineError, match=r"ranks \[1\] built another graph than rank 0"):
        agree.check_agreement("graph", "")
