"""Who writes which bucket: replicas in turn, and of one the ranks that hold it already, together
where they share memory."""

import pytest

from grpo_mcore.parallel.grid import Layout
from grpo_mcore.weights.plan import Bucket, Plan
from grpo_mcore.weights.sync import choose_writers

PLAN = Plan((), {}, Layout(tensor=2, pipeline=2, data=2, expert=2))
"""Ranks 0 to 3 are stage 0, and 0, 1, 4, 5 the first replica."""


@pytest.mark.parametrize("stage, by_number", [(0, [(0, 1), (2, 3)] * 2), (1, [(4, 5), (6, 7)] * 2)])
def test_replicas_of_a_host_take_turns(stage, by_number):
    bucket = Bucket(stage, 1, ())
    writers = [choose_writers(number, bucket, PLAN, ["host"] * 8) for number in range(4)]
    assert writers == [{"host": ranks} for ranks in by_number]


def test_each_host_has_writers_of_its_own():
    sites = ["a"] * 4 + ["b"] * 4
    assert choose_writers(0, Bucket(1, 1, ()), PLAN, sites) == {"a": (0, 1), "b": (4, 5)}
    assert choose_writers(1, Bucket(1, 1, ()), PLAN, sites) == {"a": (2, 3), "b": (6, 7)}


def test_of_a_group_that_is_spread_over_hosts_one_rank_writes():
    sites = ["a", "b"] * 4
    assert choose_writers(0, Bucket(1, 1, ()), PLAN, sites) == {"a": (4,), "b": (5,)}


def test_replicas_that_share_experts_work_together():
    for number in range(2):
        writers = choose_writers(number, Bucket(1, 2, ()), PLAN, ["host"] * 8)
        assert writers == {"host": (4, 5, 6, 7)}


def test_every_device_has_its_own():
    writers = choose_writers(3, Bucket(1, 1, ()), PLAN, range(8))
    assert writers == {rank: (rank,) for rank in range(8)}
