"""Prompts as token ids, with or without a chat template."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from grpo_mcore.errors import ConfigError, one_line


class Tokenizer:
    """A model directory's tokenizer, as prompts and completions need it."""

    def __init__(self, path: str, inner: PreTrainedTokenizerBase | None = None):
        """With `inner`, that one; the directory still says what ends a completion."""
        self.path = path
        self.inner = _load(path) if inner is None else inner

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of `text` as a user's turn, or as plain text where the model has no template."""
        if self.inner.chat_template:
            turns = [{"role": "user", "content": text}]
            return list(
                self.inner.apply_chat_template(
                    turns, add_generation_prompt=True, tokenize=True, return_dict=False
                )
            )
        return list(self.inner(text)["input_ids"])

    def encode(self, text: str) -> list[int]:
        """The ids of `text` alone, nothing added."""
        return list(self.inner(text, add_special_tokens=False)["input_ids"])

    def encode_completion(self, text: str) -> list[int]:
        """The ids of `text` as all that a model writes: the tokenizer's end token follows, where it
        has one. None for no text."""
        if not text:
            return []
        return self.encode(text) + [i for i in (self.inner.eos_token_id,) if i is not None]

    def decode(self, tokens: list[int]) -> str:
        return self.inner.decode(tokens, skip_special_tokens=True)

    def truncate(self, text: str, tokens: int) -> str:
        """At most the first `tokens` tokens of `text`: text one model wrote may be longer for
        another model's tokenizer."""
        ids = self.encode(text)
        kept = tokens
        while len(self.encode(text)) > tokens:  # half a character decodes to one that costs more
            text = self.decode(ids[:kept])
            kept -= 1
        return text

    def stop_token_ids(self) -> list[int]:
        """Every id that ends a completion: the tokenizer's, and those of generation_config.json."""
        ends = {self.inner.eos_token_id}
        file = Path(self.path) / "generation_config.json"
        if file.exists():
            declared = json.loads(file.read_text()).get("eos_token_id")
            ends |= set(declared if isinstance(declared, list) else [declared])
        return sorted(ends - {None})


def load_tokenizer(key: str, path: str, tokenizer: Any = None) -> Tokenizer:
    """`tokenizer`, or if that is None the one in directory `path`, the value of setting `key`."""
    if tokenizer is not None:
        return Tokenizer(path, tokenizer)
    try:
        return Tokenizer(path, saved_tokenizer(path))
    except ValueError as error:
        raise ConfigError(f"{key}={path}: no tokenizer that loads: {error}") from error


def saved_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the model at a path or hub id.

    Raises:
        ValueError: when there is none; the text says why in one line.
    """
    try:
        tokenizer = (
            _load(source) if Path(source).is_dir() else AutoTokenizer.from_pretrained(source)
        )
    except (OSError, ValueError) as error:
        raise ValueError(one_line(error)) from error
    # Where there are no files, transformers makes one that knows no word.
    if tokenizer("yes")["input_ids"] == tokenizer("no")["input_ids"]:
        raise ValueError("no files of one")
    return tokenizer


def _load(path: str) -> PreTrainedTokenizerBase:
    files = {file.name for file in Path(path).iterdir()}
    if "tokenizer.model" in files and not files & {"tokenizer.json", "tokenizer_config.json"}:
        # SentencePiece's own file says neither that a start token comes first nor that a word at
        # the start counts as one after a space, and transformers would then do neither.
        return LlamaTokenizer.from_pretrained(path, add_bos_token=True)
    return AutoTokenizer.from_pretrained(path)
