"""Collectives between CPU processes: the same whichever way they take, and errors that say why."""

import re

import pytest

from tests.dist import group_tasks as tasks

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("mesh", [(4,), (2, 2)])
def test_collectives_are_those_of_gloo(pool, mesh):
    assert max(pool.run(tasks.largest_difference, mesh, timeout=60)) < 1e-12


@pytest.mark.parametrize("mesh", [(4,), (2, 2)])
def test_shared_memory_and_messages_agree_to_the_bit(pool, mesh):
    assert all(pool.run(tasks.shared_memory_is_messages, mesh, timeout=60))


def test_more_may_be_started_than_sockets_hold(pool):
    assert max(pool.run(tasks.more_than_fits_in_sockets, timeout=60)) == 0


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("gone", "has closed its connection"),
        ("late", r"ranks \[3\] have not come within 0.5 s"),
        ("odd", "rank 3 of the group sent 39996 bytes, not 40000"),
    ],
)
def test_a_rank_that_is_not_there_ends_the_others(pool, how, why):
    *said, _ = pool.run(tasks.without_one, how, timeout=60)
    for text in said:
        assert "all-reduce of shape (10000,) with ranks [0, 1, 2, 3] failed" in text
        assert "Another rank has died" in text
    assert re.search(why, "".join(said))  # who has waited first says so, and hangs up


@pytest.mark.parametrize("how", ["environment", "listen", "call", "share"])
def test_if_one_rank_cannot_share_memory_none_does(pool, how):
    assert all(pool.run(tasks.falls_back, how, timeout=60))


def test_forked_children_hang_up(pool):
    assert pool.run(tasks.forked_children_hang_up, timeout=60) == [0] * 4
