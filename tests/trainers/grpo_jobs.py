"""Small jobs of GRPOTrainer that share one engine, in tests and in the processes they start."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_mcore import GRPOConfig, GRPOTrainer
from grpo_mcore.config import ModelConfig, RolloutConfig
from grpo_mcore.rollout.pool import RolloutPool
from grpo_mcore.rollout.requests import Completion
from grpo_mcore.rollout.start import start_engines
from grpo_mcore.trainers import grpo
from tests.conftest import write_family_model
from tests.environments.scripted import END, call, chat_tokenizer

POSITIONS = 1024
ROWS = [{"prompt": f"tom has {n} cards and buys {n + 2} more.", "answer": n} for n in range(24)]


def text_reward(prompts, completions, **_) -> list[float]:
    """Something that differs between samples of a random model."""
    return [float(sum(map(ord, str(completion))) % 11) for completion in completions]


def place_reward(prompts, completions, place, **_) -> list[float]:
    """Of the samples of `rollout`."""
    return [float(number) for number in place]


CHATS = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]


class Judge:
    """An environment that answers a turn with another question, once."""

    def reset(self, prompt, **columns):
        self.turns = 0
        return " think."

    def step(self, response):
        self.turns += 1
        return "and now?", 0.25 * (len(response) % 3), self.turns == 2


def add_numbers(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


def rollout(prompts, trainer) -> dict[str, list]:
    """A rollout function: tokens drawn for each prompt, of which the second is not the model's;
    every second completion ends itself."""
    tokenizer, draws = trainer.job.tokenizer, [random.Random(prompt) for prompt in prompts]
    place = [n % 4 for n in range(len(prompts))]
    return {
        "prompt_ids": [tokenizer.encode(prompt) for prompt in prompts],
        "completion_ids": [
            [*(12 * draw.randrange(1, 40) + 1 + n for _ in range(4)), 12 if n % 2 else 13]
            for draw, n in zip(draws, place, strict=True)
        ],
        "logprobs": [[-6.4] * 5 for _ in prompts],
        "env_mask": [[1, 0, 1, 1, 1] for _ in prompts],
        "place": place,
    }


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


def job(path: Path, output: Path, /, **settings) -> GRPOConfig:
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
    model = ModelConfig(path=str(path), **settings.pop("model", {}))
    rollout = {"kv_cache_gib": 0.05, "deadline_seconds": 120} | settings.pop("rollout", {})
    return GRPOConfig(
        output_dir=str(output),
        model=model,
        rollout=RolloutConfig(**rollout),
        **settings,
    )


class SharedEngine:
    """Stands in for `start_engines` where it is used: every trainer of this process is given the
    first one's engine, which takes seconds to start, and loads its own weights into it."""

    def __init__(self):
        self.pool = None
        grpo.start_engines = self.give

    def give(self, role, spec, *others):
        if self.pool is None:
            self.pool = start_engines(role, replace(spec, max_model_len=POSITIONS), *others)
            self.end, self.pool.close = self.pool.close, lambda: None
        self.pool.role, self.pool.versions = role, [-1]
        self.pool.pending.clear()
        return self.pool

    @contextmanager
    def calling_tools(self) -> Iterator[None]:
        """Makes every second sample of the next batch a call of `add_numbers`."""
        text = call("add_numbers", '{"a": 3, "b": 4}') + END
        tokens = chat_tokenizer()(text=text)["input_ids"]
        scripted = [Completion(tokens, [-1.0] * len(tokens), True)]
        generate = RolloutPool.generate

        def generate_calls(pool, requests):
            completions = generate(pool, requests)
            if scripted:
                completions[::2] = [scripted.pop()] * len(completions[::2])
            return completions

        RolloutPool.generate = generate_calls
        try:
            yield
        finally:
            RolloutPool.generate = generate

    def close(self) -> None:
        grpo.start_engines = start_engines
        if self.pool:
            self.end()


def trainer_of(args: GRPOConfig, reward: Any = text_reward, **others) -> GRPOTrainer:
    return GRPOTrainer(args=args, reward_funcs=reward, **{"train_dataset": ROWS} | others)
