"""Text and conversations as token ids, through a tokenizer's chat template, as TRL 1.16 does.

Functions raise ConfigErrors that say what is wrong with a row; `Table.map` puts before it which."""

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from grpo_mcore.errors import ConfigError

Text = str | list[dict]
"""Plain text, or a conversation: messages of a role and a content."""
Tools = Sequence[Callable | dict]
"""Functions with types and a Google docstring, or their JSON schemas."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def is_conversation(text: Text) -> bool:
    return isinstance(text, list)


def read_text(row: Mapping, column: str) -> Text:
    """The text or conversation in `column`.

    Raises:
        ConfigError: when it is neither.
    """
    text = row.get(column)
    if isinstance(text, str):
        return text
    if text and isinstance(text, list) and all(_is_message(item) for item in text):
        return text
    raise ConfigError(f"has neither text nor messages in {column}")


def encode(tokenizer: PreTrainedTokenizerBase, text: Text, **template) -> Mapping:
    """What the tokenizer makes of `text`, "input_ids" among it: of plain text with its special
    tokens, of a conversation through the chat template.

    Args:
        template: arguments of the chat template.

    Raises:
        ConfigError: when there is no chat template, or it refuses the conversation.
    """
    if not is_conversation(text):
        return tokenizer(text=text)
    if not tokenizer.chat_template:
        raise ConfigError("is a conversation, but the tokenizer has no chat template")
    try:
        return tokenizer.apply_chat_template(text, tokenize=True, return_dict=True, **template)
    except (TemplateError, TypeError, ValueError) as error:  # raised by what the row has, all three
        raise ConfigError(f"does not fit the chat template: {error}") from error


def template_arguments(row: Mapping) -> dict:
    """The chat template's arguments that a row brings along: its `tools` (a list, or JSON) and its
    `chat_template_kwargs`."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    # Some templates describe how to call tools where there is an empty list of them.
    return {"tools": tools or None, **(row.get("chat_template_kwargs") or {})}


def marks_assistant(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template says what of a conversation the assistant wrote."""
    return bool(tokenizer.chat_template and _GENERATION.search(tokenizer.get_chat_template()))


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def warn_of_lost_prompt(lost: int) -> None:
    """Says, once, that the last `lost` tokens of prompts are not what completions follow."""
    if lost:
        warnings.warn(
            "prompts end in tokens that are others once the completion follows: the chat template "
            "renders them otherwise, or tokens merge. The completion is taken to start where they "
            "differ, so the model is trained on a context it will not meet when it generates",
            stacklevel=2,
        )


def ended(text: str, end: str) -> str:
    """`text` with `end` after it, unless it is there."""
    return text if text.endswith(end) else text + end


def end_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the token that ends a completion.

    Raises:
        ConfigError: when the tokenizer has none.
    """
    if tokenizer.eos_token is None:
        raise ConfigError("has text, but the tokenizer has no eos_token to end it with")
    return tokenizer.eos_token


def _is_message(item: object) -> bool:
    return isinstance(item, Mapping) and "role" in item
