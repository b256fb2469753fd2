"""Functions of every style are given what they name, and what they return is checked."""

import asyncio
import functools
import math
import threading
import time

import numpy
import pytest
import torch

from grpo_mcore.rewards import (
    RewardCall,
    RewardError,
    as_reward_specs,
    reward,
    reward_metrics,
    score,
)

STATE = object()
CALL = RewardCall(
    step=7,
    prompts=["p", "q"],
    completions=["a", "bb"],
    completion_ids=[[1], [2, 3]],
    columns={"prompt": ["p", "q"], "completion": ["x", "y"], "answer": ["1", "22"]},
    trainer_state=STATE,
)
CHAT = RewardCall(
    step=7,
    prompts=[
        [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}],
        [{"role": "user", "content": "q"}],
    ],
    completions=[
        [{"role": "assistant", "content": "a"}],
        [
            {"role": "assistant", "content": None, "tool_calls": []},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "bb"},
        ],
    ],
    completion_ids=[[1], [2, 3]],
    columns={"ground_truth": ["1", "22"]},
)


def rewards_of(functions, call=CALL, **settings) -> list[list[float]]:
    return score(as_reward_specs(functions), call, **settings).rewards.tolist()


@pytest.mark.seed(3, 37, 41)
def test_batch_functions_are_given_all_there_is():
    seen = {}

    def function(**kwargs):
        seen.update(kwargs)
        return [0.0, 1.0]

    assert rewards_of(function) == [[0.0], [1.0]]
    assert callable(seen.pop("log_metric")) and callable(seen.pop("log_extra"))
    assert seen == {
        "prompts": ["p", "q"],
        "completions": ["a", "bb"],
        "completion_ids": [[1], [2, 3]],
        "answer": ["1", "22"],
        "trainer_state": STATE,
    }


@pytest.mark.seed(41)
def test_functions_without_rest_are_given_what_they_name():
    def function(completions, answer, bonus=0.5):
        return [len(c) + len(a) + bonus for c, a in zip(completions, answer, strict=True)]

    assert rewards_of(function) == [[2.5], [4.5]]


def test_batch_functions_are_given_conversations_as_messages():
    def function(prompts, completions):
        assert prompts == CHAT.prompts and completions == CHAT.completions
        return [1, 2]

    assert rewards_of(function, CHAT) == [[1.0], [2.0]]


@pytest.mark.seed(61)
@pytest.mark.parametrize("call", [CALL, CHAT], ids=["text", "conversations"])
def test_per_sample_functions_are_given_text(call):
    seen = []

    def function(prompt, response):
        seen.append((prompt, response))
        return len(response)

    assert rewards_of(function, call) == [[1.0], [2.0]]
    assert seen == [("p", "a"), ("q", "bb")]


@pytest.mark.seed(72)
@pytest.mark.parametrize("call", [CALL, CHAT], ids=["text", "conversations"])
def test_response_functions_are_given_texts_and_ground_truths(call):
    def function(responses, ground_truths):
        assert list(responses) == ["a", "bb"] and ground_truths == ["1", "22"]
        return [0.5, 1.5]

    assert rewards_of(function, call) == [[0.5], [1.5]]


@pytest.mark.seed(43)
def test_columns_come_by_name_in_every_style_and_of_the_sample_in_one():
    def per_sample(prompt, response, answer, completion_ids, trainer_state):
        assert trainer_state is STATE
        return len(answer) + 10 * len(completion_ids)

    def responses(responses, answer):
        return [len(a) for a in answer]

    assert rewards_of([per_sample, responses]) == [[11.0, 1.0], [22.0, 2.0]]


def test_the_decorator_fills_the_first_two_by_place():
    per_sample = reward(style="per_sample")(lambda q, a, answer: len(q + a + answer))
    responses = reward(style="responses")(lambda a, b: [len(x + y) for x, y in zip(a, b)])  # noqa: B905
    batch = reward(style="batch")(lambda p, c, *, answer: [len(x) for x in answer])
    assert rewards_of([per_sample, responses, batch]) == [[3.0, 2.0, 1.0], [5.0, 4.0, 2.0]]


def test_what_partial_binds_no_column_replaces():
    def function(prompts, completions, answer, **kwargs):
        assert answer == "bound" and "answer" not in kwargs
        return [1, 1]

    assert rewards_of(functools.partial(function, answer="bound")) == [[1.0], [1.0]]


@pytest.mark.seed(41)
def test_none_is_nan_in_the_matrix_and_out_of_the_metrics():
    specs = as_reward_specs(
        [lambda **_: [None, 3.0], lambda prompt, response: None, lambda **_: [1.0, 2.0]]
    )
    rewards = score(specs, CALL).rewards
    assert rewards.dtype == torch.float32 and rewards.shape == (2, 3)
    expected = torch.tensor([[math.nan, math.nan, 1.0], [3.0, math.nan, 2.0]])
    torch.testing.assert_close(rewards, expected, equal_nan=True)
    assert reward_metrics(specs, rewards) == {
        "rewards/<lambda>/mean": 3.0,
        "rewards/<lambda>_3/mean": 1.5,
        "rewards/<lambda>_3/std": pytest.approx(0.5**0.5),
    }


@pytest.mark.parametrize(
    "rewards",
    [
        (0, True),
        numpy.array([0.0, 1.0]),
        torch.tensor([0.0, 1.0]),
        [torch.tensor(0.0), numpy.float32(1)],
    ],
    ids=["tuple", "array", "tensor", "scalars"],
)
def test_any_kind_of_number_will_do(rewards):
    assert rewards_of(lambda **_: rewards) == [[0.0], [1.0]]


def test_what_functions_log_is_collected():
    def batch(log_metric, log_extra, **_):
        log_metric("accuracy", 0.5)
        log_extra("parsed", ["x", "y"])
        return [0, 0]

    async def per_sample(prompt, response, log_metric):
        log_metric("length", len(response))
        return 0.0

    scores = score(as_reward_specs([batch, per_sample]), CALL)
    assert scores.metrics == {"accuracy": [0.5], "length": [1.0, 2.0]}
    assert scores.extra == {"parsed": ["x", "y"]}


def test_an_extra_column_of_another_length_is_refused():
    def function(log_extra, **_):
        log_extra("parsed", ["x"])
        return [0, 0]

    with pytest.raises(RewardError, match=r"log_extra\('parsed'\) got 1 values for 2 .* step 7"):
        rewards_of(function)


def test_async_functions_of_every_style_run_together():
    """Each waits until all have begun, so one after the other would never end."""
    begun, everyone = [], 4

    async def together():
        begun.append(1)
        while len(begun) < everyone:
            await asyncio.sleep(0.001)

    async def batch(completions, **_):
        await together()
        return [1, None]

    async def per_sample(prompt, response):
        await together()
        return 2

    class Responses:
        async def __call__(self, responses, ground_truths):
            await together()
            return [3, 3]

    rewards = rewards_of([batch, per_sample, lambda **_: [9, 9], Responses()], timeout=20)
    assert rewards[0] == [1.0, 2.0, 9.0, 3.0]
    assert math.isnan(rewards[1][0]) and rewards[1][1:] == [2.0, 9.0, 3.0]


def test_async_functions_keep_one_event_loop():
    """Clients hold connections that die with their loop."""
    loops = set()

    async def function(completions, **_):
        loops.add(asyncio.get_running_loop())
        return [0, 0]

    async def within_another_loop():
        return rewards_of(function)

    rewards_of(function)
    asyncio.run(within_another_loop())
    [loop] = loops
    assert loop.is_running()


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_a_function_runs_in_the_main_thread_but_with_a_limit(timeout):
    threads = []

    def function(**_):
        threads.append(threading.current_thread())
        return [0, 0]

    @reward(limits_itself=True)
    def careful(**_):
        threads.append(threading.current_thread())
        return [0, 0]

    rewards_of([function, careful], timeout=timeout)
    assert (threads[0] is threading.main_thread()) == (timeout is None)
    assert threads[1] is threading.main_thread()


def sleeping(**_):
    time.sleep(30)


def sleeping_on_each(prompt, response):
    time.sleep(30)


async def async_sleeping(completions, **_):
    await asyncio.sleep(30)


@pytest.mark.parametrize("function", [sleeping, sleeping_on_each, async_sleeping])
def test_a_late_function_is_named_with_the_step(function):
    started = time.monotonic()
    with pytest.raises(RewardError) as caught:
        rewards_of([lambda **_: [0, 0], function], timeout=0.1)
    assert time.monotonic() - started < 10
    expected = f"reward function {function.__name__} took more than 0.1 s at step 7"
    assert str(caught.value) == expected
    left = [t for t in threading.enumerate() if t.name == f"reward {function.__name__}"]
    assert all(thread.daemon for thread in left)  # or the process could not end


def test_an_async_function_that_blocks_is_late_too():
    done = threading.Event()

    async def blocking(completions, **_):
        done.wait(30)  # as a plain HTTP request would

    try:
        with pytest.raises(RewardError, match=r"\(blocking\) took more than 0\.1 s at step 7"):
            rewards_of(blocking, timeout=0.1)
    finally:
        done.set()


def test_a_timeout_of_the_function_itself_is_a_failure():
    async def function(completions, **_):
        raise TimeoutError("the judge does not answer")

    def plain(**_):
        raise TimeoutError("the judge does not answer")

    for each in (function, plain):
        with pytest.raises(RewardError, match="failed at step 7: TimeoutError: the judge does not"):
            rewards_of(each, timeout=20)


def raising(**_):
    raise ZeroDivisionError("no tokens")


async def async_raising(prompt, response):
    raise ZeroDivisionError("no tokens")


def too_few(**_):
    return [1.0]


async def async_too_many(completions, **_):
    return [1.0, 2.0, 3.0]


def single(**_):
    return 1.0


def forgot_to_return(**_):
    pass


def a_generator(**_):
    yield 1.0


def not_a_number(**_):
    return [1.0, math.nan]


def endless_for_one(prompt, response):
    return math.inf if response == "bb" else 0.0


def words(**_):
    return [1.0, "1.0"]


@pytest.mark.parametrize("timeout", [None, 20.0])
@pytest.mark.parametrize(
    "function, reason",
    [
        (raising, "failed at step 7: ZeroDivisionError: no tokens"),
        (async_raising, "failed at step 7: ZeroDivisionError: no tokens"),
        (too_few, "returned 1 values for 2 completions at step 7"),
        (async_too_many, "returned 3 values for 2 completions at step 7"),
        (single, "returned a float at step 7; a list of 2 numbers is needed"),
        (forgot_to_return, "returned a NoneType at step 7; a list of 2 numbers is needed"),
        (a_generator, "returned a generator at step 7; a list of 2 numbers is needed"),
        (not_a_number, "returned nan (float) for completion 1 at step 7; a finite number or None"),
        (endless_for_one, "returned inf (float) for completion 1 at step 7; a finite number or"),
        (words, "returned '1.0' (str) for completion 1 at step 7; a finite number or None"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_trained_on_is_refused(function, reason, timeout):
    with pytest.raises(RewardError) as caught:
        rewards_of([lambda **_: [0, 0], function], timeout=timeout)
    assert str(caught.value).startswith(f"reward function {function.__name__} {reason}")


def test_the_cause_of_a_failure_is_kept():
    with pytest.raises(RewardError) as caught:
        rewards_of(raising, timeout=20)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_lacking_column_is_named():
    with pytest.raises(RewardError, match="function compare needs ground_truths at step 7; there"):

        def compare(responses, ground_truths): ...

        rewards_of(compare, RewardCall(7, ["p"], ["a"], [[1]], {"question": ["q"]}))


def test_columns_of_another_length_are_refused():
    with pytest.raises(ValueError, match="answer: 1 for 2 prompts"):
        RewardCall(7, ["p", "q"], ["a", "b"], [[1], [2]], {"answer": ["1"]})
