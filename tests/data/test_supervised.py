"""Examples are those TRL's SFTTrainer trains on, token for token and target for target."""

import warnings

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_mcore.data.sources import open_dataset
from grpo_mcore.data.supervised import load_examples
from grpo_mcore.errors import ConfigError
from tests.data import trl_oracle
from tests.data.trl_oracle import tokenizer_with

WORDS = ["tom has 14 cards.", "how many?", "the number is 3", "", "<eos>", "ü 数"]


def ask(text):
    return {"role": "user", "content": text}


def reply(text):
    return {"role": "assistant", "content": text}


TEXTS = [{"text": "tom has 14 cards."}, {"text": "how many?<eos>"}, {"text": "3"}]
COMPLETIONS = [
    {"prompt": "tom has 14 cards.", "completion": " how many? 14"},
    {"prompt": "how many", "completion": "?<eos>"},
    {"prompt": "tom ha", "completion": "s 14"},  # tokens merge over the seam
]
MESSAGES = [
    {"messages": [ask("how many?"), reply("14"), ask("and now?"), reply("the number is 3")]},
    {"messages": [ask("tom has 14 cards."), reply("ü")]},
]
CHATS = [
    {"prompt": [ask("how many?")], "completion": [reply("the number is 3")]},
    {"prompt": [ask("how many?"), reply("14"), ask("no")], "completion": [reply("3")]},
]
TOOLS = [
    {
        "messages": [ask("how many?"), reply("14")],
        "tools": '[{"type": "function", "function": {"name": "count", "parameters": {}}}]',
        "chat_template_kwargs": {"enable_thinking": False},
    }
]


def load(rows, tokenizer, **chosen):
    loaded = load_examples(open_dataset("train_dataset", rows), tokenizer, **chosen)
    return [loaded[number] for number in range(loaded.size)]


def assert_as_trl(rows, template, **chosen):
    tokenizer = tokenizer_with(template)
    expected = trl_oracle.supervised(rows, tokenizer, **chosen)
    if not expected:
        with pytest.raises(ConfigError, match="leaves no row of train_dataset a target"):
            load(rows, tokenizer, **chosen)
        return
    found = load(rows, tokenizer, **chosen)
    assert [e.tokens.tolist() for e in found] == [tokens for tokens, _, _ in expected]
    assert [list(e.documents) for e in found] == [lengths for _, _, lengths in expected]
    for example, (_, labels, _) in zip(found, expected, strict=True):
        # The loss shifts labels, so a first one never counts.
        assert list(example.targets) == [0, *(int(label != -100) for label in labels[1:])]


@pytest.mark.seed(62)
@pytest.mark.filterwarnings("ignore:prompts end in tokens")
@pytest.mark.parametrize("template", ["qwen3", "qwen2_5_training", "deepseek_r1_distill"])
@pytest.mark.parametrize(
    "rows, chosen",
    [
        (TEXTS, {}),
        ([{"story": "tom has 14 cards."}], {"text_column": "story"}),
        (COMPLETIONS, {}),
        (COMPLETIONS, {"completion_only_loss": False}),
        (MESSAGES, {}),
        (CHATS, {}),
        (CHATS, {"completion_only_loss": False}),
        (TOOLS, {}),
    ],
    ids=["text", "column", "completion", "whole", "messages", "chat", "whole chat", "tools"],
)
@pytest.mark.parametrize("max_length", [None, 9, 50])
def test_rows_of_every_kind(template, rows, chosen, max_length):
    assert_as_trl(rows, template, max_length=max_length, **chosen)


@pytest.mark.parametrize("template", ["qwen3_training", "qwen2_5_training", "llama3_training"])
@pytest.mark.parametrize("rows", [MESSAGES, CHATS], ids=["messages", "chat"])
def test_assistant_only_loss(template, rows):
    assert_as_trl(rows, template, assistant_only_loss=True)


@settings(max_examples=15, deadline=None)
@given(
    texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=6), min_size=1, max_size=12),
    max_length=st.integers(4, 20),
)
def test_packing(texts, max_length):
    assert_as_trl(
        [{"text": " ".join(words)} for words in texts], None, max_length=max_length, packing=True
    )


def test_packing_takes_a_thousand_rows_at_a_time():
    rows = [{"text": WORDS[n * n % len(WORDS)] * (n % 5)} for n in range(1500)]
    assert_as_trl(rows, None, max_length=16, packing=True)


@pytest.mark.filterwarnings("ignore:prompts end in tokens")
def test_packed_completions():
    assert_as_trl(COMPLETIONS, None, max_length=24, packing=True)
    (packed,) = load(COMPLETIONS, tokenizer_with(None), max_length=40, packing=True)
    starts = [sum(packed.documents[:n]) for n in range(3)]
    assert len(packed.documents) == 3
    assert [packed.targets[start] for start in starts] == [0, 0, 0]


def test_rows_left_without_a_target_are_left_out():
    rows = [{"prompt": "tom has 14 cards.", "completion": " 3"}, {"prompt": "a", "completion": "3"}]
    tokenizer = tokenizer_with(None)
    whole = load(rows, tokenizer)
    prompt_length = len(whole[0].tokens) - sum(whole[0].targets)
    assert len(load(rows, tokenizer, max_length=prompt_length)) == 1
    assert_as_trl(rows, None, max_length=prompt_length)
    with pytest.raises(ConfigError, match="max_length=1: leaves no row of train_dataset a target"):
        load(rows, tokenizer, max_length=1)


def test_a_stream_gives_the_same_examples():
    tokenizer = tokenizer_with(None)
    stream = Dataset.from_list(TEXTS).to_iterable_dataset()
    for chosen in ({}, {"packing": True, "max_length": 8}):
        loaded = load_examples(open_dataset("train_dataset", stream), tokenizer, **chosen)
        expected = load(TEXTS, tokenizer, **chosen)
        assert [loaded[n] for n in range(2 * len(expected))] == expected * 2


def test_an_empty_list_of_tools_is_none():
    tokenizer = tokenizer_with(None)
    tokenizer.chat_template = "{{ 'tools' if tools is not none else messages[0].content }}"
    (example,) = load([MESSAGES[1] | {"tools": []}], tokenizer)
    assert tokenizer.decode(example.tokens) == "tom has 14 cards."


def test_a_prompt_that_merges_with_its_completion_is_warned_of():
    with pytest.warns(UserWarning, match="prompts end in tokens"):
        load(COMPLETIONS[2:], tokenizer_with(None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(COMPLETIONS[:2], tokenizer_with(None))


REFUSED = {
    "no column": ([{"question": "?"}], {}, "train_dataset: has no column text; it has question"),
    "no completion": (
        TEXTS, {"completion_only_loss": True},
        "completion_only_loss=True: train_dataset has no columns prompt and completion",
    ),
    "no marks": (MESSAGES, {"assistant_only_loss": True}, "assistant_only_loss=True: the chat"),
    "no length": (TEXTS, {"packing": True}, "packing=True: needs max_length"),
    "not text": ([{"text": 3}], {}, "train_dataset: row 0 has neither text nor messages in text"),
    "mixed": (
        [{"prompt": "?", "completion": [reply("3")]}], {},
        "train_dataset: row 0 has text in one of prompt and completion",
    ),
}  # fmt: skip


@pytest.mark.parametrize("rows, chosen, message", REFUSED.values(), ids=REFUSED.keys())
def test_refusals(rows, chosen, message):
    with pytest.raises(ConfigError) as caught:
        load(rows, tokenizer_with("qwen3"), **chosen)
    assert str(caught.value).startswith(message)


def test_refusals_of_assistant_only_loss_by_row():
    tokenizer = tokenizer_with("qwen3_training")
    with pytest.raises(ConfigError, match="row 0 is no conversation, as assistant_only_loss=True"):
        load(TEXTS, tokenizer, assistant_only_loss=True)
    with pytest.raises(ConfigError, match="row 0 has nothing that the chat template marks"):
        load([{"messages": [ask("how many?")]}], tokenizer, assistant_only_loss=True)


def test_text_needs_an_end_token():
    tokenizer = tokenizer_with(None)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="row 0 has text, but the tokenizer has no eos_token"):
        load(TEXTS, tokenizer)
