"""One trainer behind the names of TRL, ATLAS, NeMo RL and Unsloth. One process; runs are shared."""

import copy
import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from datasets import IterableDataset
from huggingface_hub import constants
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, StepLR
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from transformers.trainer_utils import TrainOutput

from grpo_mcore import (
    BaseTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
    TeacherGRPOTrainer,
    TrainingResult,
    api,
)
from grpo_mcore.callbacks import Callback
from grpo_mcore.config import ConfigError, RolloutConfig
from tests.conftest import name_of
from tests.end_to_end.conftest import ROOT, clean_environment, records
from tests.models.hub_stub import running_hub

pytestmark = pytest.mark.engine

ROWS = [{"prompt": f"tom has {number} cards.", "answer": str(number)} for number in range(8)]
PEAK = 1e-3


@pytest.fixture(scope="module")
def model(tiny_models) -> str:
    return str(tiny_models / "qwen2")


def by_tokens(completions, completion_ids, answer, trainer_state, log_metric, **_):
    """Random samples differ in it."""
    assert len(answer) == len(completions) == len(completion_ids)
    log_metric("step_of_state", trainer_state.global_step)
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def settings(directory: Path, **more) -> dict:
    return {
        "output_dir": str(directory),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": PEAK,
        "rollout": RolloutConfig(kv_cache_gib=0.05, deadline_seconds=120),
    } | more


def half_each_step() -> tuple[AdamW, LambdaLR]:
    optimizer = AdamW([torch.zeros(1)], lr=PEAK, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.1)
    return optimizer, LambdaLR(optimizer, lambda step: 0.5**step)


class NemoHooks(Callback):
    def __init__(self):
        self.seen = []

    def on_train_begin(self, trainer):
        self.seen.append(("train begins", trainer.current_step))

    def on_step_begin(self, trainer, step):
        self.seen.append(("step begins", step))

    def on_step_end(self, trainer, step, metrics):
        self.seen.append(("step ends", step, metrics["mean_reward"]))

    def on_epoch_end(self, trainer, epoch, metrics):
        self.seen.append(("epoch ends", epoch))

    def on_train_end(self, trainer, result):
        self.seen.append(("train ends", result.total_steps, result.metrics["loss"]))


class Watch(TrainerCallback):
    def __init__(self, stop_at: int | None = None):
        self.stop_at, self.seen, self.logs = stop_at, [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(("step", state.global_step))
        control.should_training_stop = state.global_step == self.stop_at

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.seen.append(("evaluate", state.global_step))

    def on_save(self, args, state, control, **kwargs):
        self.seen.append(("save", state.global_step))


class WithHooks(GRPOTrainer):
    """ATLAS's "Training Hooks", as its page has them."""

    epochs = 0

    def on_epoch_begin(self):
        self.epochs += 1

    def on_step_end(self, args, state, control, **kwargs):
        self.log({
            "mine/mean": self.current_rewards.mean(),
            "mine/kl": self.current_kl.mean(),
        })  # fmt: skip

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.evaluated = metrics


def words(prediction) -> dict[str, float]:
    assert prediction.label_ids == [row["answer"] for row in ROWS[:2] for _ in range(4)]
    return {"words": float(sum(len(text.split()) for text in prediction.predictions))}


@pytest.fixture(scope="module")
def first(model, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A run of three steps, TRL's way, and what was asked of its trainer after it."""
    directory = tmp_path_factory.mktemp("faces") / "first"
    found = SimpleNamespace(directory=directory, nemo=NemoHooks(), watch=Watch())
    args = GRPOConfig(
        **settings(
            directory, eval_steps=2, save_steps=1, report_to="tensorboard", num_iterations=1
        ),
        hub_model_id="org/mine",
    )
    before = copy.deepcopy(args)
    with patch.dict(os.environ, {"TENSORBOARD_LOGGING_DIR": str(directory / "board")}):
        trainer = WithHooks(
            model=model,
            reward_funcs=by_tokens,
            args=args,
            train_dataset=ROWS,
            eval_dataset=ROWS[:2],
            callbacks=[found.nemo, found.watch],
            optimizers=half_each_step(),
            compute_metrics=words,
        )
        found.output = trainer.train()
    found.log_history = copy.deepcopy(trainer.state.log_history)
    found.trainer, found.args_kept = trainer, args == before
    found.rewards, found.kl = trainer.current_rewards, trainer.current_kl
    found.evaluation = trainer.evaluate()
    found.other_evaluation = trainer.evaluate(ROWS[:2], metric_key_prefix="held_out")
    (directory / "mine.txt").write_text("keep")
    trainer.save_model()
    trainer.save_model(str(directory / "apart"))
    trainer.save_checkpoint(str(directory / "kept"))
    found.scored = trainer._generate_and_score(ROWS[:2])
    columns = {"prompt": [row["prompt"] for row in ROWS[:2]], "answer": ["0", "1"]}
    found.scored_columns = trainer._generate_and_score(columns)
    found.inputs = tensors_of(found.scored)
    found.loss = trainer.compute_loss(None, found.inputs)
    plain = {name: found.inputs[name] for name in NEEDED}
    found.plain_loss = trainer.compute_loss(None, plain)
    with pytest.MonkeyPatch.context() as environment, running_hub() as hub:
        environment.setenv("NO_PROXY", "127.0.0.1")
        environment.setattr(constants, "ENDPOINT", hub.url)
        found.commit = trainer.push_to_hub("Done", token="hf_secret")
        found.hub = hub
    trainer.close()
    yield found


NEEDED = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")


def tensors_of(scored) -> dict[str, torch.Tensor]:
    """TRL's inputs of the loss for samples, with made up log-probabilities of other policies."""
    _, completions, advantages = scored
    generator = torch.Generator().manual_seed(0)
    ended = (completions == 1).cumsum(1)  # the end token counts, what follows it does not
    mask = ((ended == 0) | ((ended == 1) & (completions == 1))).long()
    prompts = torch.randint(5, 500, (len(completions), 6), generator=generator)
    prompt_mask = torch.ones_like(prompts)
    prompt_mask[::2, :2] = 0
    noise = [0.3 * torch.randn(completions.shape, generator=generator) for _ in range(2)]
    return {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": completions,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": -6.3 + noise[0],
        "ref_per_token_logps": -6.3 + noise[1],
    }


@pytest.mark.seed(1, 4, 12, 39, 42, 52, 70, 74)
def test_train_returns_transformers_output(first):
    assert isinstance(first.output, TrainOutput)
    assert first.output.global_step == 3
    assert first.output.metrics.keys() >= {"reward", "kl", "train_loss", "eval_reward"}
    assert first.args_kept


@pytest.mark.seed(79)
def test_metrics_have_the_names_of_trl_and_of_atlas(first):
    steps = [r for r in records(first.directory) if "reward" in r]
    assert [record["step"] for record in steps] == [1, 2, 3]
    for record in steps:
        assert record["rewards/mean"] == record["mean_reward"] == record["reward"]
        assert record["rewards/by_tokens"] == record["rewards/by_tokens/mean"]
        assert record["rewards/by_tokens"] == pytest.approx(record["reward"])
        assert record["kl_divergence"] == record["kl"]
        assert record["completion_length"] == record["completions/mean_length"]
        assert record["step_of_state"] == record["step"] - 1
    assert len({record["reward"] for record in steps}) == 3
    assert steps[-1]["kl"] > 0


@pytest.mark.seed(10, 48)
def test_learning_rates_are_those_of_the_schedule_given(first):
    rates = [r["learning_rate"] for r in records(first.directory) if "learning_rate" in r]
    assert rates == pytest.approx([PEAK, PEAK / 2, PEAK / 4])
    args = first.trainer.args
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.8, 0.9, 1e-7)
    assert args.weight_decay == 0.1


@pytest.mark.seed(67)
def test_nemo_hooks_are_called_in_order(first):
    rewards = [r["reward"] for r in records(first.directory) if "reward" in r]
    steps = [
        event
        for step, reward in enumerate(rewards, 1)
        for event in (("step begins", step), ("step ends", step, reward))
    ]
    loss = first.nemo.seen[-1][2]
    assert first.nemo.seen == [
        ("train begins", 0), *steps, ("epoch ends", 0), ("train ends", 3, loss)
    ]  # fmt: skip


@pytest.mark.seed(9, 47)
def test_transformers_callbacks_see_steps_logs_evaluations_and_checkpoints(first):
    seen = first.watch.seen
    assert seen == [
        ("evaluate", 0), ("step", 1), ("save", 1), ("step", 2), ("evaluate", 2), ("save", 2),
        ("step", 3), ("evaluate", 3), ("save", 3), ("evaluate", 3), ("evaluate", 3),
    ]  # fmt: skip
    rewards = [r["reward"] for r in records(first.directory) if "reward" in r]
    assert [logs["reward"] for logs in first.watch.logs if "reward" in logs] == rewards


@pytest.mark.seed(78, 79, 80)
def test_methods_of_a_subclass_are_called_with_rewards_and_kl_to_log(first):
    assert first.trainer.epochs == 1  # of 8 steps, one a prompt
    logged = [r for r in records(first.directory) if "mine/mean" in r]
    steps = [r for r in records(first.directory) if "reward" in r]
    assert [r["mine/mean"] for r in logged] == pytest.approx([r["reward"] for r in steps])
    assert [r["mine/kl"] for r in logged] == pytest.approx([r["kl"] for r in steps])
    assert [r["step"] for r in logged] == [1, 2, 3]
    assert first.trainer.evaluated["held_out_reward"]
    assert first.rewards.shape == (4,) and first.kl.shape == (1,)


@pytest.mark.seed(6, 44, 76)
def test_evaluation_has_the_metrics_of_the_users_function(first):
    assert first.evaluation.keys() >= {"eval_reward", "eval_words"}
    assert first.evaluation["eval_words"] > 0
    others = {name.replace("held_out", "eval"): v for name, v in first.other_evaluation.items()}
    assert others.keys() == first.evaluation.keys()
    recorded = [r["eval_words"] for r in records(first.directory) if "eval_words" in r]
    assert len(recorded) >= 3


def test_a_tracker_has_what_was_logged(first):
    assert list((first.directory / "board").glob("events.*"))


@pytest.mark.seed(53)
def test_a_saved_model_is_one_for_transformers_and_other_files_stay(first, model):
    assert (first.directory / "mine.txt").read_text() == "keep"
    assert (first.directory / "metrics.jsonl").exists()
    tokens = torch.arange(5, 15)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(directory)(tokens).logits
        for directory in (first.directory, first.directory / "apart", first.directory / "final")
    ]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert not torch.allclose(
        logits[0], AutoModelForCausalLM.from_pretrained(model)(tokens).logits, atol=1e-3
    )
    vocabularies = [
        AutoTokenizer.from_pretrained(place).get_vocab() for place in (first.directory, model)
    ]
    assert vocabularies[0] == vocabularies[1]
    assert not list(first.directory.glob(".*"))


@pytest.mark.seed(13)
def test_samples_and_their_advantages(first):
    texts, completions, advantages = first.scored
    assert texts == [row["prompt"] for row in ROWS[:2] for _ in range(4)]
    assert completions.shape[0] == 8 and completions.shape[1] <= 8
    mask = first.inputs["completion_mask"]
    sums = [row[keep.bool()].sum() for row, keep in zip(completions, mask, strict=True)]
    rewards = (torch.stack(sums) % 7 / 7).view(2, 4)
    scaled = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(advantages.view(2, 4).float(), scaled, atol=1e-4, rtol=1e-4)
    for ours, others in zip(first.scored, first.scored_columns, strict=True):
        assert ours == others if isinstance(ours, list) else torch.equal(ours, others)


def log_probs(model: str | Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[completions, tokens] by transformers."""
    tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(
            tokens, attention_mask=mask, position_ids=positions
        ).logits
    length = inputs["completion_ids"].shape[1]
    found = logits.double().log_softmax(-1)[:, -length - 1 : -1]
    return found.gather(2, inputs["completion_ids"][..., None])[..., 0]


@pytest.mark.seed(14)
def test_the_loss_is_trls_of_the_log_probabilities_that_transformers_gives(first, model):
    inputs, beta, epsilon = first.inputs, 0.04, 0.2
    mask, advantages = inputs["completion_mask"], inputs["advantages"][:, None]
    own = log_probs(first.directory, inputs)

    def trl_loss(old, reference):
        ratio = (own - old).exp()
        clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
        term = -torch.min(ratio * advantages, clipped * advantages)
        shift = reference - own
        term = term + beta * ratio * (shift.exp() - shift - 1)
        return ((term * mask).sum() / mask.sum()).item()

    expected = trl_loss(inputs["old_per_token_logps"], inputs["ref_per_token_logps"])
    assert abs(expected) > 0.01
    assert first.loss.item() == pytest.approx(expected, abs=1e-5)
    alone = trl_loss(own, log_probs(model, inputs))
    assert first.plain_loss.item() == pytest.approx(alone, abs=1e-6)


@pytest.mark.seed(54)
def test_the_model_is_pushed_to_the_hub(first):
    assert first.hub.commits == [("org/mine", "main", "Done")]
    files = first.hub.files["org/mine", "main"]
    assert files.keys() >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert files["model.safetensors"] == (first.directory / "model.safetensors").read_bytes()
    assert first.commit.oid


@pytest.mark.seed(65)
def test_settings_and_step_can_be_read(first):
    assert first.trainer.config["learning_rate"] == PEAK
    assert first.trainer.config["model"]["path"].endswith("qwen2")
    assert first.trainer.current_step == 3


def rewards_of(directory: Path) -> dict[int, float]:
    return {r["step"]: r["reward"] for r in records(directory) if "reward" in r}


@pytest.mark.seed(61, 64)
def test_fit_goes_on_exactly_from_a_loaded_checkpoint(first, model, tmp_path):
    args = GRPOConfig(**settings(tmp_path / "run"))
    trainer = GRPOTrainer(model, by_tokens, args, optimizers=half_each_step())
    trainer.load_checkpoint(str(first.directory / "checkpoints" / "iter_0000001"))
    assert trainer.fit(ROWS).total_steps == 3
    whole = rewards_of(first.directory)
    assert rewards_of(tmp_path / "run") == {step: whole[step] for step in (2, 3)}
    weights = [
        place / "final" / "model.safetensors" for place in (tmp_path / "run", first.directory)
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    trainer.close()


@pytest.mark.seed(64, 65)
def test_checkpoints_are_saved_and_loaded_anywhere(model, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["answer"]} for row in ROWS]
    args = SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
    )
    trainer = SFTTrainer(model, dataclasses.replace(args, max_steps=1), train_dataset=rows)
    trainer.train()
    trainer.save_checkpoint(str(tmp_path / "kept"))
    trainer = SFTTrainer(model, args, train_dataset=rows)
    with pytest.raises(ConfigError, match=r"resume=.*nowhere: is neither auto, nor a checkpoint"):
        trainer.load_checkpoint(str(tmp_path / "nowhere"))
    trainer.load_checkpoint(str(tmp_path / "kept"))
    assert trainer.current_step == 1
    loss = trainer.train().metrics["loss"]
    assert trainer.current_step == 2
    trainer.load_checkpoint(str(tmp_path / "kept" / "iter_0000001"))
    result = trainer.fit(max_steps=3)
    steps = [r for r in records(tmp_path / "run") if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3] and result.total_steps == 3
    assert steps[1]["loss"] == loss
    trainer.close()
    with pytest.raises(ConfigError, match="holds an earlier run"):
        trainer.save_model()


@pytest.mark.seed(52)
def test_training_is_resumed_until_a_callback_stops_it(first, model, tmp_path):
    """In the folder of the interrupted run, wherever that is now."""
    directory = tmp_path / "moved"
    shutil.copytree(first.directory, directory)
    args = GRPOConfig(**settings(directory, max_steps=9))
    watch = Watch(stop_at=4)
    trainer = GRPOTrainer(model, by_tokens, args, ROWS, callbacks=[watch])
    assert trainer.train(resume_from_checkpoint=True).global_step == 4
    rewards = rewards_of(directory)
    assert list(rewards) == [1, 2, 3, 4]
    assert rewards | rewards_of(first.directory) == rewards
    assert [event for event in watch.seen if event[0] == "step"] == [("step", 4)]
    trainer.close()


@pytest.mark.seed(2, 3, 5, 6, 7, 8, 40, 41, 45, 46, 71, 73, 76)
def test_objects_serve_as_policy_reference_and_rewards(model, reward_model, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.01
    kept = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(model)
    judge = AutoModelForSequenceClassification.from_pretrained(reward_model)
    more = {"max_steps": 1, "reward_weights": [1.0, 2.0, 0.5], "optim": "adamw_8bit"}
    args = GRPOConfig(**settings(tmp_path / "run", **more))
    with pytest.warns(UserWarning, match="adamw_8bit"):
        trainer = GRPOTrainer(
            model=policy,
            ref_model=reference,
            reward_funcs=[by_tokens, str(reward_model)],
            reward_model=judge,
            reward_processing_classes=[None, None, AutoTokenizer.from_pretrained(reward_model)],
            config=args,
            tokenizer=tokenizer,
            train_dataset=IterableDataset.from_generator(lambda: iter(ROWS)),
            eval_dataset={"first": ROWS[:1], "last": ROWS[-1:]},
            num_generations=2,
        )
    output = trainer.train()
    (step,) = [r for r in records(tmp_path / "run") if "reward" in r]
    assert step["kl"] > 1e-3
    assert {"eval_first_reward", "eval_last_reward"} <= output.metrics.keys()
    names = ["by_tokens", "tiny-judge", "tiny-judge_2"]
    means = [step[f"rewards/{name}/mean"] for name in names]
    assert means[1] == pytest.approx(means[2])
    assert step["reward"] == pytest.approx(means[0] + 2 * means[1] + 0.5 * means[2], abs=1e-5)
    assert trainer.args.num_generations == 2
    assert len(trainer.current_rewards) == 4
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in policy.state_dict().items())
    assert not all(torch.equal(tensor, kept[name]) for name, tensor in trained.items())
    trainer.close()


def per_sample(prompt: str, response: str) -> float:
    return len(response) % 5 / 5


@pytest.mark.seed(57, 61, 66, 69)
def test_one_call_trains_and_tells_how_it_went(model, tmp_path):
    result = api.train(
        "grpo",
        model,
        ROWS,
        per_sample,
        num_prompts_per_step=2,
        num_generations_per_prompt=4,
        max_sequence_length=24,
        per_device_train_batch_size=4,
        num_train_epochs=0.5,
        output_dir=str(tmp_path / "run"),
        metric_for_best_model="reward",
        save_steps=1,
        rollout=RolloutConfig(kv_cache_gib=0.05),
        eval_dataset=ROWS[:1],
    )
    assert isinstance(result, TrainingResult)
    assert (result.total_steps, result.total_epochs) == (2, 0)
    assert result.metrics.keys() >= {"loss", "mean_reward", "eval_mean_reward", "train_runtime"}
    rewards = rewards_of(tmp_path / "run")
    best = max(rewards, key=rewards.get)
    assert Path(result.best_checkpoint_path).name == f"iter_{best:07d}"
    lengths = [r["completions/max_length"] for r in records(tmp_path / "run") if "reward" in r]
    assert max(lengths) <= 24
    BaseTrainer._open.close()


# What is checked before anything is loaded.


@pytest.mark.seed(68)
def test_trainers_have_names(model, tmp_path):
    assert api.list_algorithms() == ["dpo", "grpo", "sft", "teacher_grpo"]
    assert api.get_algorithm("grpo") is GRPOTrainer
    assert api.get_algorithm("teacher_grpo") is TeacherGRPOTrainer
    with pytest.raises(ConfigError, match="algorithm=ppo: choose one of dpo, grpo, sft, teach"):
        api.get_algorithm("ppo")


@pytest.mark.seed(57, 68)
def test_settings_and_arguments_are_told_apart_by_name(model, tmp_path):
    more = {"output_dir": str(tmp_path), "max_completion_length": 8}
    trainer = api.create_trainer(
        "grpo", model=model, learning_rate=1e-5, reward_fn=per_sample, train_dataset=ROWS, **more
    )
    args = trainer.args
    assert (args.num_prompts_per_step, args.num_generations, args.learning_rate) == (32, 16, 1e-5)
    assert (args.advantage_estimator, args.scale_rewards) == ("loo", "group")
    assert [spec.name for spec in trainer.rewards] == ["per_sample"]
    sft = api.create_trainer("sft", model=model, batch_size=4, output_dir=str(tmp_path))
    assert (sft.args.batch_size, sft.args.learning_rate) == (4, 2e-5)
    teacher = api.create_trainer(
        "teacher_grpo", model=model, student_model=model, num_generations=4, **more
    )
    assert teacher.args.student.path == model and teacher.args.num_generations == 4
    given = GRPOConfig(**settings(tmp_path))
    assert api.create_trainer("grpo", model, args=given).args.num_generations == 4
    for name, hint in (("learning_rat", "did you mean learning_rate?"), ("ref_modle", "ref_model")):
        with pytest.raises(ConfigError, match=f"{name}: unknown configuration key.*{hint}"):
            api.create_trainer("grpo", model=model, **{name: 1}, **more)


def test_naming_trainers_loads_nothing():
    code = (
        "import sys; import grpo_mcore.api as api; api.list_algorithms();"
        "assert not {'torch', 'transformers', 'megatron', 'vllm'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean_environment(), check=True)


@pytest.mark.seed(4, 7, 42, 45, 76)
@pytest.mark.parametrize(
    "one, other",
    [("args", "config"), ("processing_class", "tokenizer")],
)
def test_an_argument_is_given_under_one_name(model, tmp_path, one, other):
    values = {"args": GRPOConfig(**settings(tmp_path)), "processing_class": object()}
    with pytest.raises(TypeError, match=f"{one} and {other} are two names of one argument"):
        GRPOTrainer(model, per_sample, **{one: values[one], other: values[one]})


@pytest.mark.seed(10, 48, 75)
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"train_dataset": [{"text": "a"}]}, "has no column prompt; it has text"),
        ({"reward_funcs": 3}, "reward_funcs[0]=int: a reward is a function"),
        ({"reward_funcs": lambda a, b: 0}, "@reward(style"),
        ({"ref_model": "nowhere"}, "ref_model=nowhere: no directory"),
        ({"callbacks": [object()]}, "callbacks=object: has none of the methods"),
        ({"optimizers": (torch.optim.SGD([torch.zeros(1)]), None)}, "optimizers[0]=SGD: "),
        (
            {"optimizers": (None, StepLR(AdamW([torch.zeros(1)]), 1))},
            "optimizers[1]=StepLR: give a torch LambdaLR",
        ),
        ({"num_generations": 1}, "num_generations=1: must be at least 2"),
        (
            {"num_generations": 3, "gradient_accumulation_steps": 1},
            "num_generations=3: does not divide",
        ),
        ({"optim": "sgd"}, "optim=sgd: "),
        ({"degradation_penalty_multiplier": 3.0}, "is a setting of TeacherGRPOTrainer only"),
        ({"use_vllm": False}, "use_vllm=False: "),
        ({"push_to_hub": True}, "push_to_hub=True: needs hub_model_id"),
        ({"loss_type": "ppo"}, "loss_type=ppo: choose one of grpo, bnpo"),
        ({"max_prompt_length": 2}, "train_dataset: row 0 "),
        (
            {"metric_for_best_model": "eval_reward"},
            "metric_for_best_model=eval_reward: needs eval_dataset, there is none",
        ),
        ({"report_to": "nobody"}, "report_to=nobody: choose from"),
    ],
    ids=name_of,
)
def test_what_cannot_work_is_refused_by_name(model, tmp_path, arguments, message):
    given = {"reward_funcs": by_tokens, "train_dataset": ROWS}
    constructor = given.keys() | {"ref_model", "callbacks", "optimizers", "num_generations"}
    own = {name: value for name, value in arguments.items() if name in constructor}
    config = {name: value for name, value in arguments.items() if name not in constructor}
    with pytest.raises(ConfigError) as caught:
        GRPOTrainer(model, args=GRPOConfig(**settings(tmp_path, **config)), **given | own)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.seed(60)
def test_a_whole_configuration_of_nemo_is_strict(model):
    whole = {
        "policy": {"model_name": model, "dtensor_cfg": {"enabled": True}},
        "grpo": {"num_prompts_per_step": 4, "num_generations_per_prompt": 8},
    }
    trainer = GRPOTrainer(whole)
    assert (trainer.args.num_prompts_per_step, trainer.args.num_generations) == (4, 8)
    assert trainer.args.layout == "1x1x1"
    whole["grpo"]["num_prompt_per_step"] = 4
    with pytest.raises(ConfigError, match="did you mean grpo"):
        GRPOTrainer(whole)
    with pytest.raises(TypeError, match="args is another"):
        GRPOTrainer(whole, args=GRPOConfig())


@pytest.mark.seed(61)
@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "train_dataset=None: give a dataset"),
        ({"dataset": ROWS}, "reward_funcs=None: give at least one reward function"),
        ({"dataset": [], "reward_fn": per_sample}, "train_dataset: the dataset is empty"),
    ],
    ids=["nothing", "no reward", "no rows"],
)
def test_fit_wants_data_and_a_reward(model, tmp_path, given, message):
    trainer = GRPOTrainer.from_pretrained(model, output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        trainer.fit(**given)
    assert not list(tmp_path.iterdir())


def test_what_needs_more_than_there_is_says_so(model, tmp_path):
    trainer = GRPOTrainer(model, by_tokens, GRPOConfig(**settings(tmp_path)), ROWS)
    with pytest.raises(ConfigError, match="hub_model_id=None"):
        trainer.push_to_hub()
    with pytest.raises(ConfigError, match="resume_from_checkpoint=True: there is no checkpoint"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("key, value", [("stop", ["."]), ("structured_outputs", {"regex": "a"})])
def test_turns_are_the_models_own_to_end(model, tmp_path, key, value):
    """Tools and environments read them."""
    args = GRPOConfig(
        **settings(tmp_path, **{key: value}), vllm_importance_sampling_correction=False
    )

    def double(number: int) -> int:
        """Doubles.

        Args:
            number: any.
        """
        return 2 * number

    with pytest.raises(ConfigError, match=rf"^{key}=.*: tools and environments need turns"):
        GRPOTrainer(model, by_tokens, args, ROWS, tools=[double]).train()
