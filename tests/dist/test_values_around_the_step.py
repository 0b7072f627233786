"""What scripts do with the values of parameters, gradients and state beside the step."""

import pytest

from tests.dist import value_tasks as tasks

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def gaps(pool):
    return pool.run(tasks.compare, "2x2")


@pytest.mark.parametrize("name", tasks.SCRIPTS)
def test_values_are_those_of_one_process(gaps, name):
    for found in gaps:
        assert isinstance(found[name], float) and found[name] < 1e-9, found[name]


def test_plain_averages_with_local_batches(pool):
    for answer in pool.run(tasks.averages_of_local_batches, "4"):
        assert answer["gap"] < 1e-12


def test_random_values_differ_by_shard(pool):
    for answer in pool.run(tasks.random_values, "2x2"):
        assert all(answer.values()), answer


def test_refusals_say_what_to_do(pool):
    words = {
        "number of a part": ["full_tensor().item()", "on all ranks"],
        "random without a rule": ["poisson", "p.full_tensor()", "p.copy_(whole)"],
        "data of another shape": ["[32, 16]", "[4, 16]", "before auto_engine"],
    }
    for messages in pool.run(tasks.refusals, "4"):
        for name, message in messages.items():
            assert all(word in message for word in words[name]), (name, message)
