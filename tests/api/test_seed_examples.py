"""The code examples of the five documents run as they stand.

Replaced in them, and asserted to have been there, are only

    what                                       by
    import paths                               grpo_mcore's
    models, at the hub                         a random model of two layers
    datasets, at the hub                       a few rows in a file
    max_steps of 500, 1000 and 5000            2, as many steps of a random model show no more
    "..." for a dataset                        the path of that file

Where an example uses a name that its page does not define (`model`, `dataset`, `my_fn`), the test
defines it. Each runs in a folder of its own, which its output paths are relative to.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from grpo_mcore import GRPOConfig, GRPOTrainer, TeacherGRPOTrainer, TrainingResult
from grpo_mcore.trainers.base import BaseTrainer
from tests.conftest import write_family_model
from tests.end_to_end.conftest import records, run_command, torchrun

pytestmark = [pytest.mark.engine, pytest.mark.cores(2)]

ATLAS_TEACHING = """
from trainers import TeacherGRPOTrainer, AdaptiveTeachingReward
from trainers.grpo_config import GRPOConfig

# Configure training
config = GRPOConfig(
    output_dir="results/adaptive_teacher",
    num_train_epochs=3,
    per_device_train_batch_size=4,
    num_generations=8,
    max_prompt_length=512,
    max_completion_length=1024,
    max_probe_tokens=50,
    temperature=0.7,
    beta=0.04,
    degradation_penalty_multiplier=2.0,
    efficiency_weight=1.0
)

# Initialize reward
reward_func = AdaptiveTeachingReward(
    degradation_penalty_multiplier=2.0,
    efficiency_weight=1.0
)

# Create trainer
trainer = TeacherGRPOTrainer(
    model="Qwen/Qwen2.5-7B-Instruct",
    student_model="Qwen/Qwen2.5-1.5B-Instruct",
    reward_funcs=[reward_func],
    args=config,
    train_dataset=dataset,
)

# Train
trainer.train()
"""

ATLAS_PROBE = """
result = trainer.diagnostic_probe("Solve: 2x + 5 = 11")
if result.capability_level < 0.3:
    print("Student needs significant help")
"""

ATLAS_GUIDANCE = """
diagnostic = trainer.diagnostic_probe("Solve quadratic equation")
guidance = trainer.generate_guidance(
    "Solve: x² - 5x + 6 = 0",
    diagnostic,
    max_tokens=150
)
print(f"Teaching guidance: {guidance}")
"""

ATLAS_REWARD = '''
def custom_teaching_reward(prompts, completions, **kwargs):
    """
    Custom reward function following the expected interface.
    """
    rewards = []
    for prompt, completion in zip(prompts, completions):
        # Custom logic here
        reward = compute_custom_reward(prompt, completion)
        rewards.append(reward)
    return rewards

trainer = GRPOTrainer(
    model=model,
    reward_funcs=[custom_teaching_reward],
    args=config,
)
'''

ATLAS_HOOKS = '''
class Hooked(GRPOTrainer):
    def on_epoch_begin(self):
        """Called at the beginning of each epoch"""
        pass

    def on_step_end(self, args, state, control, **kwargs):
        """Called at the end of each training step"""
        # Log custom metrics
        self.log({
            "rewards/mean": self.current_rewards.mean(),
            "kl_divergence": self.current_kl.mean()
        })

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Called after evaluation"""
        # Custom evaluation logic
        pass
'''

TRL = """
from datasets import load_dataset
from trl import GRPOTrainer
from trl.rewards import accuracy_reward

dataset = load_dataset("trl-lib/DeepMath-103K", split="train")

trainer = GRPOTrainer(
    model="Qwen/Qwen2-0.5B-Instruct",
    reward_funcs=accuracy_reward,
    train_dataset=dataset,
)
trainer.train()
"""

NEMO_GRPO = """
from nemo_rl import GRPOTrainer

# Initialize from pretrained
trainer = GRPOTrainer.from_pretrained(
    "Qwen/Qwen2.5-1.5B",
    num_prompts_per_step=32,
    num_generations_per_prompt=16,
    learning_rate=1e-6,
)

# Define reward function
def reward_fn(prompt: str, response: str) -> float:
    return 1.0 if "correct" in response else 0.0

# Train
result = trainer.fit(
    dataset="nvidia/OpenMathInstruct-2",
    reward_fn=reward_fn,
    max_steps=1000,
)

print(f"Training completed: {result.metrics}")
"""

NEMO_SFT = """
from nemo_rl import SFTTrainer

# Initialize
trainer = SFTTrainer.from_pretrained(
    "Qwen/Qwen2.5-1.5B",
    batch_size=16,
    learning_rate=2e-5,
)

# Train (no reward function needed)
result = trainer.fit(
    dataset="nvidia/OpenMathInstruct-2",
    max_steps=5000,
)
"""

NEMO_DPO = """
from nemo_rl import DPOTrainer

# Initialize
trainer = DPOTrainer.from_pretrained(
    "Qwen/Qwen2.5-1.5B",
    batch_size=16,
    beta=0.1,
)

# Train with preference data
result = trainer.fit(
    dataset="nvidia/HelpSteer2",  # Preference dataset
    max_steps=1000,
)
"""

NEMO_RESULT = """
result = trainer.fit(dataset="...", reward_fn=my_fn)

# Access metrics
print(f"Loss: {result.metrics['loss']}")
print(f"Reward: {result.metrics.get('mean_reward', 'N/A')}")

# Use checkpoint
print(f"Best checkpoint: {result.best_checkpoint_path}")
"""

NEMO_CALLBACK = """
from nemo_rl.trainers.callbacks import Callback

class MyCallback(Callback):
    def on_train_begin(self, trainer):
        print("Training started")
    
    def on_step_begin(self, trainer, step):
        pass
    
    def on_step_end(self, trainer, step, metrics):
        if step % 100 == 0:
            print(f"Step {step}: {metrics}")
    
    def on_epoch_end(self, trainer, epoch, metrics):
        print(f"Epoch {epoch} completed")
    
    def on_train_end(self, trainer, result):
        print(f"Training finished: {result.metrics}")

# Use callback
trainer.fit(
    dataset="...",
    reward_fn=my_fn,
    callbacks=[MyCallback()],
)
"""

NEMO_WHOLE = """
from nemo_rl import GRPOTrainer

# Create trainer with full config
config = {
    "policy": {
        "model_name": "Qwen/Qwen2.5-1.5B",
        "learning_rate": 1e-6,
        "dtensor_cfg": {
            "enabled": True,
            "tensor_parallel_size": 2,
        },
    },
    "grpo": {
        "num_prompts_per_step": 64,
        "num_generations_per_prompt": 8,
    },
}

trainer = GRPOTrainer(config)
trainer.fit(dataset="...", reward_fn=my_fn)
"""

NEMO_API = """
from nemo_rl.api import create_trainer, list_algorithms, get_algorithm

# List available algorithms
print(list_algorithms())  # ['dpo', 'grpo', 'sft']

# Get trainer class
GRPOCls = get_algorithm("grpo")

# Create trainer dynamically
trainer = create_trainer(
    "grpo",
    model="Qwen/Qwen2.5-1.5B",
    learning_rate=1e-6,
)
"""

UNSLOTH = """
from trl import GRPOTrainer, GRPOConfig

# Define reward function (example for math)
def reward_fn(responses, ground_truths):
    rewards = []
    for resp, gt in zip(responses, ground_truths):
        # Check if answer matches
        rewards.append(1.0 if gt in resp else 0.0)
    return rewards

# Configure GRPO training
args = GRPOConfig(
    output_dir = "grpo_outputs",
    per_device_train_batch_size = 1,
    gradient_accumulation_steps = 8,
    learning_rate = 1e-5,
    max_steps = 500,
    num_generations = 4,  # Generate 4 responses per prompt
    optim = "adamw_8bit",
)

# Create trainer
trainer = GRPOTrainer(
    model = model,
    args = args,
    train_dataset = dataset,
    tokenizer = tokenizer,
    reward_fn = reward_fn,
)

trainer.train()
"""

CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A random model that has room for the examples' lengths, but mostly ends after a few tokens:
    two thirds of its vocabulary end a completion."""
    directory = tmp_path_factory.mktemp("examples") / "Qwen"
    write_family_model(directory, "Qwen2Config", max_position_embeddings=4096)
    ends = {"eos_token_id": [token for token in range(577) if token % 3]}
    (directory / "generation_config.json").write_text(json.dumps(ends))
    return str(directory)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    with patch.dict(os.environ):
        yield tmp_path
        if BaseTrainer._open:
            BaseTrainer._open.close()


def rows_in(folder: Path, rows: list[dict]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


PROMPT = [{"role": "user", "content": "tom has 14 cards."}]


def with_template(model: str, folder: Path) -> Path:
    """A copy of the model whose tokenizer has a chat template."""
    directory = folder / "with_template"
    shutil.copytree(model, directory)
    (directory / "chat_template.jinja").write_text(CHAT)
    return directory


def problems(count: int) -> list[dict]:
    return [{"problem": f"tom has {n} cards.", "answer": str(n)} for n in range(count)]


def replaced(code: str, *replacements: tuple[str, str]) -> str:
    for old, new in replacements:
        assert old in code, old
        code = code.replace(old, new)
    return code


def run(code: str, *replacements: tuple[str, str], **defined) -> dict:
    """The names an example leaves behind, of which `defined` were there before."""
    exec(compile(replaced(code, *replacements), "example", "exec"), defined)
    return defined


def steps_in(directory: str) -> list[dict]:
    return [r for r in records(Path(directory)) if "loss" in r]


@pytest.mark.seed(15, 16, 29, 36, 38, 81, 82, 84)
def test_atlas_adaptive_teaching_and_diagnosis(model, capsys):
    rows = [{"prompt": "tom has 14 cards.", "ground_truth": "14"}]
    found = run(
        ATLAS_TEACHING,
        ("from trainers import", "from grpo_mcore import"),
        ("from trainers.grpo_config import", "from grpo_mcore import"),
        ("Qwen/Qwen2.5-7B-Instruct", model),
        ("Qwen/Qwen2.5-1.5B-Instruct", model),
        dataset=rows,
    )
    trainer = found["trainer"]
    assert isinstance(trainer, TeacherGRPOTrainer) and isinstance(trainer, GRPOTrainer)
    assert trainer.args.max_probe_tokens == trainer.max_probe_tokens == 50
    steps = steps_in("results/adaptive_teacher")
    assert len(steps) == 3  # epochs of one question
    assert {"kl", "baseline_accuracy", "teaching_length_mean"} <= steps[0].keys()
    assert "rewards/AdaptiveTeachingReward/mean" in steps[0]
    result = run(ATLAS_PROBE, trainer=trainer)["result"]
    needs_help = "Student needs significant help" in capsys.readouterr().out
    assert needs_help == (result.capability_level < 0.3)
    found = run(ATLAS_GUIDANCE, trainer=trainer)
    assert f"Teaching guidance: {found['guidance']}" in capsys.readouterr().out


@pytest.mark.seed(1, 3, 37, 38)
def test_atlas_reward_of_ones_own(model):
    found = run(
        ATLAS_REWARD,
        GRPOTrainer=GRPOTrainer,
        model=model,
        config=GRPOConfig(),
        compute_custom_reward=lambda prompt, completion: float(len(completion)),
    )
    (reward,) = found["trainer"].reward_sources
    assert reward(["a"], ["bc"]) == [2.0]


class Counter(TrainerCallback):
    steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


@pytest.mark.slow
@pytest.mark.seed(76, 77, 78, 79, 80)
def test_atlas_hooks_in_the_constructor_of_the_overview(model, reward_model):
    trainer_class = run(ATLAS_HOOKS, GRPOTrainer=GRPOTrainer)["Hooked"]
    counter = Counter()
    trainer = trainer_class(
        config=GRPOConfig(num_generations=4, max_completion_length=16, max_steps=2),
        model=AutoModelForCausalLM.from_pretrained(model),
        ref_model=AutoModelForCausalLM.from_pretrained(model),
        tokenizer=AutoTokenizer.from_pretrained(model),
        train_dataset=problems(4),
        eval_dataset=problems(1),
        reward_model=str(reward_model),
        compute_metrics=lambda prediction: {"count": float(len(prediction.predictions))},
        callbacks=[counter],
        optimizers=(torch.optim.AdamW([torch.zeros(1)], lr=1e-3), None),
    )
    trainer.train()
    assert counter.steps == 2
    logged = [r for r in records(Path("outputs")) if "rewards/mean" in r]
    assert sum("loss" not in r for r in logged) == 2
    assert trainer.evaluate()["eval_count"] == 4.0


@pytest.mark.seed(39, 40, 41, 42, 43, 55)
def test_trl(model, folder):
    directory = with_template(model, folder)
    rows = rows_in(folder, [{"prompt": PROMPT, "solution": "$14$"}])
    found = run(
        TRL,
        ("from trl import", "from grpo_mcore import"),
        ("from trl.rewards import", "from grpo_mcore.rewards import"),
        ('"trl-lib/DeepMath-103K"', f'"json", data_files="{rows}"'),
        ("Qwen/Qwen2-0.5B-Instruct", str(directory)),
    )
    steps = steps_in("outputs")
    assert len(steps) == 3  # epochs of one prompt
    assert steps[0]["rewards/accuracy_reward/mean"] == 0
    assert found["trainer"].rewards[0].name == "accuracy_reward"


@pytest.mark.seed(56, 57, 58, 59, 61, 66)
def test_nemo_grpo(model, folder, capsys):
    found = run(
        NEMO_GRPO,
        ("nemo_rl", "grpo_mcore"),
        ("Qwen/Qwen2.5-1.5B", model),
        ("nvidia/OpenMathInstruct-2", rows_in(folder, problems(40))),
        ("max_steps=1000", "max_steps=2"),
    )
    assert isinstance(found["result"], TrainingResult)
    assert (found["result"].total_steps, found["result"].total_epochs) == (2, 1)
    assert "Training completed: {'loss': " in capsys.readouterr().out
    assert len(found["trainer"].current_rewards) == 32 * 16


@pytest.mark.seed(62, 66)
def test_nemo_sft(model, folder):
    rows = [{"prompt": row["problem"], "completion": row["answer"]} for row in problems(20)]
    found = run(
        NEMO_SFT,
        ("nemo_rl", "grpo_mcore"),
        ("Qwen/Qwen2.5-1.5B", model),
        ("nvidia/OpenMathInstruct-2", rows_in(folder, rows)),
        ("max_steps=5000", "max_steps=2"),
    )
    assert found["result"].total_steps == 2 and found["result"].metrics["loss"] > 0


@pytest.mark.seed(63, 66)
def test_nemo_dpo(model, folder):
    rows = [{"prompt": r["problem"], "chosen": r["answer"], "rejected": "x"} for r in problems(20)]
    found = run(
        NEMO_DPO,
        ("nemo_rl", "grpo_mcore"),
        ("Qwen/Qwen2.5-1.5B", model),
        ("nvidia/HelpSteer2", rows_in(folder, rows)),
        ("max_steps=1000", "max_steps=2"),
    )
    assert found["result"].total_steps == 2 and "rewards/margins" in found["result"].metrics


def length(prompt: str, response: str) -> float:
    return float(len(response))


def trainer_by_name(model: str) -> dict:
    return run(NEMO_API, ("nemo_rl.api", "grpo_mcore.api"), ("Qwen/Qwen2.5-1.5B", model))


@pytest.mark.slow
@pytest.mark.seed(64, 67, 68)
def test_nemo_trainers_by_name_and_a_callback(model, folder, capsys):
    found = trainer_by_name(model)
    assert found["GRPOCls"] is GRPOTrainer and type(found["trainer"]) is GRPOTrainer
    run(
        NEMO_CALLBACK,
        ("nemo_rl.trainers.callbacks", "grpo_mcore.callbacks"),
        ('"..."', repr(rows_in(folder, problems(32)))),
        trainer=found["trainer"],
        my_fn=length,
    )
    said = capsys.readouterr().out
    assert "['dpo', 'grpo', 'sft', 'teacher_grpo']" in said
    kept = [line for line in said.splitlines() if line.startswith(("Training ", "Epoch "))]
    assert kept[:4] == ["Training started", *(f"Epoch {n} completed" for n in range(3))]
    assert kept[4].startswith("Training finished: {'loss': ")


@pytest.mark.slow
@pytest.mark.seed(66)
def test_nemo_result(model, folder, capsys):
    found = run(
        NEMO_RESULT,
        ('"..."', repr(rows_in(folder, problems(32)))),
        trainer=trainer_by_name(model)["trainer"],
        my_fn=length,
    )
    said = capsys.readouterr().out
    assert f"Loss: {found['result'].metrics['loss']}\n" in said
    assert f"Reward: {found['result'].metrics['mean_reward']}\n" in said
    assert f"Best checkpoint: {found['result'].best_checkpoint_path}\n" in said


@pytest.mark.slow
@pytest.mark.seed(56, 60)
def test_nemo_whole_configuration_on_two_processes(model, folder):
    code = replaced(
        NEMO_WHOLE,
        ("nemo_rl", "grpo_mcore"),
        ("Qwen/Qwen2.5-1.5B", model),
        ('"..."', repr(rows_in(folder, problems(64)))),
    )
    script = folder / "script.py"
    script.write_text(
        f"import os\nos.chdir({str(folder)!r})\nmy_fn = lambda prompt, response: 1.0\n{code}"
    )
    output = run_command(torchrun(2, script))
    assert "layout: 2x1x1 (TPxPPxDP)" in output
    assert len(steps_in("outputs")) == 3


@pytest.mark.seed(70, 71, 72, 74, 75)
def test_unsloth(model):
    with pytest.warns(UserWarning, match="adamw_8bit"):
        found = run(
            UNSLOTH,
            ("from trl import", "from grpo_mcore import"),
            ("max_steps = 500", "max_steps = 2"),
            model=AutoModelForCausalLM.from_pretrained(model),
            tokenizer=AutoTokenizer.from_pretrained(model),
            dataset=[{"prompt": "tom has 14 cards.", "answer": "1"}] * 4,
        )
    steps = steps_in("grpo_outputs")
    assert len(steps) == 2
    assert len(found["trainer"].current_rewards) == 8  # two groups of four
    assert found["trainer"].args.learning_rate == 1e-5


def readme_code(mark: str) -> str:
    """The one Python example of the README that has `mark` in it."""
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if mark in code)
    return code


def test_readme(model, folder):
    directory = with_template(model, folder)
    rows = rows_in(folder, [{"prompt": PROMPT, "solution": "$14$"}])
    run(
        readme_code("accuracy_reward"),
        ("Qwen/Qwen3-0.6B", str(directory)),
        ('"trl-lib/DeepMath-103K"', f'"json", data_files="{rows}"'),
    )
    assert len(steps_in("outputs/math")) == 3  # epochs of one prompt
    assert (folder / "outputs/math/final/config.json").exists()


def test_readme_teaching(model, folder):
    rows = rows_in(folder, [{"question": "tom has 14 cards.", "answer": "14"}] * 16)
    run(
        readme_code("TeacherGRPOTrainer"),
        ("models/teacher", model),
        ("models/student", model),
        ("questions.jsonl", rows),
        ("max_steps=100", "max_steps=1"),
    )
    assert len(steps_in("outputs/mine")) == 1
