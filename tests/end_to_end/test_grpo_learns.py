"""GRPOTrainer alone raises the reward on the demo's task: guidance that its student heeds."""

import re

import pytest

from examples.demo import problems
from examples.demo.prepare import make_models
from grpo_mcore import GRPOConfig, GRPOTrainer
from grpo_mcore.config import RolloutConfig
from tests.end_to_end.conftest import ROOT, records

pytestmark = pytest.mark.engine

GENERATIONS = 30


def answered_right(prompts, completions, plan, truth, **_) -> list[float]:
    """1.0 where the student of `problems.student_follows` solves its problem after the guidance."""
    hints = [re.fullmatch(r"\s*<teaching> (.*) </teaching>\s*", text) for text in completions]
    corrections = [problems.CORRECTIONS.get(hint[1] if hint else None) for hint in hints]
    return [
        float((correction[1] if correction and correction[0] == mine else mine) == right)
        for correction, mine, right in zip(corrections, plan, truth, strict=True)
    ]


def rows() -> list[dict]:
    return [
        {
            "prompt": problems.ADAPTIVE.format(
                question=question.text, approach=problems.probe_text(question.plan)
            ),
            "plan": question.plan,
            "truth": question.truth,
        }
        for question in problems.train_questions(0, 16 * GENERATIONS)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        {"loss_type": "grpo", "beta": 0.01},
        {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0},
        {"loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2, "beta": 0.0},
    ],
    ids=lambda loss: loss["loss_type"],
)
def test_reward_rises(loss, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the models are kept beside the examples' outputs
    config = GRPOConfig(
        output_dir=str(tmp_path),
        num_prompts_per_step=16,
        num_generations=8,
        per_device_train_batch_size=32,
        max_steps=GENERATIONS * loss.get("num_iterations", 1),
        max_completion_length=24,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        save_strategy="no",
        rollout=RolloutConfig(deadline_seconds=240),
        **loss,
    )
    trainer = GRPOTrainer(
        str(make_models(0) / "teacher"), answered_right, config, train_dataset=rows()
    )
    trainer.train()
    trainer.close()
    rewards = [row["reward"] for row in records(tmp_path) if "reward" in row]
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    print(f"{loss['loss_type']}: mean reward {first:.3f} -> {last:.3f}")
    assert last - first > 0.15
