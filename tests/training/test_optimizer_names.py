"""transformers' names of optimizers and schedules."""

import warnings

import pytest
from transformers.training_args import OptimizerNames, SchedulerType, TrainingArguments

from grpo_mcore.errors import ConfigError
from grpo_mcore.training.optimizer_names import (
    ADAMW,
    ADAMW_8BIT,
    DECAY_STYLES,
    check_optim,
    decay_style,
)

OTHERS = sorted({name.value for name in OptimizerNames} - {*ADAMW, *ADAMW_8BIT})
OTHER_SCHEDULES = sorted({name.value for name in SchedulerType} - {*DECAY_STYLES})


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("name", [*ADAMW, OptimizerNames.ADAMW_TORCH])
def test_adamw_is_served(name):
    check_optim(name)


def test_transformers_default_is_served():
    check_optim(TrainingArguments().optim)


@pytest.mark.seed(75)
@pytest.mark.parametrize("name", ADAMW_8BIT)
def test_8bit_states_are_float32_with_one_warning(name, monkeypatch):
    with pytest.warns(UserWarning, match=f"optim={name}: AdamW with states in float32") as caught:
        check_optim(name)
    assert len(caught) == 1
    monkeypatch.setenv("RANK", "1")
    check_optim(name)


@pytest.mark.parametrize("name", [*OTHERS, "adam"])
def test_another_algorithm_is_refused(name):
    with pytest.raises(ConfigError) as caught:
        check_optim(name)
    assert str(caught.value).startswith(f"optim={name}: choose one of ")
    assert all(served in str(caught.value) for served in (*ADAMW, *ADAMW_8BIT))


def test_every_8bit_name_and_schedule_is_one_of_transformers():
    assert {*ADAMW_8BIT} <= {name.value for name in OptimizerNames}
    assert DECAY_STYLES.keys() <= {name.value for name in SchedulerType}


@pytest.mark.parametrize("name", DECAY_STYLES)
def test_schedules_have_a_style_of_megatrons(name):
    assert decay_style(name) in ("constant", "linear", "cosine")
    assert decay_style(SchedulerType(name)) == decay_style(name)


@pytest.mark.parametrize("name", OTHER_SCHEDULES)
def test_another_schedule_is_refused(name):
    message = f"lr_scheduler_type={name}: choose one .* linear, cosine, constant, constant_with"
    with pytest.raises(ConfigError, match=message):
        decay_style(name)
