"""Tools: functions described to the model, and the checks that it can use them."""

import inspect
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import (
    DocstringParsingException,
    TypeHintParsingException,
)

from grpo_mcore.data.prompts import encode_prompt
from grpo_mcore.environments.calls import read_hermes
from grpo_mcore.environments.environment import EnvironmentSpec
from grpo_mcore.environments.template import tokens_between
from grpo_mcore.errors import ConfigError

_PROBE = {"name": "probe_name", "arguments": {"probe_argument": "probe_value"}}
_ANSWER = "probe_answer"


def tool_schemas(
    tools: Sequence[Callable], environment: EnvironmentSpec | None = None
) -> list[dict]:
    """The JSON schemas of the functions, then of the environment's methods that are tools.

    Raises:
        ConfigError: for a tool that is no function, or lacks types or a Google docstring; for two
            of one name.
    """
    found = [tool_schema(f"tools[{place}]", tool) for place, tool in enumerate(tools)]
    if environment:
        found += [
            tool_schema(f"environment={environment.name}", method) for method in environment.methods
        ]
    names = [schema["function"]["name"] for schema in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"tools: {names.count(name)} of the name {name}; give each its own")
    return found


def tool_schema(where: str, tool: Callable) -> dict:
    """The JSON schema of one function, which `where` tells of."""
    if not inspect.isroutine(tool):
        raise ConfigError(f"{where}={tool!r}: a tool is a function")
    try:
        return get_json_schema(tool)
    except (DocstringParsingException, TypeHintParsingException, NameError, ValueError) as error:
        raise ConfigError(
            f"{where}={tool.__name__}: a tool needs a type for each argument, and a Google "
            f"docstring that describes it and each argument ({error})"
        ) from error


def check_tools(
    tools: Sequence[Callable],
    tokenizer: PreTrainedTokenizerBase,
    environment: EnvironmentSpec | None = None,
) -> list[dict]:
    """The schemas of all tools, for `load_prompts(tools=...)`, once it is sure that the model can
    be shown them, call them and be answered.

    Raises:
        ConfigError: see `tool_schemas`; and for a chat template that does not show tools, calls or
            answers, or writes calls in a form that cannot be read.
    """
    schemas = tool_schemas(tools, environment)
    if not schemas:
        return []
    names = [schema["function"]["name"] for schema in schemas]
    where = f"tools={','.join(names)}"
    if not tokenizer.chat_template:
        raise ConfigError(f"{where}: the tokenizer has no chat template to show tools with")
    asked = [{"role": "user", "content": "-"}]
    shown = tokenizer.decode(encode_prompt(tokenizer, asked, schemas))
    hidden = [name for name in names if name not in shown]
    if hidden:
        raise ConfigError(f"{where}: the chat template does not show the model {hidden[0]}")
    calls = [{"type": "function", "function": _PROBE}]
    called = {"role": "assistant", "content": "", "tool_calls": calls}
    answer = {"role": "tool", "name": _PROBE["name"], "content": _ANSWER}
    try:
        calling = encode_prompt(tokenizer, [*asked, called, answer])
        between = tokens_between(tokenizer, tokenizer.eos_token_id, [answer])
    except ConfigError as error:
        raise ConfigError(f"{where}: a conversation with tools {error}") from error
    if _ANSWER not in tokenizer.decode(between):
        raise ConfigError(f"{where}: the chat template does not show the model what a tool answers")
    if getattr(tokenizer, "response_template", None) is None and not _reads_call(
        tokenizer.decode(calling, skip_special_tokens=True)
    ):
        raise ConfigError(
            f"{where}: the chat template does not write calls as "
            '<tool_call>{"name": ..., "arguments": ...}</tool_call>, and the tokenizer has no '
            "response_template that says how to read them"
        )
    return schemas


def _reads_call(text: str) -> bool:
    try:
        return read_hermes(text).get("tool_calls") == [{"type": "function", "function": _PROBE}]
    except ValueError:  # of what stands between the tags
        return False
