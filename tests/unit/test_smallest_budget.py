"""The budget that a refusal names: it is enough, and smaller ones were tried."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autopar import ClusterInfo
from autopar.cluster.cluster import parse_bytes
from autopar.cluster.device import device as device_of
from autopar.compile import plan_batch, plan_to_fit
from autopar.errors import InfeasibleError
from autopar.planner.smallest_budget import budget_text, with_smallest_budget
from autopar.progress import Deadline
from autopar.report.headline import headline
from autopar.units import bytes_text, bytes_up
from tests.planning import Classifier

KIB = 1024.0
BATCH = {"x": torch.zeros(32, 64), "y": torch.zeros(32, dtype=torch.long)}


def refused(budget: float, smallest: float) -> InfeasibleError:
    message = f"too much. Give at least {budget_text(smallest)}, or more devices"
    return InfeasibleError(message, budget_bytes=budget, smallest_bytes=smallest)


class Planner:
    """Plans within some budgets, and keeps which were asked for."""

    def __init__(self, fits) -> None:
        self.fits, self.asked = fits, list[float]()

    def __call__(self, budget: float) -> None:
        self.asked.append(budget)
        if not self.fits(budget):
            raise refused(budget, 1.01 * budget)


def named_by(planner: Planner, smallest: float, seconds: float = 60.0) -> InfeasibleError:
    return with_smallest_budget(refused(KIB, smallest), planner, Deadline(seconds))


@given(st.floats(1.0, 2.0**45))
def test_a_rounded_size_is_enough_as_it_is_printed(nbytes):
    printed = parse_bytes(bytes_text(bytes_up(nbytes)).replace(" ", ""))
    assert nbytes <= printed * (1 + 1e-12)
    assert bytes_up(nbytes) <= 1.01 * nbytes + 1


def test_smaller_budgets_that_fit_are_found():
    planner = Planner(lambda budget: budget >= 683 * KIB)
    error = named_by(planner, 709 * KIB)
    assert 683 * KIB <= error.smallest_bytes < 700 * KIB
    assert error.smallest_bytes in planner.asked
    assert f"Give at least {budget_text(error.smallest_bytes)}, or more devices" in str(error)


def test_a_number_that_is_refused_is_not_named():
    planner = Planner(lambda budget: budget >= 720 * KIB)
    error = named_by(planner, 709 * KIB)
    assert error.smallest_bytes in planner.asked and error.smallest_bytes >= 720 * KIB
    assert error.smallest_bytes < 760 * KIB


def test_without_time_nothing_is_tried():
    planner = Planner(lambda budget: True)
    assert named_by(planner, 709 * KIB, seconds=0.0).smallest_bytes == 709 * KIB
    assert not planner.asked
    assert named_by(planner, math.inf).smallest_bytes == math.inf


def test_the_search_ends_where_nothing_fits():
    planner = Planner(lambda budget: False)
    assert named_by(planner, 709 * KIB).smallest_bytes == 709 * KIB
    assert len(planner.asked) <= 5


def cluster(nbytes: float) -> ClusterInfo:
    return ClusterInfo.of("2", replace(device_of("H100"), memory_bytes=nbytes))


def test_the_budget_that_a_refusal_names_is_enough(monkeypatch):
    monkeypatch.setattr("autopar.planner.joint.split_step", lambda *_: None)  # takes long
    with pytest.raises(InfeasibleError) as error:
        plan_to_fit(Classifier(64, 1), (), BATCH, cluster=cluster(2048.0), time_limit=30.0)
    least = error.value.smallest_bytes
    assert budget_text(least) in str(error.value)
    budget = parse_bytes(bytes_text(least).replace(" ", ""))  # as it is printed
    plan = plan_to_fit(Classifier(64, 1), (), BATCH, cluster=cluster(budget)).planned.plan
    assert plan.memory.total_bytes <= budget


def test_microbatches_are_planned_beside_the_sums_of_their_gradients():
    """Within the smallest budget that they name, too: it has the sums, and the whole batch."""
    with pytest.raises(InfeasibleError) as error:
        plan_batch(Classifier(64), (), BATCH, cluster=cluster(2048.0), microbatches=8)
    least = error.value.smallest_bytes
    plan = plan_batch(
        Classifier(64), (), BATCH, cluster=cluster(1.001 * least), microbatches=8
    ).plan
    assert plan.memory.total_bytes <= 1.001 * least
    parameters = sum(p.numel() * 4 for p in Classifier(64).parameters()) / 2
    assert plan.memory.gradients_bytes >= parameters
    assert dict(headline(plan))["use"] == 'auto_engine(model, optimizer, "2", microbatches=8)'


@pytest.mark.parametrize("kib", [300, 330, 340])
def test_with_more_memory_a_plan_is_not_lost(kib):
    """The plan for the budget takes more than its estimate, by buffers of gathers; one for a
    smaller limit fits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    cluster = ClusterInfo.of("2", "A100-80G").with_memory(kib * KIB)
    plan = plan_to_fit(model, (torch.zeros(16, 64),), cluster=cluster, smallest_budget=False)
    assert plan.planned.plan.memory.total_bytes <= kib * KIB
