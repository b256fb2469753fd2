"""Pairs are those TRL's DPOTrainer compares."""

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl.data_utils import extract_prompt, maybe_extract_prompt

from grpo_mcore.data.preferences import load_preferences, split_prompt
from grpo_mcore.data.sources import open_dataset
from grpo_mcore.errors import ConfigError
from tests.data import trl_oracle
from tests.data.trl_oracle import tokenizer_with

ASK = {"role": "user", "content": "how many cards has tom?"}
GOOD = {"role": "assistant", "content": "tom has 14 cards."}
BAD = {"role": "assistant", "content": "7 coins"}

PLAIN = [
    {"prompt": "how many?", "chosen": " 14", "rejected": " 3<eos>"},
    {"prompt": "tom ha", "chosen": "s 14", "rejected": "d 14 cards and 7 coins."},
]
IMPLICIT = [
    {"chosen": "tom has 14 cards.", "rejected": "tom has 3"},
    {"chosen": "the number is 3", "rejected": "the number is 14"},
]
CHATS = [
    {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [ASK, BAD, ASK], "chosen": [GOOD], "rejected": [BAD]},
]
IMPLICIT_CHATS = [{"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}]
TOOLS = [
    CHATS[0]
    | {
        "tools": '[{"type": "function", "function": {"name": "count", "parameters": {}}}]',
        "chat_template_kwargs": {"enable_thinking": False},
    }
]


def load(rows, tokenizer, max_length=None):
    loaded = load_preferences(open_dataset("train_dataset", rows), tokenizer, max_length)
    return [loaded[number] for number in range(loaded.size)]


def laid_out(preference):
    prompt = preference.prompt.tolist()
    for completion in (preference.chosen.tolist(), preference.rejected.tolist()):
        yield prompt + completion
        yield [0] * len(prompt) + [1] * len(completion)


@pytest.mark.seed(63)
@pytest.mark.filterwarnings("ignore:prompts end in tokens")
@pytest.mark.parametrize("template", ["qwen3", "phi3", "deepseek_r1_distill"])
@pytest.mark.parametrize(
    "rows",
    [PLAIN, IMPLICIT, CHATS, IMPLICIT_CHATS, TOOLS],
    ids=["plain", "implicit", "chats", "implicit chats", "tools"],
)
@pytest.mark.parametrize("max_length", [None, 7, 60])
def test_pairs_of_every_kind(template, rows, max_length):
    tokenizer = tokenizer_with(template)
    expected = trl_oracle.preferences(rows, tokenizer, max_length)
    if not expected:
        with pytest.raises(ConfigError, match=f"max_length={max_length}: every prompt of train_"):
            load(rows, tokenizer, max_length)
        return
    found = load(rows, tokenizer, max_length)
    assert [tuple(laid_out(preference)) for preference in found] == expected


@given(st.text("ab ", min_size=1), st.text("ab ", min_size=1))
def test_the_prompt_is_what_both_begin_with(chosen, rejected):
    expected = extract_prompt({"chosen": chosen, "rejected": rejected})
    found = split_prompt(chosen, rejected)
    assert found[0] + found[1] == chosen and found[0] + found[2] == rejected
    if chosen[0] == rejected[0]:  # otherwise TRL may look before the first character
        assert found == (expected["prompt"], expected["chosen"], expected["rejected"])


def test_a_prompt_as_text_beside_whole_conversations():
    row = {"prompt": ASK["content"], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}
    tokenizer = tokenizer_with("qwen3")
    assert maybe_extract_prompt(row) == CHATS[0]
    assert load([row], tokenizer) == load(CHATS[:1], tokenizer)


def test_a_stream_gives_the_same_pairs():
    tokenizer = tokenizer_with("qwen3")
    stream = open_dataset("train_dataset", Dataset.from_list(CHATS).to_iterable_dataset())
    loaded = load_preferences(stream, tokenizer)
    assert [loaded[n] for n in range(4)] == load(CHATS, tokenizer) * 2


REFUSED = {
    "no column": ({"chosen": "3"}, "train_dataset: has no column rejected; it has chosen"),
    "mixed": (
        {"prompt": "?", "chosen": "3", "rejected": [BAD]},
        "train_dataset: row 0 has text in one of chosen and rejected",
    ),
    "empty": (
        {"chosen": "", "rejected": "3"},
        "train_dataset: row 0 has no text in one of chosen and rejected",
    ),
    "nothing in common": (
        {"chosen": [GOOD], "rejected": [BAD]}, "train_dataset: row 0 has no prompt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row, message", REFUSED.values(), ids=REFUSED.keys())
def test_refusals(row, message):
    with pytest.raises(ConfigError) as caught:
        load([row], tokenizer_with("qwen3"))
    assert str(caught.value).startswith(message)
