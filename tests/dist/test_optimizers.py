"""Optimizers on shards equal a single device: parameters and state after five steps, in float64.

`python -m benchmarks.optimizer_matrix` runs every optimizer on every mesh.
"""

import pytest
import torch

from tests.dist import optimizer_tasks as tasks
from tests.dist.optimizer_habits import HABITS

pytestmark = pytest.mark.dist

TOLERANCE = 1e-12

# one of a kind: those whose steps differ in what they ask of shards
NAMES = (
    "Lamb", "Lamb, one by one", "Lars", "Lars, LARC", "Muon", "Muon, match_rms", "Adafactor",
    "Adafactor, one by one", "Adafactor of transformers", "timm Muon", "timm NvNovoGrad",
    "timm AdamP", "a user's own", "AdamW", "RMSprop",
)  # fmt: skip
FEW = ("Lamb", "Lars", "Muon", "Adafactor", "a user's own")


def _close(found: dict, tolerance: float = TOLERANCE) -> None:
    wrong = {name: value for name, value in found.items() if not value[0] < tolerance}
    assert not wrong, wrong


def test_five_steps_on_uneven_shards(pair):
    found = pair.run(tasks.errors_of, NAMES, "2", False)
    _close(found[0])
    _close(found[1])
    # all norms of a step are in one message; LAMB's clip by another one before
    for name, most in (("Lars", 1), ("Lamb", 2), ("timm NvNovoGrad", 1), ("Adafactor", 2)):
        assert max(found[0][name][1]) <= most, (name, found[0][name])
    # a step with as many parameters uses the program of the one before
    assert all(value[2] <= 3 for name, value in found[0].items() if name in FEW[:4])


@pytest.mark.parametrize(
    "mesh, even",
    [("4", True), ("2x2", False), ("pipe=2,data=2", False)],
)
def test_five_steps_on_four_ranks(pool, mesh, even):
    for found in pool.run(tasks.errors_of, FEW, mesh, even):
        _close(found)


@pytest.mark.parametrize("lazy", [False, True])
def test_habits_of_peoples_own_optimizers(pair, lazy):
    names = tuple(n for n in HABITS if not (lazy and n == "numbers_as_text"))  # no float then
    for found in pair.run(tasks.habit_errors, "2", False, names, lazy):
        dtypes = found.pop("dtypes")  # computes in float32
        assert dtypes < 1e-7
        wrong = {name: e for name, e in found.items() if not (type(e) is float and e < 1e-12)}
        assert not wrong, wrong


@pytest.mark.parametrize("name", ["Lamb", "Adafactor"])
def test_an_engine_trains_and_resumes(pair, name):
    for found in pair.run(tasks.engine_run, name):
        assert found["difference"] < 1e-12, found
        assert found["resumed"] < 1e-12, found
        assert found.get("saved", 0.0) < 1e-12, found
        assert all(found["state"].values()), found
        assert found["programs"] <= 3, found


@pytest.mark.parametrize(
    "what",
    ["closure", "error", "random", "scaler", "late", "kept", "clip", "refused", "shapes", "masked"],
)
def test_what_happens_around_a_step(pair, what):
    for found in pair.run(tasks.around_a_step, what):
        assert found == "right", found


def test_a_warm_up_and_decay():
    from autopar.optim import large_batch_schedule, scaled_lr

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=3.0)
    schedule = large_batch_schedule(optimizer, warmup_steps=2, total_steps=6)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [1.0, 2.0, 3.0, 3 * 9 / 16, 3 * 4 / 16, 3 / 16, 0.0, 0.0]
    assert rates == pytest.approx(expected)
    assert scaled_lr(0.1, 1024) == pytest.approx(0.4)
    assert scaled_lr(0.1, 1024, rule="sqrt") == pytest.approx(0.2)
    with pytest.raises(ValueError, match="less than total_steps"):
        large_batch_schedule(optimizer, 6, 6)
    with pytest.raises(ValueError, match="rule must be"):
        scaled_lr(0.1, 512, rule="cubic")
