"""Conversations with environments of both kinds, and what is refused as one."""

import asyncio
import pickle
import threading

import pytest

from grpo_mcore.environments import EnvironmentFailure, StepResult, check_environment, check_tools
from grpo_mcore.errors import ConfigError
from tests.environments.scripted import END, call, chat_tokenizer, converse

USER = {"role": "user", "content": "tom has 14 cards. "}
TOKENIZER = chat_tokenizer()


class Guess:
    """Says whether a number is too high, until it is right."""

    def reset(self, prompt, answer):
        self.answer, self.tries = answer, 0
        return "how many?"

    def step(self, response: str):
        self.tries += 1
        right = int(response) == self.answer
        return StepResult("no. how many?", 1.0 if right else -0.25, right)


def test_the_environment_answers_until_it_is_done():
    found, engine = converse(
        TOKENIZER, [[USER]] * 2, [["7", "9", "14"], ["14"]], environment=Guess,
        columns={"answer": 14, "source": "a"},
    )  # fmt: skip
    asked = {"role": "user", "content": "tom has 14 cards. how many?"}
    assert [c.prompt.text for c in found] == [[asked]] * 2
    assert [c.reward for c in found] == [0.5, 1.0]
    assert [(c.finished, c.turns, c.tool_calls) for c in found] == [(True, 3, 0), (True, 1, 0)]
    told = {"role": "user", "content": "no. how many?"}
    said = [{"role": "assistant", "content": text} for text in ("7", "9", "14")]
    assert found[0].messages == [said[0], told, said[1], told, said[2]]
    assert [len(batch) for batch in engine.batches] == [2, 1, 1]
    for conversation in found:
        text = TOKENIZER.apply_chat_template([asked, *conversation.messages], tokenize=False)
        assert TOKENIZER.decode(conversation.prompt.tokens + conversation.tokens) + "\n" == text
    assert engine.batches[0][0].prompt == found[0].prompt.tokens


def test_plain_text_goes_on_as_text():
    [found], _ = converse(
        TOKENIZER, ["tom has 14 cards. "], [["7", "14"]], environment=Guess, columns={"answer": 14}
    )
    assert found.prompt.text == "tom has 14 cards. how many?"
    assert found.prompt.tokens == TOKENIZER("tom has 14 cards. how many?")["input_ids"]
    assert TOKENIZER.decode(found.tokens) == f"7{END}no. how many?14{END}"
    assert found.messages == "7no. how many?14"
    observed = TOKENIZER("no. how many?")["input_ids"]
    assert found.mask == [1, 1, *[0] * len(observed), 1, 1, 1]
    assert found.log_probs == [-1.0, -2.0, *[0.0] * len(observed), -1.0, -2.0, -3.0]


def test_limits_of_turns_and_length():
    settings = {"environment": Guess, "columns": {"answer": 14}}
    [whole], _ = converse(TOKENIZER, [[USER]], [["7", "9", "14"]], **settings)
    [found], _ = converse(TOKENIZER, [[USER]], [["7", "9"]], max_turns=2, **settings)
    # The last turn is judged too.
    assert (found.reward, found.finished, found.turns) == (-0.5, False, 2)
    assert found.messages == whole.messages[:3]
    [found], _ = converse(TOKENIZER, [[USER]], [["7", "14"]], max_turns=2, **settings)
    assert (found.reward, found.finished) == (0.75, True)

    first = whole.mask.index(0)
    [found], _ = converse(TOKENIZER, [[USER]], [["7"]], max_completion_length=first + 1, **settings)
    assert (found.reward, found.finished, found.tokens) == (-0.25, False, whole.tokens[:first])
    [found], _ = converse(TOKENIZER, [[USER]], [["7"]], max_completion_length=1, **settings)
    assert (found.reward, found.finished, len(found.tokens)) == (-0.25, False, 1)


def test_messages_as_observations():
    class Talk:
        def reset(self, **columns):
            return [
                {"role": "assistant", "content": "14"},
                {"role": "user", "content": "how many?"},
            ]

        async def step(self, response):
            await asyncio.sleep(0)
            return ([{"role": "tool", "name": "cards", "content": response}], 1, response == "2")

    [found], _ = converse(TOKENIZER, [[USER]], [["1", "2"]], environment=Talk)
    assert [message["role"] for message in found.prompt.text] == ["user", "assistant", "user"]
    assert [message["role"] for message in found.messages] == ["assistant", "tool", "assistant"]
    text = TOKENIZER.apply_chat_template([*found.prompt.text, *found.messages], tokenize=False)
    assert TOKENIZER.decode(found.prompt.tokens + found.tokens) + "\n" == text
    assert found.reward == 2.0


def test_text_is_added_to_a_content_of_parts():
    parts = [{"role": "user", "content": [{"type": "text", "text": "tom has 14 cards. "}]}]
    tokenizer = chat_tokenizer("qwen2_5_vl")
    [found], _ = converse(tokenizer, [parts], [["14"]], environment=Guess, columns={"answer": 14})
    assert found.prompt.text[0]["content"][1] == {"type": "text", "text": "how many?"}
    assert "tom has 14 cards. how many?" in tokenizer.decode(found.prompt.tokens)


def scaled(factor):
    class Scaled(Guess):
        def step(self, response):
            return super().step(response)._replace(reward=factor)

    return Scaled


def test_a_class_a_function_or_an_instance():
    class Instance(Guess):
        def __init__(self, factor):
            self.factor, self.seen = factor, []

        def step(self, response):
            self.seen.append(response)
            return super().step(response)._replace(reward=self.factor * len(self.seen))

    instance = Instance(2.0)
    for environment, rewards in (
        (Guess, [1.0, 0.75]),
        (lambda: scaled(3.0)(), [3.0, 6.0]),
        (instance, [2.0, 6.0]),
    ):
        found, _ = converse(
            TOKENIZER, [[USER]] * 2, [["14"], ["7", "14"]], environment=environment,
            columns={"answer": 14},
        )  # fmt: skip
        assert [conversation.reward for conversation in found] == rewards
    assert instance.seen == []
    spec = check_environment(lambda: scaled(3.0)())
    assert (spec.name, spec.steps, spec.gives_reward) == ("Scaled", True, True)


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: one.
        b: the other.
    """
    return a + b


def test_tools_beside_an_environment():
    asks = call("add", '{"a": 1, "b": 2}')
    scripts = [[asks, "7", "14"], [asks, "14"]]
    found, _ = converse(
        TOKENIZER, [[USER]] * 2, scripts, environment=Guess, tools=[add], columns={"answer": 14}
    )
    assert [c.reward for c in found] == [0.75, 1.0]
    roles = [message["role"] for message in found[0].messages]
    assert roles == ["assistant", "tool", "assistant", "user", "assistant"]


class Counter:
    """TRL's kind."""

    def reset(self, prompt, start=0, **columns):
        self.count, self.columns = start, columns
        return f"{start} cards"

    def increment(self, by: int) -> int:
        """Counts on.

        Args:
            by: how far.
        """
        self.count += by
        return self.count

    def _private(self):
        raise AssertionError

    def get_reward(self):
        return self.count


def test_an_environment_of_trls_kind():
    spec = check_environment(Counter)
    [schema] = check_tools([], TOKENIZER, spec)
    assert schema["function"]["parameters"]["properties"].keys() == {"by"}
    assert (spec.name, spec.steps, spec.gives_reward) == ("Counter", False, True)
    counts = [call("increment", f'{{"by": {by}}}') for by in (1, 2)]
    scripts = [[*counts, "14"], [counts[1] + counts[1], "14"], ["14"]]
    found, _ = converse(
        TOKENIZER, [[USER]] * 3, scripts, environment=Counter, columns={"start": 10}
    )
    assert [c.reward for c in found] == [13.0, 14.0, 10.0]
    assert [c.tool_calls for c in found] == [2, 2, 0]
    assert [m["content"] for m in found[0].messages if m["role"] == "tool"] == ["11", "13"]
    assert found[0].prompt.text[-1]["content"] == "tom has 14 cards. 10 cards"
    # The tools stay in a prompt that the environment extends.
    assert "increment" in TOKENIZER.decode(found[0].prompt.tokens)


def test_an_environment_of_trls_kind_without_a_reward():
    class Silent(Counter):
        get_reward = None

    [found], _ = converse(TOKENIZER, [[USER]], [["14"]], environment=Silent)
    assert found.reward is None and not check_environment(Silent).gives_reward


def test_all_ranks_tell_the_same():
    """Environments live on one rank; the others learn what they say, as plain data."""
    lines: list[bytes] = []

    def speak(function):
        result = function()
        lines.append(pickle.dumps(result))
        return result

    def hear(function):
        return pickle.loads(lines.pop(0))

    arguments = (TOKENIZER, [[USER]] * 2, [["7", "14"], [call("add", '{"a": 1, "b": 2}'), "14"]])
    settings = {"environment": Guess, "tools": [add], "columns": {"answer": 14}}
    first, _ = converse(*arguments, once=speak, **settings)
    second, _ = converse(*arguments, once=hear, **settings)
    assert first == second and not lines


class NoReset:
    def step(self, response): ...


class NoStep:
    def reset(self, prompt): ...


class Needy(Guess):
    def __init__(self, level): ...


REFUSED = {
    "number": (3, "environment=3: an environment is a class"),
    "no reset": (NoReset, "environment=NoReset: NoReset has no reset"),
    "instance": (NoReset(), "an environment is a class, a function that makes one or an instance"),
    "neither": (NoStep, r"environment=NoStep: has neither step\(response\) nor methods"),
    "made": (lambda: 3, "environment=<lambda>: int has no reset"),
    "arguments": (
        Needy,
        "environment=Needy: it is called without arguments, but missing a",
    ),
    "mapping": ({"a": Guess}, "an environment is a class"),
}


@pytest.mark.parametrize("environment, message", REFUSED.values(), ids=REFUSED.keys())
def test_other_things_are_refused(environment, message):
    with pytest.raises(ConfigError, match=message):
        check_environment(environment)


def test_an_instance_that_cannot_be_copied():
    environment = Guess()
    environment.lock = threading.Lock()
    with pytest.raises(ConfigError, match=r"environment=Guess: .* cannot be copied"):
        check_environment(environment)


def test_methods_that_cannot_be_tools():
    class Vague(Counter):
        def decrement(self, by):
            """Counts back."""

    with pytest.raises(ConfigError, match="environment=Vague=decrement: a tool needs a type"):
        check_tools([], TOKENIZER, check_environment(Vague))


def making(**methods):
    return type("Bad", (Guess,), methods)


FAILURES = {
    "raises": (
        making(step=lambda self, response: 1 / 0),
        "environment Bad: step failed: ZeroDivisionError: division by zero",
    ),
    "reset raises": (
        making(reset=lambda self, other: None),
        "environment Bad: reset failed: TypeError: .* 'other'",
    ),
    "no result": (making(step=lambda self, r: None), "Bad: step returned None; return StepResult"),
    "reward": (
        making(step=lambda self, r: ("", float("nan"), True)),
        "environment Bad: step gave the reward nan; give a finite number",
    ),
    "nothing": (
        making(step=lambda self, r: (None, 0.0, False)),
        "environment Bad: step returned no observation, though done is False",
    ),
    "observation": (making(step=lambda self, r: (3, 0.0, False)), "step gave the observation 3"),
    "last role": (
        making(reset=lambda self: [{"role": "assistant", "content": "14"}]),
        "reset gave the observation .* a user's or a tool's last",
    ),
}


@pytest.mark.parametrize("environment, message", FAILURES.values(), ids=FAILURES.keys())
def test_failures_name_the_environment(environment, message):
    with pytest.raises(EnvironmentFailure, match=message):
        converse(TOKENIZER, [[USER]], [["7"]], environment=environment, columns={"answer": 14})


def test_messages_do_not_fit_plain_text():
    environment = making(reset=lambda self: [{"role": "user", "content": "14"}])
    with pytest.raises(EnvironmentFailure, match="reset gave messages, but the prompt is plain"):
        converse(TOKENIZER, ["how many?"], [["7"]], environment=environment)


def test_a_first_observation_that_makes_the_prompt_too_long():
    columns = {"answer": 14}
    [found], _ = converse(TOKENIZER, [[USER]], [["14"]], environment=Guess, columns=columns)
    longest = len(found.prompt.tokens)
    settings = {"environment": Guess, "columns": columns}
    converse(TOKENIZER, [[USER]], [["14"]], max_prompt_length=longest, **settings)
    with pytest.raises(EnvironmentFailure, match=f"a prompt has {longest} tokens, more than"):
        converse(TOKENIZER, [[USER]], [["14"]], max_prompt_length=longest - 1, **settings)
