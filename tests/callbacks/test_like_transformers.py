"""Events, flags, state and records are those of a real transformers.Trainer on the same run."""

import copy
from dataclasses import dataclass

import pytest
import torch
import transformers
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from grpo_mcore.callbacks import CallbackRunner

STEPS_IN_EPOCH, EPOCHS = 3, 3
INSIDE_A_STEP = {
    "on_init_end", "on_prediction_step", "on_substep_end", "on_pre_optimizer_step",
    "on_optimizer_step",
}  # fmt: skip


class Recorder(TrainerCallback):
    """Writes down every event with all that a callback can see at it."""

    def __init__(self):
        self.seen = []


def _record(event: str):
    def hook(self, args, state, control, **kwargs):
        given = {name: copy.copy(kwargs[name]) for name in ("logs", "metrics") if name in kwargs}
        flags = {name: value for name, value in vars(control).items() if value}
        # Logging inside a callback must not swallow a step's own record, so the request for one
        # is not taken back by it as transformers does.
        flags.pop("should_log", None)
        known = {
            name: copy.copy(getattr(state, name))
            for name in (
                "global_step", "epoch", "max_steps", "num_train_epochs", "logging_steps",
                "eval_steps", "save_steps", "log_history", "best_metric", "best_global_step",
                "best_model_checkpoint", "is_world_process_zero", "is_local_process_zero",
            )
        }  # fmt: skip
        self.seen.append((event, given, flags, known, sorted(kwargs), args.output_dir))

    return hook


for _event in dir(TrainerCallback):
    if _event.startswith("on_") and _event not in INSIDE_A_STEP:
        setattr(Recorder, _event, _record(_event))


class AsksAndStops(TrainerCallback):
    """Asks for what is not due, forbids what is, and ends the run, each at another event."""

    def on_step_end(self, args, state, control, **kwargs):
        control = copy.copy(control)  # what is returned counts
        if state.global_step == 1:
            control.should_evaluate = control.should_save = True
        if state.global_step == 2:
            control.should_evaluate = False
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.global_step == 4 and "loss" in logs:
            control.should_training_stop = control.should_save = True


class EndsEpochs(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step == 2

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_evaluate = True


@dataclass
class Config:
    output_dir: str
    max_steps: int = -1
    num_train_epochs: int = EPOCHS
    logging_strategy: str = "steps"
    logging_steps: float = 1
    eval_strategy: str = "steps"
    eval_steps: float = 2
    save_strategy: str = "steps"
    save_steps: float = 2
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    load_best_model_at_end: bool = False
    logging_first_step: bool = False
    eval_delay: float = 0


@pytest.mark.seed(9, 47)
@pytest.mark.parametrize(
    ("settings", "callbacks"),
    [
        ({"max_steps": 4}, []),
        ({"max_steps": 5, "logging_steps": 2, "logging_first_step": True, "eval_delay": 3}, []),
        ({"eval_steps": 0.3, "save_steps": 0.5}, []),
        ({"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}, []),
        ({"max_steps": 6}, [AsksAndStops]),
        ({"eval_steps": 1}, [EndsEpochs]),
        (
            {
                "eval_steps": 1, "save_strategy": "best", "metric_for_best_model": "loss",
                "greater_is_better": True,
            },
            [EarlyStoppingCallback],
        ),
        (
            {"eval_steps": 1, "metric_for_best_model": "eval_loss", "greater_is_better": False},
            [lambda: EarlyStoppingCallback(early_stopping_patience=2)],
        ),
    ],
    ids=["steps", "rare", "shares", "epochs", "asked", "epoch stop", "best", "lower is better"],
)  # fmt: skip
def test_a_run_looks_the_same_to_a_callback(tmp_path, settings, callbacks):
    config = Config(str(tmp_path), **settings)
    theirs, ours = Recorder(), Recorder()
    history = run_transformers(config, [make() for make in callbacks] + [theirs])
    run_runner(config, [make() for make in callbacks] + [ours], history)
    assert [seen[0] for seen in ours.seen] == [seen[0] for seen in theirs.seen]
    assert ours.seen == theirs.seen


def run_transformers(config: Config, callbacks: list[TrainerCallback]) -> list[dict]:
    """Trains a tiny model. Returns the log history."""
    shape = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8)
    shape.bos_token_id = shape.eos_token_id = None
    torch.manual_seed(0)
    rows = [{"input_ids": [i, i + 1], "labels": [i, i + 1]} for i in range(STEPS_IN_EPOCH)]
    trainer = transformers.Trainer(
        transformers.GPT2LMHeadModel(shape),
        transformers.TrainingArguments(
            **vars(config),
            per_device_train_batch_size=1,
            learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
            save_only_model=True,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.state.log_history


def run_runner(config: Config, callbacks: list[TrainerCallback], history: list[dict]) -> None:
    """The loop of CallbackRunner's documentation, with the numbers that transformers measured."""
    records = [{n: v for n, v in r.items() if n not in ("step", "epoch")} for r in history]
    logs = iter([record for record in records if "loss" in record])
    evaluations = iter([record for record in records if "eval_loss" in record])
    last_logged = 0
    runner = CallbackRunner(callbacks, object(), config)

    def report():
        nonlocal last_logged
        step = runner.state.global_step
        if runner.should("log") and step > last_logged:
            runner.log(next(logs))
            last_logged = step
        if runner.should("evaluate"):
            runner.evaluate(next(evaluations))
        if runner.should("save"):
            checkpoint = f"{config.output_dir}/checkpoint-{step}"
            runner.save(checkpoint)

    max_steps, epochs = EPOCHS * STEPS_IN_EPOCH, EPOCHS
    if config.max_steps > 0:
        max_steps = config.max_steps
        epochs = -(-max_steps // STEPS_IN_EPOCH)
    runner.start(max_steps, epochs)
    runner.train_begin()
    for epoch in range(epochs):
        runner.epoch_begin()
        for place in range(STEPS_IN_EPOCH):
            runner.step_begin()
            runner.step_end({}, epoch=epoch + (place + 1) / STEPS_IN_EPOCH)
            report()
            if runner.should("epoch_stop") or runner.should("training_stop"):
                break
        runner.epoch_end(epoch, {})
        report()
        if runner.should("training_stop"):
            break
    runner.log(records[-1])
    runner.train_end(None)
