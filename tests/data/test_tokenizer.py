"""Prompts and completions as token ids."""

import json
import shutil

import pytest

from examples.demo.tokenizer import EOS, build_tokenizer
from grpo_mcore.data.tokenizer import Tokenizer

TEXT = "tom has 14 cards."


@pytest.fixture
def directory(tiny_models, tmp_path):
    """A model directory that may be changed."""
    for name in ("config.json", "generation_config.json"):
        shutil.copy(tiny_models / "teacher" / name, tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def with_template(directory):
    inner = build_tokenizer()
    inner.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} answer:{% endif %}"
    )
    inner.save_pretrained(directory)
    return Tokenizer(str(directory))


def test_prompt_is_plain_text_without_a_template(directory):
    tokenizer = Tokenizer(str(directory))
    assert tokenizer.encode_prompt(TEXT) == build_tokenizer()(TEXT)["input_ids"]
    assert tokenizer.decode(tokenizer.encode_prompt(TEXT)) == TEXT


def test_prompt_is_a_users_turn_with_a_template(directory):
    tokenizer = with_template(directory)
    assert tokenizer.decode(tokenizer.encode_prompt(TEXT)) == f"user: {TEXT} answer:"
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_prompt_is_a_list_of_plain_numbers(directory):
    for tokenizer in (Tokenizer(str(directory)), with_template(directory)):
        ids = tokenizer.encode_prompt(TEXT)
        assert type(ids) is list and {type(i) for i in ids} == {int}


def test_text_that_looks_like_a_template_is_left_alone(directory):
    tokenizer = with_template(directory)
    text = "{{ 1 + 1 }} {% raw %} {question}"
    assert tokenizer.decode(tokenizer.encode_prompt(text)) == f"user: {text} answer:"


def test_decode_leaves_out_the_end_but_keeps_the_tags(directory):
    tokenizer = Tokenizer(str(directory))
    ids = tokenizer.encode("<solution> 14 </solution>")
    assert tokenizer.decode([*ids, tokenizer.inner.eos_token_id]) == "<solution> 14 </solution>"


def test_truncate(directory):
    tokenizer = Tokenizer(str(directory))
    assert tokenizer.truncate(TEXT, 100) == TEXT
    assert tokenizer.truncate(TEXT, len(tokenizer.encode(TEXT))) == TEXT
    assert tokenizer.truncate(TEXT, 2) == "tom has"
    assert tokenizer.truncate(TEXT, 0) == ""


def test_truncated_text_costs_no_more_even_where_a_character_was_cut_in_two(directory):
    tokenizer = Tokenizer(str(directory))
    text = "tom has ünïts — 数 \ufffd\ufffd"
    for tokens in range(len(tokenizer.encode(text)) + 1):
        assert len(tokenizer.encode(tokenizer.truncate(text, tokens))) <= tokens


def test_stop_ids_join_the_tokenizers_and_the_models(directory):
    end = build_tokenizer().convert_tokens_to_ids(EOS)
    file = directory / "generation_config.json"
    for declared, expected in ((7, [end, 7]), ([end, 9, 7], [end, 7, 9]), (None, [end])):
        file.write_text(json.dumps({"eos_token_id": declared}))
        assert Tokenizer(str(directory)).stop_token_ids() == expected
    file.unlink()
    assert Tokenizer(str(directory)).stop_token_ids() == [end]
