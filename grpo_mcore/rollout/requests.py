"""What is asked of an engine and what it answers, as plain data."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo_mcore.errors import ConfigError


class RequestError(ConfigError):
    """A request that no engine of the role can answer."""


@dataclass(frozen=True)
class Request:
    """One completion to sample. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 leave all tokens
    in.

    Attributes:
        stop: texts that end the completion; the tokens that spell them belong to it.
        bad_words: texts that are never sampled.
        structured_outputs: what the completion has to obey, as vLLM's StructuredOutputsParams has
            it: one of json, regex, choice and grammar. These three need a tokenizer in the engine.
    """

    prompt: list[int]
    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    bad_words: Sequence[str] = ()
    structured_outputs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Completion:
    """Sampled tokens, the end token included, and their log-probabilities as they were sampled
    (after temperature, top-p and whatever else left tokens out). `finished` is False where
    max_tokens cut it off, and True where a token or a text ended it that does so."""

    tokens: list[int]
    log_probs: list[float]
    finished: bool


@dataclass(frozen=True)
class Generated:
    """Completions in the order of their requests, and when the engine worked on them (seconds
    since the epoch)."""

    completions: list[Completion]
    started: float
    finished: float


def sampling_settings(request: Request, stop_token_ids: list[int]) -> dict[str, Any]:
    """The arguments of vLLM's SamplingParams for `request`, as JSON has them."""
    return {
        "max_tokens": request.max_tokens,
        "seed": request.seed,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "logprobs": 0,  # of the sampled token only
        "stop_token_ids": stop_token_ids,
        "stop": list(request.stop),
        "bad_words": list(request.bad_words),
        "structured_outputs": request.structured_outputs,
        "detokenize": bool(request.stop),
    }


def ended_itself(finish_reason: str | None) -> bool:
    """Whether a completion that vLLM says to have finished for this reason has an end of its own;
    max_tokens cut off those that have none.

    Raises:
        RuntimeError: when it is no sample at all, as after an abort or an error within vLLM.
    """
    if finish_reason not in ("stop", "length"):
        raise RuntimeError(f"a request was given up ({finish_reason}) before it was answered")
    return finish_reason == "stop"


def check_requests(role: str, requests: Sequence[Request], max_model_len: int) -> None:
    """Raises RequestError for the first of `requests` that an engine of `role`, which takes
    sequences of `max_model_len` tokens, cannot answer."""
    for number, request in enumerate(requests):
        tokens = len(request.prompt)
        if not tokens:
            raise RequestError(f"{role}: request {number} has an empty prompt")
        if request.max_tokens < 1:
            raise RequestError(
                f"{role}: request {number} asks for max_tokens={request.max_tokens}; 1 is the least"
            )
        if tokens + request.max_tokens > max_model_len:
            raise RequestError(
                f"{role}: request {number} has {tokens} prompt tokens and asks for "
                f"max_tokens={request.max_tokens}; together that is over max_model_len="
                f"{max_model_len} of its engine"
            )


def request_seed(*key: int | str) -> int:
    """A seed that depends on `key` only (run seed, step, question, sample, pass), so that the same
    run gives the same text whatever the number of engines, and a resumed run repeats it."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
