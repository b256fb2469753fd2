"""How a reward is to be called is settled when it is registered, or refused."""

import functools

import pytest

from grpo_mcore.errors import ConfigError
from grpo_mcore.rewards import (
    AdaptiveTeachingReward,
    accuracy_reward,
    as_reward_specs,
    get_soft_overlong_punishment,
    reward,
    think_format_reward,
)
from tests.conftest import name_of


def style(function) -> str:
    [spec] = as_reward_specs(function)
    return spec.style


def trl_like(completions, **kwargs): ...
def trl_like_without_rest(prompts, completions, answer): ...
def tokens_only(completion_ids, **kwargs): ...
def rest_only(**kwargs): ...
def with_a_column_named_responses(prompts, completions, responses, **kwargs): ...
def nemo_like(prompt, response): ...
def nemo_like_with_column(prompt, response, answer): ...
def unsloth_like(responses, ground_truths): ...
def unsloth_like_with_column(responses, answer): ...
async def async_batch(prompts, completions, **kwargs): ...


class Judge:
    def __call__(self, prompt, response): ...

    def judge(self, responses, ground_truths): ...

    @reward(style="responses")
    def compare(self, a, b): ...


@pytest.mark.seed(3, 41, 61, 72)
@pytest.mark.parametrize(
    "function, expected",
    [
        (trl_like, "batch"),
        (trl_like_without_rest, "batch"),
        (tokens_only, "batch"),
        (rest_only, "batch"),
        (with_a_column_named_responses, "batch"),
        (async_batch, "batch"),
        (AdaptiveTeachingReward(), "batch"),
        (accuracy_reward, "batch"),
        (think_format_reward, "batch"),
        (get_soft_overlong_punishment(10, 5), "batch"),
        (nemo_like, "per_sample"),
        (nemo_like_with_column, "per_sample"),
        (Judge(), "per_sample"),
        (unsloth_like, "responses"),
        (unsloth_like_with_column, "responses"),
        (Judge().judge, "responses"),
        (functools.partial(unsloth_like, ground_truths=["1"]), "responses"),
        (functools.partial(lambda rubric, prompt, response: 0, "strict"), "per_sample"),
        (reward(style="per_sample")(lambda question, answer: 0), "per_sample"),
        (reward(style="batch")(lambda completions, **_: 0), "batch"),
        (Judge().compare, "responses"),
        (functools.partial(reward(style="responses")(lambda a, b, c: 0), c=1), "responses"),
    ],
    ids=name_of,
)
def test_the_names_of_the_parameters_tell_the_style(function, expected):
    assert style(function) == expected


def two_strangers(a, b): ...
def mixed_numbers(prompt, responses): ...
def prompts_and_responses(prompts, responses): ...
def columns_only(answer): ...
def nothing(): ...


@pytest.mark.seed(41)
@pytest.mark.parametrize(
    "function", [two_strangers, mixed_numbers, prompts_and_responses, columns_only, nothing]
)
def test_what_could_be_called_in_several_ways_or_none_is_refused_with_the_way_out(function):
    with pytest.raises(ConfigError) as caught:
        as_reward_specs([trl_like, function])
    message = str(caught.value)
    assert message.startswith(f"reward_funcs[1]={function.__name__}: ")
    assert "@reward(style=...)" in message and "batch, per_sample, responses" in message


@pytest.mark.parametrize(
    "wrong, reason",
    [
        (3, r"reward_funcs\[0\]=int: a reward is a function"),
        (AdaptiveTeachingReward, r"reward_funcs\[0\]=AdaptiveTeachingReward: a reward is"),
        (None, "give at least one"),
        ([], "give at least one"),
        (iter, "signature cannot be read"),
        (reward(style="per_sample")(lambda text: 0), "needs two parameters, for prompt and resp"),
    ],
    ids=["number", "class", "none", "empty", "c function", "one parameter"],
)
def test_what_is_no_reward_function_is_refused(wrong, reason):
    with pytest.raises(ConfigError, match=reason):
        as_reward_specs(wrong)


def test_an_unknown_style_is_refused():
    with pytest.raises(
        ConfigError, match=r"@reward\(style='each'\): choose one of batch, per_samp"
    ):
        reward(style="each")


def test_names_are_trls_and_unique():
    functions = [
        trl_like,
        functools.partial(trl_like, x=1),
        lambda **_: [],
        lambda **_: [],
        Judge(),
        get_soft_overlong_punishment(10, 5),
    ]
    assert [spec.name for spec in as_reward_specs(functions)] == [
        "trl_like", "trl_like_2", "<lambda>", "<lambda>_2", "Judge",
        "soft_overlong_punishment_reward",
    ]  # fmt: skip


@pytest.mark.seed(41, 77)
def test_weights_are_one_each_unless_given():
    assert [spec.weight for spec in as_reward_specs([trl_like, nemo_like])] == [1.0, 1.0]
    specs = as_reward_specs([trl_like, nemo_like], weights=[0.5, -2])
    assert [spec.weight for spec in specs] == [0.5, -2.0]


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [1.0, float("nan")]], ids=name_of)
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(ConfigError, match="reward_weights="):
        as_reward_specs([trl_like, nemo_like], weights)


@pytest.mark.seed(8, 46)
def test_tokenizers_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="reward_processing_classes: 1 for 2 reward functions"):
        as_reward_specs([trl_like, nemo_like], processing_classes=[None])


@pytest.mark.parametrize(
    "function, columns, missing",
    [
        (trl_like_without_rest, ["question"], "answer"),
        (accuracy_reward, ["prompt", "answer"], "solution"),
        (nemo_like_with_column, ["prompt"], "answer"),
        (unsloth_like, ["question"], "ground_truths"),
        (Judge().compare, ["question"], "ground_truths"),
        (AdaptiveTeachingReward(), ["ground_truths", "solutions"], "baseline_solutions"),
    ],
    ids=name_of,
)
def test_a_parameter_that_no_column_fills_is_refused_early(function, columns, missing):
    with pytest.raises(ConfigError, match=f"nothing fills its parameter {missing}; there are the"):
        as_reward_specs(function, columns=columns)


@pytest.mark.parametrize(
    "function, columns",
    [
        (trl_like_without_rest, ["answer"]),
        (unsloth_like, ["ground_truth"]),
        (unsloth_like, ["answer"]),
        (functools.partial(trl_like_without_rest, answer="1"), []),
        (lambda prompts, completions, completion_ids, trainer_state, log_metric, best=1: 0, []),
    ],
    ids=name_of,
)
def test_a_function_whose_parameters_are_all_filled_is_admitted(function, columns):
    assert len(as_reward_specs(function, columns=columns)) == 1
