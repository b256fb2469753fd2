"""What is asked of an engine and what it answers, as plain data."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One completion to sample. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 leave all tokens
    in."""

    prompt: list[int]
    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Completion:
    """Sampled tokens, the end token included, and their log-probabilities as they were sampled
    (after temperature, top-p and top-k). `finished` is False where max_tokens cut it off."""

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


def request_seed(*key: int | str) -> int:
    """A seed that depends on `key` only (run seed, step, question, sample, pass), so that the same
    run gives the same text whatever the number of engines, and a resumed run repeats it."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
