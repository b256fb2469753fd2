"""Conversations with tools: token for token those of the chat template, or of TRL's tool loop."""

import asyncio
from functools import partial
from types import SimpleNamespace

import pytest
from trl.chat_template_utils import parse_response, qwen3_template
from trl.trainer.grpo_trainer import GRPOTrainer

from grpo_mcore.data.prompts import encode_prompt
from grpo_mcore.environments import check_tools, conversation_metrics
from grpo_mcore.environments.template import tokens_between
from grpo_mcore.environments.tools import tool_schemas
from grpo_mcore.errors import ConfigError
from grpo_mcore.event_loop import event_loop
from grpo_mcore.rollout.requests import Request, request_seed
from tests.environments.scripted import END, SEED, call, chat_tokenizer, converse

USER = {"role": "user", "content": "tom has 14 cards. how many?"}
OTHER = {"role": "user", "content": "how many?"}
TOKENIZER = chat_tokenizer()


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: one.
        b: the other.
    """
    return a + b


async def count_cards(name: str) -> str:
    """Counts somebody's cards.

    Args:
        name: whose.
    """
    await asyncio.sleep(0)
    return f"{name} has 14"


def fails() -> str:
    """Fails."""
    raise ValueError("no cards")


TOOLS = [add, count_cards, fails]


def rendered(tokenizer, messages, **template) -> list[int]:
    """The whole conversation, without what the template has after the last turn's end."""
    schemas = check_tools(TOOLS, tokenizer)
    text = tokenizer.apply_chat_template(messages, tools=schemas, tokenize=False, **template)
    return tokenizer(text=text.removesuffix("\n"))["input_ids"]


@pytest.mark.parametrize("response_template", [None, qwen3_template], ids=["hermes", "template"])
def test_a_conversation_is_what_the_chat_template_makes_of_its_messages(response_template):
    tokenizer = chat_tokenizer()
    tokenizer.response_template = response_template
    texts = [
        call("add", '{"a": 1, "b": 2}'),
        call("count_cards", '{"name": "tom"}') + "\n" + call("add", '{"a": 3, "b": 4}'),
        "14",
    ]
    [found], engine = converse(tokenizer, [[USER]], [texts], tools=TOOLS)
    assert found.prompt.tokens + found.tokens == rendered(tokenizer, [USER, *found.messages])
    assert [message["role"] for message in found.messages] == [
        *("assistant", "tool", "assistant", "tool", "tool", "assistant")
    ]
    answers = [message["content"] for message in found.messages if message["role"] == "tool"]
    assert answers == ["3", "tom has 14", "7"]
    assert (found.finished, found.turns, found.tool_calls, found.tool_failures) == (True, 3, 3, 0)
    assert found.reward is None

    written = [tokenizer(text=text + END)["input_ids"] for text in texts]
    own = [token for token, mask in zip(found.tokens, found.mask, strict=True) if mask]
    assert own == [token for turn in written for token in turn]
    places = [-float(i) for turn in written for i in range(1, len(turn) + 1)]
    assert [p for p, mask in zip(found.log_probs, found.mask, strict=True) if mask] == places
    assert {p for p, m in zip(found.log_probs, found.mask, strict=True) if not m} == {0.0}

    context = found.prompt.tokens
    for turn, [request] in enumerate(engine.batches):
        spent = len(request.prompt) - len(context)
        seed = request_seed(SEED, turn)
        assert request == Request(request.prompt, 1000 - spent, seed, temperature=0.7, top_k=5)
        assert request.prompt == context + found.tokens[:spent]


def test_a_sampled_turn_is_never_tokenised_anew():
    """The call is spelled in single bytes and other blanks than the template's."""
    text = '<tool_call> {"arguments":{"a":1,"b":2},"name":"add"}</tool_call>'
    spelled = [t for letter in text for t in TOKENIZER(text=letter)["input_ids"]]
    marks = TOKENIZER(text="<tool_call>" + "</tool_call>" + END)["input_ids"]
    spelled = [marks[0], *spelled[len("<tool_call>") : -len("</tool_call>")], *marks[1:]]

    [found], _ = converse(TOKENIZER, [[USER]], [[spelled, "14"]], tools=TOOLS)
    assert found.tokens[: len(spelled)] == spelled
    between = f"\n<|im_start|>user\n<tool_response>\n3\n</tool_response>{END}\n"
    between += f"<|im_start|>assistant\n14{END}"
    assert TOKENIZER.decode(found.tokens[len(spelled) :]) == between


@pytest.mark.parametrize("thinking", [True, False])
def test_a_template_that_renders_the_last_turn_otherwise(thinking):
    """Qwen3 puts an empty thought into the last turn of the assistant only."""
    tokenizer = chat_tokenizer("qwen3")
    kwargs = {"enable_thinking": thinking}
    own = {"chat_template_kwargs": {"enable_thinking": False}}
    asks = call("add", '{"a": 1, "b": 2}')
    [found], _ = converse(
        tokenizer, [[USER]], [[asks, "14"]], tools=TOOLS, chat_template_kwargs=kwargs
    )
    closed = "<think>\n\n</think>\n\n" * (not thinking)
    between = f"\n<|im_start|>user\n<tool_response>\n3\n</tool_response>{END}\n"
    between += f"<|im_start|>assistant\n{closed}"
    assert tokenizer.decode(found.tokens) == f"{asks}{END}{between}14{END}"
    [rows], _ = converse(
        tokenizer, [[USER]], [[asks, "14"]], tools=TOOLS, columns=own, chat_template_kwargs=kwargs
    )
    assert tokenizer.decode(rows.tokens).count("</think>") == 1


ERRORS = {
    "unknown": (call("divide", "{}"), "Tool divide not found."),
    "raises": (call("fails", "{}"), "no cards"),
    "arguments": (call("add", '{"a": 1}'), "missing 1 required positional argument: 'b'"),
    "no json": ("<tool_call>\n{add}\n</tool_call>", "The tool call cannot be read"),
    "not closed": ('<tool_call>\n{"name": "add"}', "<tool_call> without </tool_call>"),
    "no name": ('<tool_call>{"a": 1}</tool_call>', "a tool call needs a name"),
    "no object": (call("add", "[1, 2]"), "the arguments of a tool call must be an object"),
    "half a character": (call("add", r'{"a": "\ud800"}'), "surrogates not allowed"),
    "too deep": (f"<tool_call>{'[' * 3000}</tool_call>", "recursion"),
    "one of two": (call("add", '{"a": 1, "b": 2}') + call("add", "{1}"), "cannot be read"),
}


@pytest.mark.parametrize("text, message", ERRORS.values(), ids=ERRORS.keys())
def test_errors_are_told_to_the_model(text, message):
    [found], _ = converse(
        TOKENIZER, [[USER]], [[text, "14"]], tools=TOOLS, max_completion_length=10_000
    )
    _, answer, last = found.messages
    assert answer["role"] == "tool" and answer["content"].startswith("{'error': ")
    assert message in answer["content"] and answer["content"] in TOKENIZER.decode(found.tokens)
    assert last == {"role": "assistant", "content": "14"}
    assert (found.finished, found.tool_calls, found.tool_failures) == (True, 1, 1)


def test_a_call_without_arguments():
    [found], _ = converse(
        TOKENIZER, [[USER]], [['<tool_call>{"name": "fails"}</tool_call>', "14"]], tools=TOOLS
    )
    assert "no cards" in found.messages[1]["content"]


def test_only_unfinished_conversations_generate_on_together():
    asks = call("add", '{"a": 1, "b": 2}')
    scripts = [["14"], [asks, asks, "14"], [asks, "14"], ["14"]]
    times = []

    def once(function):
        times.append(function)
        return function()

    found, engine = converse(TOKENIZER, [[USER], [OTHER]] * 2, scripts, tools=TOOLS, once=once)
    assert [len(batch) for batch in engine.batches] == [4, 2, 1]
    assert [conversation.turns for conversation in found] == [1, 3, 2, 1]
    assert len(times) == 2
    assert conversation_metrics(found) == {
        "tools/call_frequency": 3 / 4, "tools/failure_frequency": 0.0, "turns/mean": 7 / 4,
    }  # fmt: skip
    # A conversation is the same whatever is sampled beside it.
    assert converse(TOKENIZER, [[USER]], [scripts[0]], tools=TOOLS)[0] == found[:1]
    failing, _ = converse(TOKENIZER, [[USER]], [[call("no", "{}"), "14"]], tools=TOOLS)
    assert conversation_metrics(failing + found)["tools/failure_frequency"] == 1 / 4
    assert conversation_metrics(found[:1])["tools/failure_frequency"] == 0.0


def test_without_tools_nothing_is_called():
    asks = call("add", '{"a": 1, "b": 2}')
    for template in (None, qwen3_template):
        tokenizer = chat_tokenizer()
        tokenizer.response_template = template
        [found], _ = converse(tokenizer, [[USER]], [[asks]], once=None)
        assert (found.finished, found.turns, found.tool_calls) == (True, 1, 0)
    assert found.messages[0]["role"] == "assistant"
    [plain], _ = converse(TOKENIZER, ["how many?"], [["14"]], once=None)
    assert (plain.messages, plain.reward, plain.finished) == ("14", None, True)


def test_async_tools_run_at_once_and_answer_in_the_order_of_the_calls():
    quick_called = asyncio.Event()

    async def slow() -> str:
        """Waits for the other."""
        await asyncio.wait_for(quick_called.wait(), 20)
        return "14"

    async def quick() -> str:
        """Frees the other."""
        quick_called.set()
        return "7"

    [found], _ = converse(
        TOKENIZER, [[USER]], [[call("slow", "{}") + call("quick", "{}"), "1"]], tools=[slow, quick]
    )
    assert [message["content"] for message in found.messages[1:3]] == ["14", "7"]


def test_the_last_turn_calls_no_tools():
    asks = call("add", '{"a": 1, "b": 2}')
    found, _ = converse(
        TOKENIZER, [[USER]] * 2, [[asks, asks], [asks, "14"]], tools=TOOLS, max_turns=2
    )
    assert [(c.turns, c.tool_calls, c.finished) for c in found] == [(2, 1, False), (2, 1, True)]
    assert found[0].messages[-1]["tool_calls"][0]["function"]["name"] == "add"


def test_the_limit_of_length_holds_for_all_turns():
    asks = call("add", '{"a": 1, "b": 2}')
    [whole], _ = converse(TOKENIZER, [[USER]], [[asks, "14"]], tools=TOOLS)
    first = whole.mask.index(0)
    second = first + whole.mask[first:].index(1)

    def limited(most: int):
        script = [asks] + ["14"] * (most > second)
        [found], _ = converse(
            TOKENIZER, [[USER]], [script], tools=TOOLS, max_completion_length=most
        )
        assert found.tokens == whole.tokens[: len(found.tokens)]
        assert len(found.mask) == len(found.log_probs) == len(found.tokens) <= most
        return len(found.tokens), found.finished, len(found.messages), found.tool_calls

    assert limited(len(whole.tokens)) == (len(whole.tokens), True, 3, 1)
    # The last turn is cut.
    assert limited(second + 1) == (second + 1, False, 3, 1)
    # What the tool says leaves no room for a turn: it is left out.
    assert limited(second) == (first, False, 1, 1)
    assert limited(first) == (first, False, 1, 1)
    # A call that is cut off calls nothing.
    assert limited(first - 1) == (first - 1, False, 1, 0)


def test_turns_may_end_in_another_token_than_the_templates():
    """Qwen's models also stop at <|endoftext|>; Gemma's turns do not end in its eos_token."""
    answer = [{"role": "tool", "name": "add", "content": "3"}]
    end, other = TOKENIZER.convert_tokens_to_ids([END, "<eos>"])
    expected = tokens_between(TOKENIZER, end, answer)
    assert TOKENIZER.decode(expected).startswith("\n<|im_start|>user\n<tool_response>\n3")
    assert tokens_between(TOKENIZER, other, answer) == expected
    gemma = chat_tokenizer()
    gemma.eos_token = "<eos>"
    assert tokens_between(gemma, end, answer) == expected


def trl_loop(prompts, scripts, max_completion_length):
    """What GRPOTrainer._tool_call_loop makes of the scripts."""
    tokenizer = chat_tokenizer()
    tokenizer.response_template = qwen3_template
    ids = [encode_prompt(tokenizer, prompt, tool_schemas(TOOLS)) for prompt in prompts]
    turns = [[tokenizer(text=text + END)["input_ids"] for text in script] for script in scripts]

    def generate(contexts, *_, **__):
        places = [next(i for i, p in enumerate(ids) if c[: len(p)] == p) for c in contexts]
        said = [turns[place].pop(0) for place in places]
        return said, [[-float(i + 1) for i in range(len(tokens))] for tokens in said]

    trainer = SimpleNamespace(
        processing_class=tokenizer, _tokenizer=tokenizer, _is_vlm=False, chat_template=None,
        chat_template_kwargs={}, environment_factories=None, tools=TOOLS, use_vllm=False,
        model=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=10**6)),
        max_completion_length=max_completion_length, max_tool_calling_iterations=10**6,
        async_loop=event_loop(), _generate_single_turn=generate,
        _sync_tool_dicts=[{"add": add, "fails": fails}] * len(prompts),
        _async_tool_dicts=[{"count_cards": count_cards}] * len(prompts),
    )  # fmt: skip
    trainer._get_tool_suffix_ids = partial(GRPOTrainer._get_tool_suffix_ids, trainer)
    tokens, log_probs = generate(ids)
    messages = [
        [parse_response(tokenizer, turn, prefix=prompt, tools=TOOLS)]
        for turn, prompt in zip(tokens, ids, strict=True)
    ]
    masks, messages, tokens, log_probs, calls, failures, _ = GRPOTrainer._tool_call_loop(
        trainer, [list(p) for p in prompts], ids, tokens, messages, log_probs, None, {}
    )
    return list(zip(masks, messages, tokens, log_probs, strict=True)), calls, failures


@pytest.mark.parametrize("most", [1000, 260, 150, 90])
def test_trls_tool_loop_gives_the_same(most):
    tokenizer = chat_tokenizer()
    tokenizer.response_template = qwen3_template
    prompts = [[{"role": "user", "content": f"how many? {i}"}] for i in range(4)]
    asks = call("add", '{"a": 1, "b": 2}')
    scripts = [
        ["14"],
        [asks, call("count_cards", '{"name": "tom"}'), "<think>7</think> 14"],
        ["2 " + call("divide", "{}") + "\n" + call("fails", "{}"), asks, "14"],
        [call("add", '{"a": 1}'), "14"],
    ]
    theirs, calls, failures = trl_loop(prompts, scripts, most)
    found, _ = converse(
        tokenizer, prompts, scripts, tools=TOOLS, max_completion_length=most, all_said=most == 1000
    )
    assert [(c.mask, c.messages, c.tokens, c.log_probs) for c in found] == theirs
    assert sum(c.tool_calls for c in found) == calls
    assert sum(c.tool_failures for c in found) == failures
    assert any(not c.finished for c in found) == (most < 1000)


def untyped(a) -> str:
    """Has no types.

    Args:
        a: something.
    """


def undescribed(a: int) -> str:
    return ""


def undescribed_argument(a: int) -> str:
    """Does not describe a."""


def another_add(a: int) -> str:
    """Adds.

    Args:
        a: a number.
    """


another_add.__name__ = "add"

BAD_TOOLS = {
    "types": ([untyped], r"tools\[0\]=untyped: a tool needs a type .* missing a type hint"),
    "docstring": ([add, undescribed], r"tools\[1\]=undescribed: a tool needs .* no docstring"),
    "argument": ([undescribed_argument], "no description for the argument 'a'"),
    "no function": (["add"], r"tools\[0\]='add': a tool is a function"),
    "same name": ([add, another_add], "tools: 2 of the name add; give each its own"),
}


@pytest.mark.parametrize("tools, message", BAD_TOOLS.values(), ids=BAD_TOOLS.keys())
def test_bad_tools_are_refused(tools, message):
    with pytest.raises(ConfigError, match=message):
        check_tools(tools, TOKENIZER)


BAD_TEMPLATES = {
    "none": (None, "", "", "the tokenizer has no chat template"),
    "no tools": ("gemma", "", "", "the chat template does not show the model add"),
    "no answers": (
        "qwen2_5", "{{- message.content }}\n        {{- '\\n</tool", "{{- '\\n</tool",
        "the chat template does not show the model what a tool answers",
    ),
    "roles": (
        "qwen2_5", "{{- '\\n<tool_response>\\n' }}", "{{ raise_exception('tool?') }}",
        "a conversation with tools does not fit the chat template: tool[?]",
    ),
    "no end": ("qwen3", END, ".", "a conversation with tools cannot be continued"),
    "other calls": ("llama3_1", "", "", "the chat template does not write calls as <tool_call>"),
}  # fmt: skip
"""A template, what of it is replaced by what, and what is said of it."""


@pytest.mark.parametrize(
    "template, old, new, message", BAD_TEMPLATES.values(), ids=BAD_TEMPLATES.keys()
)
def test_templates_that_cannot_do_tools_are_refused(template, old, new, message):
    tokenizer = chat_tokenizer(template)
    if old:
        assert old in tokenizer.chat_template
        tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    with pytest.raises(ConfigError, match=f"tools=add: {message}"):
        check_tools([add], tokenizer)


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_training"])
def test_templates_that_can_do_tools(template):
    schemas = check_tools(TOOLS, chat_tokenizer(template))
    assert [schema["function"]["name"] for schema in schemas] == ["add", "count_cards", "fails"]


def test_no_tools_need_no_template():
    assert check_tools([], chat_tokenizer(None)) == []


def test_a_prompt_of_plain_text_cannot_have_tools():
    with pytest.raises(ConfigError, match="tools: a prompt is plain text"):
        converse(TOKENIZER, [[USER], "how many?"], [["14"], ["14"]], tools=TOOLS)
