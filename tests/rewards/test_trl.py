"""The same as TRL: what its trainer gives reward functions and makes of what they return, and its
own reward functions."""

import functools
import logging
import pickle
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_mcore.rewards import (
    RewardCall,
    accuracy_reward,
    as_reward_specs,
    format_reward,
    get_length_penalty,
    get_soft_overlong_punishment,
    reward_metrics,
    score,
    think_format_reward,
)

trl_rewards = pytest.importorskip("trl.rewards")
EXAMPLES = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def messages(texts: list[str]) -> list[list[dict]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


# What math-verify tells apart, and a solution it cannot read.
NUMBERS = st.sampled_from(
    ["42", "-7", r"\frac{1}{3}", "0.5", r"\frac12", "x+1", "1+x", r"\sqrt{2}", "1,000", "50\\%", ""]
)
WRAPPINGS = st.sampled_from(
    [r"\boxed{%s}", "$%s$", "%s", r"so \boxed{3} or rather \boxed{%s}", r"$%s$ is \boxed{42}", "%%"]
)


@pytest.mark.seed(55)
@given(st.lists(st.tuples(NUMBERS, WRAPPINGS, NUMBERS, WRAPPINGS), min_size=1, max_size=4))
@settings(EXAMPLES, max_examples=40)
def test_accuracy_reward(pairs):
    texts = [w.replace("%s", n) for n, w, _, _ in pairs]
    solution = [w.replace("%s", n) for _, _, n, w in pairs]
    logged, expected_log = {}, {}
    expected = trl_rewards.accuracy_reward(messages(texts), solution, expected_log.__setitem__)
    assert accuracy_reward(messages(texts), solution, logged.__setitem__) == expected
    assert logged == expected_log
    assert accuracy_reward(texts, solution) == expected


@given(st.lists(st.lists(st.sampled_from(["<think>", "</think>", "a", "\n", " "])).map("".join)))
@EXAMPLES
def test_think_format_reward(texts):
    expected = trl_rewards.think_format_reward(messages(texts))
    assert think_format_reward(messages(texts)) == think_format_reward(texts) == expected
    assert format_reward(texts) == expected


@given(st.lists(st.integers(0, 40)), st.integers(1, 30), st.integers(0, 30))
@EXAMPLES
def test_soft_overlong_punishment(lengths, longest, cache):
    cache = min(cache, longest)
    ids = [[0] * length for length in lengths]
    theirs = trl_rewards.get_soft_overlong_punishment(longest, cache)
    ours = pickle.loads(pickle.dumps(get_soft_overlong_punishment(longest, cache)))
    assert ours(completion_ids=ids) == theirs(completion_ids=ids)
    assert ours.__name__ == theirs.__name__


@given(st.lists(st.integers(0, 40)), st.integers(1, 30))
@EXAMPLES
def test_length_penalty_is_the_punishment_with_all_of_the_length_for_its_cache(lengths, longest):
    ids = [[0] * length for length in lengths]
    theirs = trl_rewards.get_soft_overlong_punishment(longest, longest)
    assert get_length_penalty(longest)(completion_ids=ids) == theirs(completion_ids=ids)


def half(completions, **kwargs):
    return [None, 0.5, 1.0]


async def later(completions, completion_ids, answer, **kwargs):
    return [len(ids) + float(a) for ids, a in zip(completion_ids, answer, strict=True)]


class Recorder:
    """Scores nothing and keeps what it is given."""

    def __call__(self, **kwargs):
        self.seen = kwargs
        kwargs["log_metric"]("count", 3)
        kwargs["log_extra"]("row", [0, 1, 2])
        return [None, 0.0, 1.0]


@pytest.mark.seed(41)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("conversational", [False, True])
def test_calculate_rewards(conversational, reward_model, tiny_models, tmp_path):
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    logging.getLogger("trl").setLevel(logging.ERROR)
    prompts, completions = ["tom has 14", "how", "many"], [" cards.", " many", ""]
    if conversational:
        prompts = [[{"role": "user", "content": p}] for p in prompts]
        completions = messages(completions)
    ids, answer = [[1], [2, 3], []], ["1", "2", "3"]
    template = {"mood": " :)"}

    recorders = [Recorder(), Recorder()]
    funcs = [
        [half, later, recorder, str(reward_model), functools.partial(half, x=1)]
        for recorder in recorders
    ]
    theirs = GRPOTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(tiny_models / "teacher"),
        funcs[0],
        GRPOConfig(
            tmp_path, report_to=[], use_cpu=True, bf16=False, chat_template_kwargs=template,
            reward_weights=[1.0, 2.0, 3.0, 4.0, 5.0],
        ),
        train_dataset=Dataset.from_list([{"prompt": "a"}]),
        processing_class=transformers.AutoTokenizer.from_pretrained(tiny_models / "teacher"),
    )  # fmt: skip
    rows = [
        {"prompt": p, "completion": "unseen", "answer": a}
        for p, a in zip(prompts, answer, strict=True)
    ]
    expected = theirs._calculate_rewards(rows, prompts, completions, ids)

    specs = as_reward_specs(
        funcs[1], [1.0, 2.0, 3.0, 4.0, 5.0], columns=rows[0], chat_template_kwargs=template
    )
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    scores = score(specs, RewardCall(1, prompts, completions, ids, columns, theirs.state))
    torch.testing.assert_close(scores.rewards, expected, equal_nan=True)
    assert scores.metrics == theirs._pending_metrics
    assert scores.extra == theirs._pending_extra_logs

    seen, expected_seen = (recorder.seen for recorder in reversed(recorders))
    assert seen.keys() == expected_seen.keys()
    for name in seen.keys() - {"log_metric", "log_extra"}:
        assert seen[name] == expected_seen[name], name
    assert [spec.weight for spec in specs] == theirs.reward_weights.tolist()
    names = [spec.name for spec in specs]
    assert names[:-1] == theirs.reward_func_names[:-1] and names[-1] == "half_2"


@given(st.lists(st.none() | st.floats(-10, 10), min_size=1, max_size=6))
@EXAMPLES
def test_metrics_of_a_function(rewards):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL warns of our vLLM
        from trl.trainer.utils import nanstd

    values = torch.tensor([[torch.nan if r is None else r] for r in rewards])
    expected = {
        "rewards/half/mean": values[:, 0].nanmean().item(),
        "rewards/half/std": nanstd(values[:, 0]).item(),
    }
    found = reward_metrics(as_reward_specs(half), values)
    assert found == pytest.approx(
        {name: v for name, v in expected.items() if v == v}, abs=1e-5, rel=1e-5
    )
