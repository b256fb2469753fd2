"""Token sequences and their targets for supervised fine-tuning, as TRL 1.16's SFTTrainer makes
them."""

from array import array
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from grpo_mcore.data.chat import (
    common_prefix,
    encode,
    end_token,
    ended,
    is_conversation,
    marks_assistant,
    read_text,
    template_arguments,
    warn_of_lost_prompt,
)
from grpo_mcore.data.packing import pack
from grpo_mcore.data.sources import Rows, require_columns
from grpo_mcore.errors import ConfigError

PACKING_WINDOW = 1000
"""Rows that are packed among themselves; TRL packs through datasets' `map`, whose batch it is."""


@dataclass(frozen=True)
class Example:
    """A row of tokens to train on.

    Attributes:
        tokens: int32, a tenth of the memory of a list.
        targets: of each token, 1 where its prediction counts in the loss. A document's first token
            is no target.
        documents: lengths of the documents packed in it; of an unpacked one, its own length.
    """

    tokens: array
    targets: bytes
    documents: tuple[int, ...]


def load_examples(
    rows: Rows[dict],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    packing: bool = False,
    text_column: str = "text",
) -> Rows[Example]:
    """Examples from rows of `prompt` and `completion`, of `messages`, or of `text`: the first of
    these the dataset has. A Table is encoded whole now, a Stream as it is read.

    Plain text gets the end token, where it lacks it. What exceeds `max_length` is cut off at the
    end, and rows left without a target are left out.

    Args:
        max_length: the most tokens of an example; None: any number.
        completion_only_loss: no loss on prompts; None: where there are prompts and completions.
        assistant_only_loss: loss only on what the chat template marks as the assistant's.
        packing: join rows to examples of up to `max_length`, by best-fit decreasing over
            PACKING_WINDOW rows at a time.

    Raises:
        ConfigError: when dataset, tokenizer and settings do not go together, or a row is not what
            its column promises.
    """
    has_completions = {"prompt", "completion"} <= set(rows.columns)
    column = "messages" if "messages" in rows.columns else text_column
    if not has_completions:
        require_columns(rows, column)
    if completion_only_loss is None:
        completion_only_loss = has_completions
    elif completion_only_loss and not has_completions:
        raise ConfigError(
            f"completion_only_loss=True: {rows.name} has no columns prompt and completion; it has "
            f"{', '.join(rows.columns)}"
        )
    if assistant_only_loss and not marks_assistant(tokenizer):
        raise ConfigError(
            "assistant_only_loss=True: the chat template has no {% generation %} around what the "
            "assistant writes, by which it would be known"
        )
    if packing and max_length is None:
        raise ConfigError("packing=True: needs max_length, the length to fill")

    def read(row: dict) -> Example:
        tokens, prompt_length, assistant = _encode_row(
            row, tokenizer, None if has_completions else column, assistant_only_loss
        )
        targets = [1] * len(tokens)
        if completion_only_loss:
            targets[:prompt_length] = [0] * prompt_length
        if assistant_only_loss:
            targets = [t & a for t, a in zip(targets, assistant, strict=True)]
        targets[0] = 0  # nothing comes before it
        tokens, targets = tokens[:max_length], targets[:max_length]
        return Example(array("i", tokens), bytes(targets), (len(tokens),))

    examples = rows.map(read)
    if packing:
        return examples.regroup(partial(_join_by_length, max_length), PACKING_WINDOW)
    kept = examples.filter(lambda example: any(example.targets))
    if kept.size == 0:
        raise ConfigError(f"max_length={max_length}: leaves no row of {rows.name} a target")
    return kept


def _encode_row(
    row: dict, tokenizer: PreTrainedTokenizerBase, column: str | None, assistant: bool
) -> tuple[list[int], int, list[int]]:
    """Tokens of what is in `column` (None: of prompt and completion), how many of them are the
    prompt's, and, if asked for, 1 for each that the assistant wrote."""
    template = template_arguments(row)
    prompt_tokens = []
    if column is None:
        prompt, text = read_text(row, "prompt"), read_text(row, "completion")
        if is_conversation(prompt) != is_conversation(text):
            raise ConfigError("has text in one of prompt and completion and messages in the other")
        prompt_tokens = encode(tokenizer, prompt, add_generation_prompt=True, **template)[
            "input_ids"
        ]
    else:
        prompt, text = None, read_text(row, column)
    if not is_conversation(text):
        if assistant:
            raise ConfigError("is no conversation, as assistant_only_loss=True needs")
        text = ended(text, end_token(tokenizer))
    whole = text if prompt is None else prompt + text
    encoded = encode(tokenizer, whole, return_assistant_tokens_mask=assistant, **template)
    tokens, marks = encoded["input_ids"], encoded.get("assistant_masks", [])
    if assistant and not any(marks):
        raise ConfigError("has nothing that the chat template marks as the assistant's")
    prompt_length = common_prefix(prompt_tokens, tokens)
    warn_of_lost_prompt(len(prompt_tokens) - prompt_length)
    return tokens, prompt_length, marks


def _join_by_length(max_length: int, examples: list[Example]) -> list[Example]:
    filled = [e for e in examples if len(e.tokens)]
    return [
        Example(
            sum((filled[number].tokens for number in numbers), array("i")),
            b"".join(filled[number].targets for number in numbers),
            tuple(len(filled[number].tokens) for number in numbers),
        )
        for numbers in pack([len(e.tokens) for e in filled], max_length)
    ]
