"""Regions in slices on several ranks."""

import pytest

from tests.dist import time_split_tasks as tasks

pytestmark = pytest.mark.dist

BY_ROWS = {"inputs.h": "RS0R", "inputs.target": "RS0", "**.weight": "RR"}
BY_SAMPLES = {"inputs.h": "S0RR", "inputs.target": "S0R", "**.weight": "RR"}


@pytest.mark.sample(0.5)
@pytest.mark.parametrize(
    ("samples", "rows", "constraints"),
    [(2, 64, BY_ROWS), (2, 64, BY_SAMPLES), (2, 63, BY_ROWS), (3, 64, BY_SAMPLES)],
)
def test_a_loss_of_split_targets_runs_in_slices(pair, samples, rows, constraints):
    for rank in pair.run(tasks.sliced_loss, samples, rows, constraints, 0.4):
        assert rank["error"] < 1e-12
        assert rank["slices"] and all(at_once for _, at_once in rank["slices"])
        assert rank["peak"] < 0.6  # logits and their gradient are 2, half of them on each rank


def test_microbatches_read_parameters_where_they_are(pair):
    for rank in pair.run(tasks.microbatched_peak, 63):
        assert rank["measured"] <= rank["planned"]
