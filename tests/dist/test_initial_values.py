"""Models that no rank holds whole train as on a single process."""

import pytest

from tests.dist import initial_value_tasks as tasks
from tests.dist.pool import Pool

pytestmark = pytest.mark.dist


def assert_equal(answers, names):
    for answer in answers:
        assert set(answer) == set(names)
        for name, got in answer.items():
            shards = got.pop("first shard"), got.pop("last shard")
            assert shards == ((16, 16), (8, 8)), name
            assert max(got.values()) < 1e-12, (name, got)


def test_deferred_models_and_rank_zero(pool):
    assert_equal(pool.run(tasks.from_builders), tasks.BUILDERS)


def test_modules_initialize_themselves(pool):
    names = ("same seed: True", "same seed: False")
    assert_equal(pool.run(tasks.from_reset_parameters), names)


def test_checkpoints(pool, tmp_path):
    tasks.write_checkpoints(str(tmp_path))
    names = [f"{name}, {build.__name__}" for name, build in tasks.STARTS]
    assert_equal(pool.run(tasks.from_checkpoints, str(tmp_path)), names)


def test_a_checkpoint_of_another_mesh(pool, tmp_path):
    for answer in pool.run(tasks.saved_on_a_mesh, str(tmp_path)):
        assert answer == {"gap": 0.0, "shard": (8, 16), "average": 0.0}


def test_refusals_are_on_all_ranks(pool):
    words = {
        "shape": ["bias", "[8]", "[9]", "rank 3"],
        "no reset": ["0.in_proj_weight", "MultiheadAttention", "deferred_init", "weights="],
    }
    for messages in pool.run(tasks.refusals):
        for name, message in messages.items():
            assert all(word in message for word in words[name]), (name, message)


@pytest.mark.slow
def test_memory_at_start_is_shards_and_one_parameter():
    """300 million float32 parameters, on four ranks that have held nothing before."""
    fresh = Pool(4)
    for got in fresh.run(tasks.memory_at_start):
        assert got["parameters"] > 300
        assert got["shards"] < 290  # of 1145 MiB
        assert got["growth"] < 1.3 * (got["shards"] + got["largest"])
    fresh.close()
