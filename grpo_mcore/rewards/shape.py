"""Rewards for the shape of a completion: its format and its length."""

import re
from collections.abc import Sequence

from grpo_mcore.data.chat import Text
from grpo_mcore.errors import ConfigError
from grpo_mcore.rewards.text import text_of

_THINKING = re.compile(r"<think>(?!.*<think>).*</think>", re.DOTALL)


def think_format_reward(completions: Sequence[Text], **_) -> list[float]:
    """1.0 where the completion starts with its one <think> and has a </think> after it, else 0.0
    (trl.rewards.think_format_reward)."""
    return [float(bool(_THINKING.match(text_of(completion)))) for completion in completions]


format_reward = think_format_reward


class _LengthPenalty:
    """DAPO's soft overlong punishment; an object, so that it can be pickled."""

    def __init__(self, name: str, longest: int, soft: int):
        self.__name__, self.longest, self.soft = name, longest, soft

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_) -> list[float]:
        return [self._penalty(len(ids)) for ids in completion_ids]

    def _penalty(self, length: int) -> float:
        if length > self.longest:
            return -1.0
        return min(0, self.longest - self.soft - length) / self.soft if self.soft else 0.0


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> _LengthPenalty:
    """A reward that is 0 up to max_completion_len - soft_punish_cache tokens, falls evenly to -1 at
    max_completion_len, and is -1 beyond (DAPO, arXiv:2503.14476, equation 13;
    trl.rewards.get_soft_overlong_punishment).

    Raises:
        ConfigError: for a cache below 0 or above the length.
    """
    if not 0 <= soft_punish_cache <= max_completion_len:
        raise ConfigError(
            f"soft_punish_cache={soft_punish_cache}: must be from 0 to "
            f"max_completion_len={max_completion_len}"
        )
    return _LengthPenalty("soft_overlong_punishment_reward", max_completion_len, soft_punish_cache)


def get_length_penalty(max_completion_len: int) -> _LengthPenalty:
    """A reward that falls evenly from 0 at no token to -1 at max_completion_len, and is -1 beyond:
    the soft overlong punishment whose cache is the whole length.

    Raises:
        ConfigError: for a length below 1.
    """
    if max_completion_len < 1:
        raise ConfigError(f"max_completion_len={max_completion_len}: must be at least 1")
    return _LengthPenalty("length_penalty", max_completion_len, max_completion_len)
