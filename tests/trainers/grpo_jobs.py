"""Small jobs of GRPOTrainer that share one engine, in tests and in the processes they start."""

import json
from pathlib import Path
from typing import Any

from grpo_mcore import GRPOConfig, GRPOTrainer
from grpo_mcore.config import ModelConfig, RolloutConfig
from grpo_mcore.trainers import grpo
from grpo_mcore.trainers.engines import start_engines
from tests.conftest import write_family_model
from tests.environments.scripted import chat_tokenizer

POSITIONS = 1024
ROWS = [{"prompt": f"tom has {n} cards and buys {n + 2} more.", "answer": n} for n in range(24)]


def text_reward(prompts, completions, **_) -> list[float]:
    """Something that differs between samples of a random model."""
    return [float(sum(map(ord, text)) % 11) for text in completions]


def write_chat_model(directory: Path) -> None:
    """A random Qwen3 of four layers whose tokenizer has a chat template that knows tools."""
    tokenizer = chat_tokenizer()
    write_family_model(
        directory,
        "Qwen3Config",
        vocab_size=len(tokenizer) + 1,
        hidden_size=64,
        num_hidden_layers=4,
        intermediate_size=96,
        max_position_embeddings=POSITIONS,
        eos_token_id=tokenizer.eos_token_id,
    )
    tokenizer.save_pretrained(directory)
    # So many tokens end a turn that a random model ends about half of its turns by itself.
    ends = [*range(0, len(tokenizer), 12), tokenizer.eos_token_id]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))


def job(model: Path, output: Path, **settings) -> GRPOConfig:
    """Two prompts a step, four samples each, in micro-batches of two."""
    settings = {
        "per_device_train_batch_size": 2,
        "num_generations": 4,
        "num_prompts_per_step": 2,
        "max_steps": 1,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,  # gradients are compared as they are
        "save_strategy": "no",
        "log_completions": 16,
    } | settings
    model_settings = settings.pop("model", {})
    return GRPOConfig(
        output_dir=str(output),
        model=ModelConfig(path=str(model), **model_settings),
        rollout=RolloutConfig(kv_cache_gib=0.05, deadline_seconds=120),
        **settings,
    )


class SharedEngine:
    """Stands in for `start_engines` where it is used: every trainer of this process is given the
    first one's engine, which takes seconds to start, and loads its own weights into it."""

    def __init__(self):
        self.pool = None
        grpo.start_engines = self.give

    def give(self, role, model, tokenizer, max_model_len, *others):
        if self.pool is None:
            self.pool = start_engines(role, model, tokenizer, POSITIONS, *others)
            self.end, self.pool.close = self.pool.close, lambda: None
        self.pool.role, self.pool.version = role, -1
        self.pool.pending.clear()
        return self.pool

    def close(self) -> None:
        grpo.start_engines = start_engines
        if self.pool:
            self.end()


def trainer_of(args: GRPOConfig, reward: Any = text_reward, **others) -> GRPOTrainer:
    return GRPOTrainer(args=args, reward_funcs=reward, **{"train_dataset": ROWS} | others)
