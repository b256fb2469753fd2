"""Supervised fine-tuning on the same base."""

import json
from pathlib import Path

from grpo_mcore.config import ConfigError, SFTConfig
from grpo_mcore.data.tokenizer import Tokenizer
from grpo_mcore.models.families import read_shape
from grpo_mcore.models.transformer_engine import read_facts
from grpo_mcore.objectives.sft import sft_loss
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.world import join, world_size
from grpo_mcore.report.progress import Progress
from grpo_mcore.trainers.layouts import batch_misfit, never, why_not, with_experts
from grpo_mcore.trainers.preflight import check_model, check_training, check_weights
from grpo_mcore.training.batch import Batch, pad_batch
from grpo_mcore.training.optimizer import check_optimizer
from grpo_mcore.training.policy import Policy
from grpo_mcore.weights.export import export_model

DEADLINE_SECONDS = 1800.0


class SFTTrainer:
    """Trains `args.model` on `args.train` and writes the result to `args.output_dir`/final."""

    def __init__(self, args: SFTConfig):
        """Raises ConfigError for settings that cannot work."""
        self.config = args
        self.layout = with_experts(Layout.parse("layout", args.layout), args.model)
        if args.batch_size < 1:
            raise ConfigError(f"batch_size={args.batch_size}: must be at least 1")
        check_training(args)
        check_model("model", args.model)
        check_optimizer(args, "model", args.model, read_facts())
        self.shape = read_shape("model.path", args.model.path)
        if reason := never(self.shape, args.model):
            raise ConfigError(f"model.expert_parallel={args.model.expert_parallel}: {reason}")
        reason = why_not(self.layout, self.shape, args.model) or batch_misfit(
            args.batch_size,
            args.per_device_train_batch_size,
            self.layout,
            args.model.virtual_pipeline,
            args.max_tokens_per_micro_batch,
        )
        if reason:
            raise ConfigError(f"layout={self.layout}: {reason}")
        if self.layout.size != world_size():
            raise ConfigError(
                f"layout={self.layout}: needs {self.layout.size} processes, "
                f"there are {world_size()}"
            )
        check_weights("model.path", args.model.path, self.shape)
        self.tokenizer = Tokenizer(args.model.path)
        self.rows = self._read_rows()

    def train(self) -> dict[str, float]:
        """Runs all steps. Returns the last step's metrics."""
        config = self.config
        with join({"policy": self.layout}, "colocated", DEADLINE_SECONDS) as world:
            role = world.roles["policy"]
            policy = Policy(role, self.shape, config.model, config)
            progress = None
            if role.rank == 0:
                shown = {"loss": "loss {:.4f}", "grad_norm": "grad norm {:.2f}"}
                progress = Progress(Path(config.output_dir), 0, config.max_steps, shown)
            for step in range(config.max_steps):
                metrics = policy.compute_gradients(
                    self.batch(step, policy.length_multiple),
                    lambda log_probs, _, part: _loss(log_probs, part["weights"]),
                )
                metrics |= policy.step()
                if progress:
                    progress.step(step + 1, metrics)
            final = Path(config.output_dir) / "final"
            export_model(policy.chunks, self.shape, role, final, config.model.path)
            if progress:
                progress.close()
        return metrics

    def batch(self, step: int, length_multiple: int) -> Batch:
        """The rows of a step, in the file's order, from its start again after its end."""
        size = self.config.batch_size
        rows = [self.rows[i % len(self.rows)] for i in range(step * size, (step + 1) * size)]
        prompts, completions = zip(*rows, strict=True)
        batch = pad_batch(prompts, completions, length_multiple)
        return batch | {"weights": batch["mask"] / batch["mask"].sum()}

    def _read_rows(self) -> list[tuple[list[int], list[int]]]:
        """Prompt and completion of every row as tokens, the end token included.

        Raises:
            ConfigError: when the file is not there, is empty, or has a row that is not JSON, lacks
                a column or is longer than the model's context.
        """
        source = self.config.train
        if not Path(source).is_file():
            raise ConfigError(f"train={source}: no such file")
        rows = []
        for number, line in enumerate(Path(source).read_text().splitlines()):
            try:
                row = json.loads(line)
                prompt, completion = row["prompt"], row["completion"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"train={source}: row {number} is not a JSON object with prompt and completion"
                ) from error
            end = [self.tokenizer.inner.eos_token_id]
            tokens = self.tokenizer.encode_prompt(prompt), self.tokenizer.encode(completion) + end
            length = sum(map(len, tokens))
            if length > self.shape.positions:
                raise ConfigError(
                    f"train={source}: row {number} has {length} tokens, more than the model's "
                    f"{self.shape.positions}"
                )
            rows.append(tokens)
        if not rows:
            raise ConfigError(f"train={source}: the dataset is empty")
        return rows


def _loss(log_probs, weights):
    loss = sft_loss(log_probs, weights)
    return loss, {"loss": loss}
