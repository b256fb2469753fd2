"""Prompts and completions as token ids."""

import json
import shutil

import pytest

from examples.demo.tokenizer import EOS, build_tokenizer
from grpo_mcore.data.tokenizer import Tokenizer
from tests.data.sentencepiece_model import END, START, train_tokenizer

TEXT = "tom has 14 cards."
TEXTS = [
    TEXT,
    "two  spaces,   three",
    "at the end  ",
    "a tab\tand a\nnew line",
    "unknown: 数学 ü ½ 🙂 <solution> 7 </solution>",
    "",
]


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


@pytest.fixture(params=["tokenizer.model alone", "with tokenizer_config.json"])
def sentencepiece_directory(request, tmp_path):
    """A directory as Llama 2 and Mistral have it, and what sentencepiece makes of its model."""
    if "with" in request.param:
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 330}))
    return tmp_path, train_tokenizer(tmp_path)


def test_sentencepiece_ids_are_sentencepieces_own(sentencepiece_directory):
    directory, theirs = sentencepiece_directory
    tokenizer = Tokenizer(str(directory))
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs.encode(text)
        assert tokenizer.encode_prompt(text) == [START, *theirs.encode(text)]


def test_sentencepiece_text_comes_back_also_where_it_is_unknown(sentencepiece_directory):
    directory, theirs = sentencepiece_directory
    tokenizer = Tokenizer(str(directory))
    for text in TEXTS:
        ids = tokenizer.encode_prompt(text)
        assert tokenizer.decode([*ids, END]) == text
    assert len(theirs.encode("数")) > 3  # bytes, as the character is not in the vocabulary


def test_sentencepiece_stop_ids(sentencepiece_directory):
    directory, _ = sentencepiece_directory
    assert Tokenizer(str(directory)).stop_token_ids() == [END]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, 7]}))
    assert Tokenizer(str(directory)).stop_token_ids() == [END, 7]


def test_sentencepiece_with_a_template_starts_once(sentencepiece_directory):
    directory, _ = sentencepiece_directory
    template = "{{ bos_token }}{% for m in messages %}[user] {{ m.content }}{% endfor %}"
    (directory / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer(str(directory))
    ids = tokenizer.encode_prompt(TEXT)
    assert ids[0] == START and START not in ids[1:]
    assert tokenizer.decode(ids) == f"[user] {TEXT}"


def test_sentencepiece_text_is_truncated_between_bytes(sentencepiece_directory):
    directory, _ = sentencepiece_directory
    tokenizer = Tokenizer(str(directory))
    text = "tom 数 ü"
    for tokens in range(len(tokenizer.encode(text)) + 1):
        assert len(tokenizer.encode(tokenizer.truncate(text, tokens))) <= tokens
    assert tokenizer.truncate(text, 100) == text
