"""Prompts of GRPO, from rows of a dataset."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_mcore.data.chat import Text, Tools, encode, is_conversation, read_text
from grpo_mcore.data.sources import Rows, require_columns
from grpo_mcore.errors import ConfigError


@dataclass(frozen=True)
class Prompt:
    """`text` is what the row had, text or messages; `columns` are its others, for the rewards."""

    tokens: list[int]
    text: Text
    columns: dict[str, Any]


def load_prompts(
    rows: Rows[dict],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int | None = None,
    overlong: str = "error",
    tools: Tools = (),
    chat_template_kwargs: dict[str, Any] | None = None,
    column: str = "prompt",
) -> Rows[Prompt]:
    """A prompt of each row, encoded when it is asked for.

    Args:
        max_prompt_length: the most tokens a prompt may have; None: any number.
        overlong: what becomes of longer ones: "error" refuses the row by number when it is asked
            for, "drop" leaves it out, for which a Table is encoded whole now.
        tools: described to the model by the chat template.
        chat_template_kwargs: further arguments of the chat template; those of a row's own
            `chat_template_kwargs` go before them.

    Raises:
        ConfigError: when there is no such column, or no prompt is short enough; and by the rows
            when one is asked for that holds no prompt.
    """
    require_columns(rows, column)
    read = partial(_read_prompt, tokenizer, tools, chat_template_kwargs or {}, column)
    if max_prompt_length is None:
        return rows.map(read)
    if overlong == "error":
        return rows.map(lambda row: _checked(read(row), max_prompt_length))
    kept = rows.map(read).filter(lambda prompt: len(prompt.tokens) <= max_prompt_length)
    if kept.size == 0:
        raise ConfigError(
            f"max_prompt_length={max_prompt_length}: every prompt of {rows.name} is longer"
        )
    return kept


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, text: Text, tools: Tools = (), **template
) -> list[int]:
    """The tokens a completion of `text` follows.

    A conversation that ends with the user or a tool gets the beginning of the assistant's turn; one
    that ends with the assistant is left open, so that the completion continues that message
    (trl.data_utils.apply_chat_template).

    Args:
        template: further arguments of the chat template.

    Raises:
        ConfigError: for a conversation that ends with another role, or is refused by the template.
    """
    if is_conversation(text):
        role = text[-1]["role"]
        if role not in ("user", "tool", "assistant"):
            raise ConfigError(f"ends with a message of role {role}, which no completion can follow")
        template = template | {
            "tools": list(tools) or None,
            "add_generation_prompt": role != "assistant",
            "continue_final_message": role == "assistant",
        }
    return list(encode(tokenizer, text, **template)["input_ids"])


def _read_prompt(
    tokenizer: PreTrainedTokenizerBase, tools: Tools, template: dict, column: str, row: dict
) -> Prompt:
    text = read_text(row, column)
    if not is_conversation(text) and not text.strip():
        raise ConfigError(f"has no text in {column}")
    template = template | (row.get("chat_template_kwargs") or {})
    tokens = encode_prompt(tokenizer, text, tools, **template)
    return Prompt(tokens, text, {name: row[name] for name in row if name != column})


def _checked(prompt: Prompt, most: int) -> Prompt:
    if len(prompt.tokens) > most:
        raise ConfigError(
            f"has a prompt of {len(prompt.tokens)} tokens, more than max_prompt_length={most}; "
            "shorten it, raise the limit, or drop such rows with overlong=drop"
        )
    return prompt
