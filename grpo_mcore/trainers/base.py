"""The loop every reinforcement trainer shares: steps, evaluation, checkpoints, records."""

from collections.abc import Callable
from pathlib import Path

from grpo_mcore.checkpoint.run import latest_step, load_checkpoint, save_checkpoint
from grpo_mcore.config import ConfigError, TrainingConfig
from grpo_mcore.parallel.groups import Role
from grpo_mcore.report.progress import Progress
from grpo_mcore.training.policy import Policy


def check_output_dir(config: TrainingConfig, resume: bool) -> None:
    """Refuses to write over an earlier run, or to resume one that is not there.

    Raises:
        ConfigError: naming output_dir.
    """
    directory = Path(config.output_dir)
    checkpoint = latest_step(directory / "checkpoints")
    if resume and checkpoint is None:
        raise ConfigError(f"resume=true: output_dir={directory} holds no checkpoint")
    if not resume and (directory / "metrics.jsonl").exists():
        how = "or resume=true to go on" if checkpoint else "or remove it: it has no checkpoint"
        raise ConfigError(f"output_dir={directory}: holds an earlier run; choose another, {how}")
    if resume and checkpoint > config.max_steps:
        raise ConfigError(
            f"max_steps={config.max_steps}: the checkpoint in {directory} is at step {checkpoint}"
        )


class Loop:
    """Runs `train_step` from `first_step` to `max_steps`, with evaluation and checkpoints between.

    Evaluation runs before the first step, every `eval_steps` and after the last; a checkpoint is
    written every `save_steps` and after the last.
    """

    def __init__(self, config: TrainingConfig, role: Role, policy: Policy, shown: dict[str, str]):
        self.config, self.role, self.policy = config, role, policy
        self.directory = Path(config.output_dir)
        self.checkpoints = self.directory / "checkpoints"
        self.first_step = load_checkpoint(policy, self.checkpoints) if config.resume else 0
        self.progress: Progress | None = None
        if role.rank == 0:
            self.progress = Progress(self.directory, self.first_step, config.max_steps, shown)

    def run(
        self,
        train_step: Callable[[int], dict[str, float]],
        evaluate: Callable[[], dict[str, float]] | None,
    ) -> dict[str, float]:
        """Returns the last step's metrics, with the last evaluation's under "eval_"."""
        config, metrics, result = self.config, {}, {}
        if evaluate and self.first_step == 0:
            result = self._evaluate(0, evaluate)
        for step in range(self.first_step, config.max_steps):
            metrics = train_step(step)
            done = step + 1
            if self.progress:
                self.progress.step(done, metrics)
            last = done == config.max_steps
            if evaluate and (last or (config.eval_steps and done % config.eval_steps == 0)):
                result = self._evaluate(done, evaluate)
            if last or (config.save_steps and done % config.save_steps == 0):
                save_checkpoint(self.policy, done, self.checkpoints)
        return metrics | {f"eval_{name}": value for name, value in result.items()}

    def _evaluate(self, step: int, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
        metrics = evaluate()
        if self.progress:
            self.progress.evaluation(step, metrics)
        return metrics

    def say(self, text: str) -> None:
        if self.progress:
            self.progress.say(text)

    def close(self) -> None:
        if self.progress:
            self.progress.close()
