"""What scripts do around the step: identity, edits, unread results, modes, and refusals."""

import pytest

from tests.dist import script_tasks as tasks

pytestmark = pytest.mark.dist


def test_objects_from_before_go_on_working(pool):
    for answer in pool.run(tasks.identity, "2x2"):
        assert answer["gap"] < 1e-12
        assert answer["same objects"]
        assert answer["weak reference"]
        assert answer["attribute"] is True
        assert answer["hook calls"] == [(32, 16)] * 3
        assert answer["class"]
        assert answer["signature"] == "(input)"
        assert answer["indexed"]


def test_gradients_are_edited_in_part(pool):
    for gaps in pool.run(tasks.edits_of_gradients, "2x2"):
        assert all(gap < 1e-12 for gap in gaps.values()), gaps


def test_results_are_gathered_when_they_are_read(pool):
    for answer in pool.run(tasks.unread_results, "2x2"):
        assert answer["gap"] < 1e-12
        assert answer["deferred"] == [True] * 3
        assert answer["read"] == [pytest.approx(0, abs=1e-12)]


def test_refusals_say_what_to_do(pool):
    words = {
        "lazy": ["lazy module", "aside.weight", "before auto_engine"],
        "batches": ["different batches", "batch='local'"],
        "shapes": ["[8, 16]", "[4, 16]", "same global batch"],
        "pickle": ["cannot be pickled", "torch.distributed.checkpoint"],
        "optimizer state": ["shard", "full_state_dict"],
        "shards": ["shard", "full_state_dict"],
        "half": ["float16", "before auto_engine"],
    }
    for messages in pool.run(tasks.refusals, "4"):
        for name, message in messages.items():
            assert all(word in message for word in words[name]), (name, message)


def test_methods_train_and_evaluate_the_model(pool):
    for answer in pool.run(tasks.methods_that_train, "2x2"):
        assert answer["losses"] < 1e-12
        assert answer["gap"] < 1e-12


def test_programs_follow_what_they_depend_on(pair):
    for counts in pair.run(tasks.programs, "2"):
        assert counts == {  # without gradients, a forward is a program of its own
            "first": 1, "no_grad": 2, "inference_mode": 2, "frozen": 3, "thawed": 3,
            "autocast": 4, "back": 4, "eval": 5, "another head": 6,
        }  # fmt: skip


@pytest.mark.parametrize("batch", ["global", "local"])
def test_numbers_that_vary_are_inputs_after_their_second_value(pair, batch):
    for answer in pair.run(tasks.annealed_numbers, "2", batch):
        for found in answer.values():
            assert found["gap"] < 1e-12
            assert found["losses"] < 1e-12
            assert found["calls"]
            assert found["types"]
        # the first values, all others, and the other side of a branch
        assert answer["tensor"]["programs"] == 3
        # one for each value
        assert answer["value"]["programs"] == 4
        assert answer["refused"]["programs"] == 4
