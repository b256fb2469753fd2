"""Who writes which bucket: replicas in turn, and of one the ranks that hold it already."""

import pytest

from grpo_mcore.parallel.grid import Layout
from grpo_mcore.weights.plan import Bucket, Plan
from grpo_mcore.weights.sync import choose_writers

PLAN = Plan((), {}, Layout(tensor=2, pipeline=2, data=2, expert=2))
"""Ranks 0 to 3 are stage 0, and 0, 1, 4, 5 the first replica."""


@pytest.mark.parametrize("stage, by_number", [(0, [0, 2, 0, 2]), (1, [4, 6, 4, 6])])
def test_replicas_of_a_host_take_turns(stage, by_number):
    bucket = Bucket(stage, 1, ())
    writers = [choose_writers(number, bucket, PLAN, ["host"] * 8) for number in range(4)]
    assert writers == [{"host": rank} for rank in by_number]


def test_each_host_has_a_writer_of_its_own():
    sites = ["a"] * 4 + ["b"] * 4
    assert choose_writers(0, Bucket(1, 1, ()), PLAN, sites) == {"a": 0, "b": 4}
    assert choose_writers(1, Bucket(1, 1, ()), PLAN, sites) == {"a": 2, "b": 6}


def test_replicas_that_share_experts_work_together():
    for number in range(2):
        assert choose_writers(number, Bucket(1, 2, ()), PLAN, ["host"] * 8) == {"host": 4}


def test_every_device_has_its_own():
    assert choose_writers(3, Bucket(1, 1, ()), PLAN, range(8)) == {rank: rank for rank in range(8)}
