"""TRL's own GRPOTrainer as an oracle: real ones, given tensors in place of a model's outputs."""

import functools
import logging
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from examples.demo.tokenizer import build_tokenizer

TOLERANCE = 1e-9
EXAMPLES = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
QUIET = pytest.mark.filterwarnings("ignore")
"""TRL warns of our vLLM, and transformers of its own making."""


class Ranks:
    """An accelerator that says it is one of several; what it gathers is this rank's only."""

    def __init__(self, accelerator, num_processes: int):
        self._accelerator, self.num_processes = accelerator, num_processes

    def __getattr__(self, name):
        return getattr(self._accelerator, name)


@functools.cache
def parts_of_a_trainer() -> dict:
    """A model, a tokenizer and a dataset; none of them matters."""
    import transformers
    from datasets import Dataset

    tokenizer = build_tokenizer()
    shape = transformers.LlamaConfig(
        vocab_size=len(tokenizer) + 1,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    logging.getLogger("trl").setLevel(logging.ERROR)
    return {
        "model": transformers.LlamaForCausalLM(shape),
        "processing_class": tokenizer,
        "train_dataset": Dataset.from_list([{"prompt": "a"}]),
    }


def make_trainer(
    functions: int = 1,
    ranks: int = 1,
    gradient_accumulation_steps: int = 1,
    beta: float = 0.0,
    num_generations: int = 4,
    **settings,
):
    """TRL's trainer under `settings` of GRPOConfig, ready for `loss_of` and `prepare`. It is told
    afterwards of `beta` and of vLLM, for which it would load a reference model and an engine."""
    from trl import GRPOConfig, GRPOTrainer

    def reward(prompts, **columns):
        return [0.0] * len(prompts)

    trainer = GRPOTrainer(
        **parts_of_a_trainer(),
        reward_funcs=[reward] * functions,
        args=GRPOConfig(
            output_dir=tempfile.gettempdir(),  # nothing is written
            use_cpu=True,
            bf16=False,
            report_to=[],
            beta=0.0,
            num_generations=num_generations,
            per_device_train_batch_size=num_generations,
            gradient_accumulation_steps=gradient_accumulation_steps,
            **settings,
        ),
    )
    trainer.beta = beta
    trainer.model.train()
    trainer.accelerator = Ranks(trainer.accelerator, ranks)
    trainer.current_gradient_accumulation_steps = gradient_accumulation_steps
    return trainer


def loss_of(
    trainer,
    log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    entropies: Tensor,
    tokens: Tensor | int,
    **columns: Tensor,
) -> Tensor:
    """TRL's loss of a micro-batch; `tokens` are those of the whole batch of samples."""
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (log_probs, entropies, None)
    trainer.use_vllm = "importance_sampling_ratio" in columns
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long),
        "completion_ids": torch.zeros(mask.shape, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "num_items_in_batch": torch.as_tensor(tokens),
    }
    return trainer._compute_loss(trainer.model, inputs | columns)


def prepare(
    trainer,
    rewards: Tensor,
    completions: list[list[int]],
    old_log_probs: Tensor | None = None,
    sampling_log_probs: list[list[float | None]] | None = None,
) -> dict[str, Tensor]:
    """What TRL makes of completions and their rewards [samples, functions] before the loss, wholly
    in float64: the n / (n - 1) of its deviations and the engine's log-probabilities are made in the
    default type."""
    trainer.use_vllm = sampling_log_probs is not None
    prompts = [[1]] * len(completions)
    texts = [""] * len(completions)
    trainer._generate = lambda _: (
        prompts, completions, None, texts, sampling_log_probs, {}, None, []
    )  # fmt: skip
    trainer._calculate_rewards = lambda *_: rewards
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (old_log_probs, None, None)
    torch.set_default_dtype(torch.float64)
    try:
        return trainer._generate_and_score_completions([{"prompt": "a"}] * len(completions))
    finally:
        torch.set_default_dtype(torch.float32)
