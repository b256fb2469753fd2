"""What a step does, asked for by hand: ATLAS's documented methods, with TRL's tensors."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grpo_mcore.config import ConfigError
from grpo_mcore.steps.grpo_step import GRPOSession
from grpo_mcore.training.batch import align, pad_batch

TRL_LOG_PROBS = {
    "ref_per_token_logps": "reference",
    "old_per_token_logps": "old",
    "sampling_per_token_logps": "rollout",
}
"""TRL's name of log-probabilities -> theirs in a batch."""


def generate_and_score(
    session: GRPOSession, rows: Sequence[dict]
) -> tuple[list[str], Tensor, Tensor]:
    """Prompts as text, completion ids [completions, tokens] and advantages [completions] of
    `num_generations` samples of each row.

    Raises:
        ConfigError: when data parallel ranks cannot share the completions equally.
    """
    _check_count(session, len(rows) * session.config.num_generations)
    rollouts = session.sampler.roll_out_given(rows)
    batch = session.batch_of(rollouts, session.scoring(rollouts, session.step))
    ids = [torch.tensor(sample.tokens) for sample in rollouts.samples]
    tokenizer = session.job.tokenizer.inner
    session.phases.take()
    texts = [tokenizer.decode(sample.prompt) for sample in rollouts.samples]
    return texts, pad_sequence(ids, True, tokenizer.pad_token_id or 0), batch["advantages"]


def compute_loss(session: GRPOSession, inputs: Mapping[str, Tensor]) -> float:
    """The loss of TRL's `inputs` under the policy.

    Raises:
        ConfigError: when data parallel ranks cannot share the completions equally.
    """
    policy, update, temperature = session.policy, session.update, session.config.temperature
    mask = inputs["completion_mask"]
    prompts = _unpadded(inputs["prompt_ids"], inputs["prompt_mask"])
    completions = _unpadded(inputs["completion_ids"], mask)
    _check_count(session, len(completions))
    batch = pad_batch(prompts, completions, policy.length_multiple)
    tokens = inputs.get("num_items_in_batch", mask.sum())
    batch["tokens_per_update"] = torch.as_tensor(tokens).double().expand(len(prompts)).clone()
    if update.reference:
        batch["reference"] = update.reference.log_probs(batch, temperature)
    for name, entry in TRL_LOG_PROBS.items():
        if name in inputs:
            batch[entry] = align(_unpadded(inputs[name], mask), batch["mask"])
    if "rollout" not in batch:  # they are then taken to be the policy's own
        own, _ = policy.log_probs(batch, temperature)
        batch["rollout"] = batch.get("old", own)
    batch["advantages"] = inputs["advantages"]
    return update.value(batch)


def _check_count(session: GRPOSession, completions: int) -> None:
    ranks = session.role.layout.data
    if completions % ranks:
        raise ConfigError(
            f"inputs: {completions} completions do not divide by {ranks} data parallel ranks"
        )


def _unpadded(values: Tensor, mask: Tensor) -> list[list]:
    return [row[keep.bool()].tolist() for row, keep in zip(values, mask, strict=True)]
