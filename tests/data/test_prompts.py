"""Prompts are those TRL gives the model; what cannot be one is refused by its row."""

import pytest
from datasets import Dataset
from trl.data_utils import apply_chat_template

from grpo_mcore.data.prompts import Prompt, encode_prompt, load_prompts
from grpo_mcore.data.sources import open_dataset
from grpo_mcore.errors import ConfigError
from tests.data.trl_oracle import prompt_tokens, tokenizer_with

USER = {"role": "user", "content": "tom has 14 cards."}
SYSTEM = {"role": "system", "content": "solve this problem"}
BEGUN = {"role": "assistant", "content": "the number is"}
TEMPLATES = ("qwen3", "qwen2_5", "phi3")


def count_cards(name: str) -> int:
    """Counts somebody's cards.

    Args:
        name: whose.

    Returns:
        How many there are.
    """


def load(prompts, template="qwen3", **settings):
    rows = [p if isinstance(p, dict) else {"prompt": p} for p in prompts]
    loaded = load_prompts(open_dataset("train_dataset", rows), tokenizer_with(template), **settings)
    return [loaded[number] for number in range(loaded.size)]


@pytest.mark.seed(43)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tools", [[], [count_cards]], ids=["", "tools"])
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}], ids=["", "kwargs"])
def test_conversations_are_encoded_as_trl_does(template, tools, kwargs):
    tokenizer = tokenizer_with(template)
    prompts = [[USER], [SYSTEM, USER], [USER, BEGUN, USER]]
    found = load(prompts, template, tools=tools, chat_template_kwargs=kwargs)
    assert [prompt.tokens for prompt in found] == prompt_tokens(prompts, tokenizer, tools, kwargs)
    assert [prompt.text for prompt in found] == prompts


@pytest.mark.seed(43)
def test_plain_text_is_encoded_as_it_is():
    tokenizer = tokenizer_with("qwen3")
    texts = ["tom has 14 cards.", "how many?"]
    assert [p.tokens for p in load(texts)] == prompt_tokens(texts, tokenizer, [], {})
    assert tokenizer.decode(load(texts)[0].tokens) == texts[0]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_assistants_last_message_is_continued(template):
    tokenizer = tokenizer_with(template)
    expected = apply_chat_template({"prompt": [USER, BEGUN]}, tokenizer)["prompt"]
    assert expected.endswith(BEGUN["content"])
    assert tokenizer.decode(encode_prompt(tokenizer, [USER, BEGUN])) == expected


def test_a_rows_own_template_arguments_go_first():
    rows = [
        {"prompt": [USER], "chat_template_kwargs": {"enable_thinking": False}},
        {"prompt": [USER], "chat_template_kwargs": None},
    ]
    first, second = load(rows, chat_template_kwargs={"enable_thinking": True})
    tokenizer = tokenizer_with("qwen3")
    assert first.tokens == encode_prompt(tokenizer, [USER], enable_thinking=False)
    assert second.tokens == encode_prompt(tokenizer, [USER], enable_thinking=True)
    assert first.tokens != second.tokens


@pytest.mark.seed(43)
def test_all_other_columns_are_kept():
    rows = Dataset.from_list([{"prompt": "how many?", "answer": 3, "source": {"name": "a"}}])
    loaded = load_prompts(open_dataset("train_dataset", rows), tokenizer_with(None))
    tokens = tokenizer_with(None)("how many?")["input_ids"]
    assert loaded[0] == Prompt(tokens, "how many?", {"answer": 3, "source": {"name": "a"}})


def test_overlong_prompts_are_refused_or_dropped():
    texts = ["tom has 14 cards.", "tom has 14 cards and 7 coins.", "how many?"]
    lengths = [len(prompt.tokens) for prompt in load(texts)]
    assert [p.text for p in load(texts, max_prompt_length=max(lengths))] == texts
    kept = load(texts, max_prompt_length=lengths[0], overlong="drop")
    assert [prompt.text for prompt in kept] == [texts[0], texts[2]]
    with pytest.raises(ConfigError) as caught:
        load(texts, max_prompt_length=lengths[0])
    assert str(caught.value).startswith(
        f"train_dataset: row 1 has a prompt of {lengths[1]} tokens, more than max_prompt_length="
        f"{lengths[0]}"
    )
    with pytest.raises(ConfigError, match="max_prompt_length=1: every prompt of train_dataset"):
        load(texts, max_prompt_length=1, overlong="drop")


def test_a_stream_drops_overlong_prompts_as_it_reads_them():
    texts = ["tom has 14 cards.", "tom has 14 cards and 7 coins.", "how many?"]
    stream = Dataset.from_list([{"prompt": t} for t in texts]).to_iterable_dataset()
    limit = len(load(texts)[0].tokens)
    loaded = load_prompts(
        open_dataset("train_dataset", stream), tokenizer_with(None), limit, overlong="drop"
    )
    assert [loaded[n].text for n in range(4)] == [texts[0], texts[2]] * 2


REFUSED = {
    "blank": (" ", "qwen3", "has no text in prompt"),
    "nothing": (None, "qwen3", "has neither text nor messages in prompt"),
    "no messages": ([], "qwen3", "has neither text nor messages in prompt"),
    "no role": ([{"content": "?"}], "qwen3", "has neither text nor messages in prompt"),
    "system last": ([USER, SYSTEM], "qwen3", "ends with a message of role system"),
    "no template": ([USER], None, "is a conversation, but the tokenizer has no chat template"),
    "refused": ([SYSTEM, USER], "gemma", "does not fit the chat template: System role not"),
}


@pytest.mark.parametrize("prompt, template, message", REFUSED.values(), ids=REFUSED.keys())
def test_refusals_name_the_row(prompt, template, message):
    with pytest.raises(ConfigError) as caught:
        load(["how many?", prompt], template)
    assert str(caught.value).startswith(f"train_dataset: row 1 {message}")


@pytest.mark.seed(5)
def test_a_missing_column():
    with pytest.raises(ConfigError, match="train_dataset: has no column prompt; it has question"):
        load([{"question": "how many?"}])
