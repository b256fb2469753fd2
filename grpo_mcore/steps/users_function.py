"""Samples that a user's own function takes: TRL's `rollout_func`."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from grpo_mcore.data.chat import Text
from grpo_mcore.data.prompts import Prompt
from grpo_mcore.parallel.groups import Role
from grpo_mcore.rewards import RewardError
from grpo_mcore.rollout.samples import Sample

FIELDS = ("prompt_ids", "completion_ids", "logprobs")
"""What a `rollout_func` has to return."""


def sample_by_function(
    function: Callable[[list[Text]], dict],
    role: Role,
    prompts: list[Prompt],
    copies: int,
    ends: Collection,
) -> tuple[list[Sample], dict[str, list]]:
    """Samples of `prompts`, `copies` of each side by side, and the further columns the function
    gives. Each data parallel rank's share of the prompts goes through the function there.

    Args:
        ends: tokens that finish a completion.

    Raises:
        RewardError: when the function returns what cannot be trained on.
    """
    bounds = [len(prompts) * rank // role.layout.data for rank in range(role.layout.data + 1)]
    first, end = bounds[role.data_rank], bounds[role.data_rank + 1]
    share = [prompt for prompt in prompts[first:end] for _ in range(copies)]

    def sample() -> tuple[int, dict[str, list]] | None:
        checked = _checked(function([prompt.text for prompt in share]), len(share))
        # Ranks that share a copy of the model were given the same; one of them speaks.
        is_speaker = role.tensor_rank == 0 and role.is_first_stage
        return (role.data_rank, checked) if is_speaker else None

    shares = [part for part in role.each(sample) if part]
    parts = [part for _, part in sorted(shares, key=lambda share: share[0])]
    columns = {name: [v for part in parts for v in part[name]] for name in parts[0]}
    count = len(prompts) * copies
    masks = columns.pop("env_mask", [None] * count)
    triples = (columns.pop(name) for name in FIELDS)
    samples = [
        Sample(prompt, tokens, log_probs, tokens[-1] in ends, mask)
        for prompt, tokens, log_probs, mask in zip(*triples, masks, strict=True)
    ]
    return samples, columns


def _checked(given: Any, count: int) -> dict[str, list]:
    """What the function returned for `count` prompts."""
    if not isinstance(given, Mapping) or any(name not in given for name in FIELDS):
        raise RewardError(f"rollout_func: has to return a dictionary with {', '.join(FIELDS)}")
    for name, values in given.items():
        if len(values) != count:
            raise RewardError(f"rollout_func: {len(values)} {name} for {count} prompts")
    plain = {name: _plain(values) for name, values in given.items()}
    for place, tokens in enumerate(plain["completion_ids"]):
        if not tokens:
            raise RewardError(f"rollout_func: completion {place} has no tokens")
        for name in plain.keys() & {"logprobs", "env_mask"}:
            if len(plain[name][place]) != len(tokens):
                raise RewardError(
                    f"rollout_func: completion {place} has {len(tokens)} tokens and "
                    f"{len(plain[name][place])} {name}"
                )
    return plain


def _plain(values: Sequence) -> list:
    return [value.tolist() if isinstance(value, Tensor) else value for value in values]
