"""How many programs an engine keeps."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from autopar import auto_engine
from autopar.comm import world
from autopar.runtime import step_choice


@pytest.fixture(autouse=True, scope="module")
def _no_process_group_left() -> Iterator[None]:
    yield
    world.stop()


def test_the_oldest_programs_are_forgotten_but_the_first(monkeypatch):
    monkeypatch.setattr(step_choice, "_KEPT_IN_ALL", 3)
    model = nn.Linear(4, 2)
    alone = copy.deepcopy(model)
    engine, _ = auto_engine(model, None, "1")
    for _ in range(2):
        for dims in range(5):  # another number of dims is no size that varies
            x = torch.randn(*(2,) * dims, 4)
            torch.testing.assert_close(engine(x), alone(x))
            assert len(engine.steps) <= 3
            assert engine.steps[0].number == 0
    assert engine.steps[-1].number > 5
