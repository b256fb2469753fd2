"""The turns of a batch of conversations."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_mcore.data.chat import Text, is_conversation
from grpo_mcore.data.prompts import Prompt, encode_prompt
from grpo_mcore.environments.answers import Answer, Answerer
from grpo_mcore.environments.calls import Turn, read_turn
from grpo_mcore.environments.conversation import Conversation
from grpo_mcore.environments.environment import EnvironmentFailure, EnvironmentSpec
from grpo_mcore.environments.template import tokens_between
from grpo_mcore.environments.tools import tool_schemas
from grpo_mcore.errors import ConfigError
from grpo_mcore.rollout.requests import Completion, Request, request_seed


def run_turns(
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    tokenizer: PreTrainedTokenizerBase,
    *,
    generate: Callable[[list[Request]], list[Completion]],
    once: Callable[[Callable], Any],
    tools: Sequence[Callable] = (),
    environment: EnvironmentSpec | None = None,
    max_turns: int | None = None,
    max_completion_length: int,
    max_prompt_length: int | None = None,
    max_sequence_length: float = math.inf,
    chat_template_kwargs: dict | None = None,
) -> list[Conversation]:
    """Samples a conversation for each prompt. A turn that calls tools is answered by them, another
    one by the environment's `step`; without an answer the conversation is over.

    What does not fit into max_completion_length is left out together with its messages, and the
    conversation ends, as in TRL; here it also counts as not finished. The last turn, by its number
    or because its length was cut, calls no tools, but the environment judges it.

    Args:
        requests: how each is sampled. Each turn has a seed of its own, from the request's and the
            turn's number; prompt and max_tokens follow from the turns.
        generate: samples what is requested. Every rank calls it with the same.
        once: runs a function on one rank and returns its result on every rank. Tools and
            environments run there only.
        tools: functions, checked by `check_tools`. The prompts are encoded with its schemas.
        max_turns: the most turns of the model; None: any number.
        max_completion_length: the most tokens of a conversation after its prompt.
        max_prompt_length: the most of a prompt with the environment's first observation; None: any
            number.
        max_sequence_length: the most of a prompt and the conversation after it.
        chat_template_kwargs: further arguments of the chat template; those of a row's own
            `chat_template_kwargs` go before them.

    Raises:
        ConfigError: when there are tools and a prompt is no conversation.
        EnvironmentFailure: when an environment raises, returns what cannot be used, or makes the
            prompt too long.
    """
    schemas = tool_schemas(tools, environment)
    if schemas and not all(is_conversation(prompt.text) for prompt in prompts):
        raise ConfigError("tools: a prompt is plain text; only conversations can have tools")
    most = max_completion_length, max_sequence_length
    samples = [
        _Sample(tokenizer, prompt, request, schemas, chat_template_kwargs, *most)
        for prompt, request in zip(prompts, requests, strict=True)
    ]
    answerer = Answerer(prompts, tools, environment)
    if environment:
        for sample, observation in zip(samples, once(answerer.reset), strict=True):
            sample.extend_prompt(observation)
            length = len(sample.prompt.tokens)
            if max_prompt_length is not None and length > max_prompt_length:
                raise EnvironmentFailure(
                    f"environment {environment.name}: with what reset observed a prompt has "
                    f"{length} tokens, more than max_prompt_length={max_prompt_length}"
                )
    steps = environment is not None and environment.steps
    waiting = dict(enumerate(samples))
    while waiting:
        completions = generate([sample.request() for sample in waiting.values()])
        calling: dict[int, Turn] = {}
        stepping: dict[int, str] = {}
        for (place, sample), completion in zip(waiting.items(), completions, strict=True):
            turn = sample.take(completion, max_turns)
            if turn.calls_tools and sample.may_go_on:
                calling[place] = turn
            elif steps:
                stepping[place] = turn.text
            elif turn.calls_tools:
                sample.finished = False
        asked = calling or stepping
        answers = once(partial(answerer.answer, calling, stepping)) if asked else {}
        waiting = {
            place: sample
            for place, sample in waiting.items()
            if place in answers and sample.go_on(answers[place])
        }
    if environment is None or not environment.gives_reward:
        return [sample.conversation(None) for sample in samples]
    rewards = [sample.reward for sample in samples] if steps else once(answerer.rewards)
    return [sample.conversation(reward) for sample, reward in zip(samples, rewards, strict=True)]


class _Sample:
    """A conversation in the making, the same on every rank."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt,
        sampling: Request,
        schemas: list[dict],
        chat_template_kwargs: dict | None,
        max_completion_length: int,
        max_sequence_length: float,
    ):
        self.tokenizer, self.prompt, self.sampling = tokenizer, prompt, sampling
        self.schemas = schemas
        self.max_completion_length = max_completion_length
        self.max_sequence_length = max_sequence_length
        own = prompt.columns.get("chat_template_kwargs")
        self.template = (chat_template_kwargs or {}) | (own or {})
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.mask: list[int] = []
        self.messages: list[dict] = []
        self.finished = self.may_go_on = True
        self.reward = 0.0
        self.turns = self.tool_calls = self.tool_failures = 0

    def extend_prompt(self, observation: Text | None) -> None:
        """Adds text to the last message, as TRL does, or messages after it."""
        if observation is None:
            return
        text = self.prompt.text
        if not is_conversation(text) or is_conversation(observation):
            text = text + observation
        else:
            content = text[-1]["content"]
            added = observation if isinstance(content, str) else [_text_part(observation)]
            text = [*text[:-1], text[-1] | {"content": content + added}]
        tokens = encode_prompt(self.tokenizer, text, self.schemas, **self.template)
        self.prompt = replace(self.prompt, text=text, tokens=tokens)

    @property
    def room(self) -> int:
        """Tokens after the prompt at most."""
        return min(self.max_completion_length, self.max_sequence_length - len(self.prompt.tokens))

    def request(self) -> Request:
        """The next turn's."""
        return replace(
            self.sampling,
            prompt=self.prompt.tokens + self.tokens,
            max_tokens=self.room - len(self.tokens),
            seed=request_seed(self.sampling.seed, self.turns),
        )

    def take(self, completion: Completion, max_turns: int | None) -> Turn:
        """Adds what the model wrote."""
        context = self.prompt.tokens + self.tokens
        turn = read_turn(self.tokenizer, context, completion.tokens, self.schemas)
        self._add(completion.tokens, completion.log_probs, 1)
        self.messages.append(turn.message)
        self.turns += 1
        self.finished = completion.finished
        self.may_go_on = completion.finished and self.turns != max_turns
        return turn

    def go_on(self, answer: Answer) -> bool:
        """Adds what follows the model's turn. Returns whether there is another turn."""
        self.reward += answer.reward
        self.tool_calls += answer.tool_calls
        self.tool_failures += answer.tool_failures
        if answer.observation is None:
            return False
        tokens = self._encode_between(answer.observation) if self.may_go_on else []
        if not self.may_go_on or len(self.tokens) + len(tokens) >= self.room:
            self.finished = False
            return False
        self._add(tokens, [0.0] * len(tokens), 0)
        if is_conversation(answer.observation):
            self.messages += answer.observation
        return True

    def conversation(self, reward: float | None) -> Conversation:
        plain = not is_conversation(self.prompt.text)
        return Conversation(
            prompt=self.prompt,
            tokens=self.tokens,
            log_probs=self.log_probs,
            mask=self.mask,
            finished=self.finished,
            messages=self._text() if plain else self.messages,
            reward=reward,
            turns=self.turns,
            tool_calls=self.tool_calls,
            tool_failures=self.tool_failures,
        )

    def _encode_between(self, observation: Text) -> list[int]:
        if is_conversation(observation):
            return tokens_between(self.tokenizer, self.tokens[-1], observation, **self.template)
        return list(self.tokenizer(text=observation, add_special_tokens=False)["input_ids"])

    def _add(self, tokens: list[int], log_probs: list[float], mask: int) -> None:
        self.tokens = self.tokens + tokens
        self.log_probs = self.log_probs + log_probs
        self.mask = self.mask + [mask] * len(tokens)

    def _text(self) -> str:
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True)


def _text_part(text: str) -> dict:
    return {"type": "text", "text": text}
