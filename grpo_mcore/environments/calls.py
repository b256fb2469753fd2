"""The tool calls that the model writes."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_BLOCK = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict


@dataclass(frozen=True)
class Turn:
    """What the model wrote in one turn.

    Attributes:
        text: all of it, special tokens left out.
        message: the assistant's, with its `tool_calls` where there are any.
        error: why its calls cannot be read; then the message's content is all of the text.
    """

    text: str
    message: dict
    calls: list[Call] = field(default_factory=list)
    error: str | None = None

    @property
    def calls_tools(self) -> bool:
        return bool(self.calls or self.error)


def read_turn(
    tokenizer: PreTrainedTokenizerBase,
    context: Sequence[int],
    tokens: Sequence[int],
    tools: Sequence[dict],
) -> Turn:
    """Reads a turn by the tokenizer's `response_template` where it has one, otherwise calls of the
    form of Hermes and Qwen, where there are tools:
    <tool_call>{"name": "...", "arguments": {...}}</tool_call>.

    Args:
        context: the tokens that the turn follows.
        tools: JSON schemas.
    """
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    plain = {"role": "assistant", "content": text}
    templated = getattr(tokenizer, "response_template", None) is not None
    if not templated and not tools:
        return Turn(text, plain)
    try:
        if templated:
            message = _parse_response(tokenizer, context, tokens, tools)
        else:
            message = read_hermes(text)
        calls = [_checked(call.get("function", call)) for call in message.get("tool_calls") or []]
    except (ValueError, TypeError, RecursionError) as error:  # the model's mistake, it is told
        return Turn(text, plain, error=str(error) if tools else None)
    return Turn(text, message, calls if tools else [])


def read_hermes(text: str) -> dict:
    """The assistant's message.

    Raises:
        ValueError: when a call is not closed or is not JSON.
    """
    rest = _BLOCK.sub("", text)
    if OPEN in rest:
        raise ValueError(f"{OPEN} without {CLOSE}")
    calls = [{"type": "function", "function": json.loads(b)} for b in _BLOCK.findall(text)]
    if not calls:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": rest.strip(), "tool_calls": calls}


def _parse_response(tokenizer, context, tokens, tools) -> dict:
    message = tokenizer.parse_response(list(tokens), prefix=list(context), tools=tools or None)
    content = message.get("content") or ""
    # The end of the turn stays in the content where the template does not name it.
    return message | {"content": content.removesuffix(tokenizer.decode(tokens[-1:]))}


def _checked(function: object) -> Call:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call needs a name")
    if function.get("arguments") is None:
        function["arguments"] = {}
    if not isinstance(function["arguments"], dict):
        raise ValueError("the arguments of a tool call must be an object")
    json.dumps(function, ensure_ascii=False).encode()  # half characters fail here, not in a tool
    return Call(function["name"], function["arguments"])
