"""What `train()` and `fit()` return."""

import pytest
from transformers import TrainerState

from grpo_mcore.report.result import TrainingResult, TrainOutput, training_result


@pytest.mark.seed(66)
def test_result_has_the_last_value_of_every_metric():
    state = TrainerState(
        epoch=2.5,
        best_model_checkpoint="checkpoint-3",
        log_history=[
            {"loss": 0.5, "mean_reward": 0.1, "epoch": 1.0, "step": 1},
            {"eval_reward": 0.3, "epoch": 1.0, "step": 1},
            {"loss": 0.25, "mean_reward": 0.2, "epoch": 2.5, "step": 5},
        ],
    )
    output = TrainOutput(5, 0.4, {"train_loss": 0.4, "train_runtime": 9.0})
    assert (output.global_step, output.training_loss) == (5, 0.4)
    assert training_result(output, state) == TrainingResult(
        metrics={
            "loss": 0.25, "mean_reward": 0.2, "eval_reward": 0.3,
            "train_loss": 0.4, "train_runtime": 9.0,
        },
        best_checkpoint_path="checkpoint-3",
        total_steps=5,
        total_epochs=2,
    )  # fmt: skip


def test_a_run_that_logged_nothing_has_a_loss():
    result = training_result(TrainOutput(3, 0.4, {}), TrainerState(epoch=1.0))
    assert result == TrainingResult({"loss": 0.4}, None, 3, 1)
