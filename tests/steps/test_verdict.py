"""The verdict on a step's samples, and the limits on how far trainer and engines may disagree."""

import math

import pytest

from grpo_mcore.config import ConfigError, GRPOConfig, RolloutConfig
from grpo_mcore.errors import MismatchError
from grpo_mcore.preflight.settings import check_mismatch_limits
from grpo_mcore.steps.verdict import HandOver, MismatchLimits, verdict


def test_verdict_of_proven_samples():
    line = verdict([HandOver(41, 41, 311)] * 2, 1.00031, is_high=False)
    assert line == "sync ok: 0 of 311 tensors differ, mismatch 1.0003, engine 41 = trainer 41"


def test_verdict_of_samples_of_two_versions():
    line = verdict([HandOver(6, 6, 311), HandOver(4, 4, 311)], None, is_high=False)
    assert line.endswith("mismatch not measured, engine 4 = trainer 4, engine 6 = trainer 6")


def test_verdict_of_samples_of_the_reference():
    line = verdict([HandOver(2, 2, 311, "reference")], 1.2, is_high=False)
    assert line.endswith("engine 2 = reference 2")


def test_verdict_is_in_doubt_without_proof_or_agreement():
    line = verdict([HandOver(-1, 41, 311)], 1.0, is_high=False)
    assert line.startswith("sync in doubt: 311 tensors not proven")
    assert line.endswith("engine -1 != trainer 41")
    assert verdict([HandOver(4, 4, 3)], 1.2, is_high=True).startswith("sync in doubt: 0 of 3 ")


def test_each_crossing_of_the_limit_is_told_once():
    limits = MismatchLimits(1.1, None)
    measured = [1.0, 1.2, 1.3, None, 1.2, 1.1, 1.11, math.nan]
    told = [limits.judge(step, value) for step, value in enumerate(measured)]
    assert [line is not None for line in told] == [0, 1, 0, 0, 1, 0, 1, 0]
    assert (
        "warning: step 1: sampling/mismatch is 1.2000, above rollout.mismatch_warn=1.1" in told[1]
    )
    assert "tools/diagnose_mismatch.py" in told[1] and "Adapters" in told[1]
    assert [limits.is_high(value) for value in measured] == [0, 1, 1, 0, 1, 0, 1, 1]


@pytest.mark.parametrize("mismatch", [1.51, math.inf, math.nan])
def test_stop_names_step_value_limit_and_the_tool(mismatch):
    limits = MismatchLimits(None, 1.5)
    assert limits.judge(1, 1.5) is None
    with pytest.raises(MismatchError) as stopped:
        limits.judge(7, mismatch)
    said = str(stopped.value)
    assert said.startswith(
        f"step 7: sampling/mismatch is {mismatch:#.5g}, above rollout.mismatch_s"
    )
    assert "rollout.mismatch_stop=1.5" in said and "tools/diagnose_mismatch.py" in said


def test_no_limits():
    limits = MismatchLimits(None, None)
    assert limits.judge(1, 99.0) is None and not limits.is_high(99.0)


@pytest.mark.parametrize(
    "settings, rollout, said",
    [
        ({}, {"mismatch_stop": 1.05}, "mismatch_stop=1.05: must be at least rollout.mismatch_warn"),
        ({"top_p": 0.9}, {"mismatch_stop": 2.0}, "mismatch_stop=2.0: leave it out with top_p=0.9"),
        ({"repetition_penalty": 1.1}, {"mismatch_stop": 2.0}, "leave it out with repetition_pen"),
    ],
)
def test_limits_that_cannot_work(settings, rollout, said):
    with pytest.raises(ConfigError, match=said):
        check_mismatch_limits(GRPOConfig(rollout=RolloutConfig(**rollout), **settings))


def test_limits_that_can():
    for rollout in ({}, {"mismatch_warn": None, "mismatch_stop": 1.0}, {"mismatch_stop": 1.1}):
        check_mismatch_limits(GRPOConfig(rollout=RolloutConfig(**rollout)))
    check_mismatch_limits(GRPOConfig(top_p=0.9))
