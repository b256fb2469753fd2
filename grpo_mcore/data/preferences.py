"""Pairs of a chosen and a rejected completion, as TRL 1.16's DPOTrainer makes them."""

from array import array
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from grpo_mcore.data.chat import (
    Text,
    common_prefix,
    encode,
    end_token,
    ended,
    is_conversation,
    read_text,
    template_arguments,
    warn_of_lost_prompt,
)
from grpo_mcore.data.sources import Rows, require_columns
from grpo_mcore.errors import ConfigError


@dataclass(frozen=True)
class Preference:
    """Tokens (int32) of a prompt and two completions of it."""

    prompt: array
    chosen: array
    rejected: array


def load_preferences(
    rows: Rows[dict], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> Rows[Preference]:
    """Preferences from rows of `chosen` and `rejected`, with a `prompt` or with what both begin
    with as the prompt. A Table is encoded whole now, a Stream as it is read.

    Plain text gets the end token, where it lacks it. Completions are cut so that prompt and
    completion have at most `max_length` tokens (None: any number); rows whose prompt leaves them no
    token are left out.

    Raises:
        ConfigError: when the dataset lacks a column or a row is not what its columns promise, or
            every prompt is too long.
    """
    require_columns(rows, "chosen", "rejected")

    def read(row: dict) -> Preference:
        prompt, *pair = _encode_row(row, tokenizer)
        most = None if max_length is None else max(0, max_length - len(prompt))
        chosen, rejected = (array("i", tokens[:most]) for tokens in pair)
        return Preference(array("i", prompt), chosen, rejected)

    preferences = rows.map(read)
    if max_length is None:
        return preferences
    kept = preferences.filter(lambda preference: len(preference.prompt) < max_length)
    if kept.size == 0:
        raise ConfigError(f"max_length={max_length}: every prompt of {rows.name} is as long")
    return kept


def split_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Prompt, chosen and rejected completion of two texts or conversations that both begin with the
    prompt (trl.data_utils.extract_prompt). A space before where they part is the completions'; of
    what is the same to an end, the last character or message is."""
    length = common_prefix(chosen, rejected)
    if length == min(len(chosen), len(rejected)) or (length and chosen[length - 1] == " "):
        length -= 1
    return chosen[:length], chosen[length:], rejected[length:]


def _encode_row(
    row: dict, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int], list[int]]:
    prompt, chosen, rejected = _read_row(row)
    if not is_conversation(chosen):
        end = end_token(tokenizer)
        chosen, rejected = ended(chosen, end), ended(rejected, end)
    template = template_arguments(row)
    before = encode(tokenizer, prompt, add_generation_prompt=True, **template)["input_ids"]
    with_chosen = encode(tokenizer, prompt + chosen, **template)["input_ids"]
    with_rejected = encode(tokenizer, prompt + rejected, **template)["input_ids"]
    length = min(common_prefix(before, with_chosen), common_prefix(before, with_rejected))
    warn_of_lost_prompt(len(before) - length)
    return before[:length], with_chosen[length:], with_rejected[length:]


def _read_row(row: dict) -> tuple[Text, Text, Text]:
    chosen, rejected = read_text(row, "chosen"), read_text(row, "rejected")
    if is_conversation(chosen) != is_conversation(rejected):
        raise ConfigError("has text in one of chosen and rejected and messages in the other")
    if "prompt" in row:
        prompt = read_text(row, "prompt")
        # Some datasets repeat the question as text beside whole conversations.
        if is_conversation(prompt) == is_conversation(chosen):
            return prompt, chosen, rejected
    if not chosen or not rejected:
        raise ConfigError("has no text in one of chosen and rejected")
    prompt, chosen, rejected = split_prompt(chosen, rejected)
    if is_conversation(chosen) and not prompt:
        raise ConfigError("has no prompt: chosen and rejected have no first message in common")
    return prompt, chosen, rejected
