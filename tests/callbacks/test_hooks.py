"""Which methods of callbacks and trainers are called, with what, and which are refused."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from grpo_mcore.callbacks import Callback, CallbackRunner
from grpo_mcore.errors import ConfigError


@dataclass
class Config:
    output_dir: str = "outputs"
    learning_rate: float = 1e-6


def run(runner: CallbackRunner, epochs: int = 2, steps: int = 2, result="result") -> None:
    """A run with an evaluation and a checkpoint after its last step."""
    runner.start(max_steps=epochs * steps, num_train_epochs=epochs)
    runner.train_begin()
    for epoch in range(epochs):
        runner.epoch_begin()
        for place in range(steps):
            runner.step_begin()
            runner.step_end({"reward": 0.5}, epoch + (place + 1) / steps)
            if runner.should("log"):
                runner.log({"reward": 0.5})
            if runner.should("evaluate"):
                runner.evaluate({"eval_reward": 0.25})
            if runner.should("save"):
                runner.save("checkpoint")
        runner.epoch_end(epoch, {"reward": 0.75})
    runner.train_end(result)


@pytest.mark.seed(67)
def test_nemo_callbacks_get_trainer_step_metrics_and_result():
    """The five hooks of NeMo RL's page on its trainers, with its arguments."""

    class MyCallback(Callback):
        def on_train_begin(self, trainer):
            self.seen = [("begin", trainer)]

        def on_step_begin(self, trainer, step):
            self.seen.append(("step", step))

        def on_step_end(self, trainer, step, metrics):
            self.seen.append((step, metrics["reward"], metrics["mean_reward"]))

        def on_epoch_end(self, trainer, epoch, metrics):
            self.seen.append(("epoch", epoch, metrics["reward"]))

        def on_train_end(self, trainer, result):
            self.seen.append(("end", result))

    trainer, callback = object(), MyCallback()
    run(CallbackRunner([callback], trainer, Config()))
    assert callback.seen == [
        ("begin", trainer),
        ("step", 1), (1, 0.5, 0.5), ("step", 2), (2, 0.5, 0.5), ("epoch", 0, 0.75),
        ("step", 3), (3, 0.5, 0.5), ("step", 4), (4, 0.5, 0.5), ("epoch", 1, 0.75),
        ("end", "result"),
    ]  # fmt: skip


@pytest.mark.seed(9, 47)
def test_transformers_callbacks_get_what_transformers_gives():
    seen = {}

    class MyCallback(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            seen["step"] = (args.learning_rate, state.global_step, model, optimizer)

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            seen["metrics"] = metrics

        def on_save(self, args, state, control, **kwargs):
            seen["save"] = set(kwargs)

    runner = CallbackRunner([MyCallback], object(), Config())
    runner.objects["model"] = "model"
    run(runner)
    assert seen["step"] == (1e-6, 4, "model", None)
    assert seen["metrics"] == {
        "eval_reward": 0.25, "eval_rewards/mean": 0.25, "eval_mean_reward": 0.25, "epoch": 2.0,
    }  # fmt: skip
    assert seen["save"] == {
        "model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader",
        "eval_dataloader",
    }  # fmt: skip


@pytest.mark.seed(78, 79, 80)
def test_methods_of_the_trainer_are_hooks():
    """The three hooks of ATLAS's page on its trainers; on_step_end logs through the trainer."""

    class Trainer:
        def __init__(self):
            self.runner = CallbackRunner([], self, Config())
            self.seen = []

        def log(self, logs):
            self.runner.log(logs)

        def on_epoch_begin(self):
            self.seen.append("epoch")

        def on_step_end(self, args, state, control, **kwargs):
            self.seen.append(state.global_step)
            self.log({"rewards/mean": torch.tensor([0.0, 1.0]).mean(), "kl_divergence": 0.1})

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            self.seen.append(metrics["eval_reward"])

    trainer = Trainer()
    run(trainer.runner)
    assert trainer.seen == ["epoch", 1, 2, "epoch", 3, 4, 0.25]
    records = [r for r in trainer.runner.state.log_history if r["step"] == 2]
    own = {"rewards/mean": 0.5, "kl_divergence": 0.1, "epoch": 1.0, "step": 2}
    assert records[0] == own
    assert records[1].items() >= {"reward": 0.5, "rewards/mean": 0.5}.items()  # still the step's
    assert len(records) == 2


@pytest.mark.seed(9, 47, 67, 78)
def test_all_kinds_in_one_list_are_called_in_order():
    calls = []

    class Ours(Callback):
        def on_step_end(self, trainer, step, metrics):
            calls.append("ours")

    class Theirs(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            calls.append("theirs")

    class LooksLikeOurs:
        def on_step_end(self, trainer, step, metrics, **kwargs):
            calls.append(f"like ours {step}")

    class LooksLikeTheirs:
        def on_step_end(self, args, state, control, **kwargs):
            calls.append(f"like theirs {state.global_step}")

    class Trainer:
        def on_step_end(self, args, state, control, **kwargs):
            calls.append("trainer")

    kinds = [Theirs, Ours(), LooksLikeTheirs, LooksLikeOurs(), Theirs()]
    run(CallbackRunner(kinds, Trainer(), Config()), epochs=1, steps=1)
    assert calls == ["trainer", "theirs", "ours", "like theirs 1", "like ours 1", "theirs"]


def test_a_callback_that_was_found_by_its_methods_needs_only_some():
    logged = []
    callback = SimpleNamespace(on_log=lambda args, state, control, logs, **_: logged.append(logs))
    run(CallbackRunner([callback], object(), Config()), epochs=1, steps=1)
    assert [record["epoch"] for record in logged] == [1.0, 1.0]


class NoHooks:
    def step_end(self):
        pass


class Mixed:
    def on_step_begin(self, trainer, step):
        pass

    def on_log(self, args, state, control, **kwargs):
        pass


class WrongResult(Callback):
    def on_train_end(self, trainer):
        pass


class WrongEvent(Callback):
    def on_evaluate(self, trainer, metrics):
        pass


class WrongDuck:
    def on_step_end(self, trainer):
        pass


class NoKeywords(TrainerCallback):
    def on_save(self, args, state, control):
        pass


class NoKeywordsDuck:
    def on_step_end(self, args, state, control):
        pass


class Substeps(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        pass


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (NoHooks, ["NoHooks", "on_step_end", "on_log"]),
        (Mixed, ["Mixed", "trainer in on_step_begin", "control, **kwargs) in on_log"]),
        (WrongResult, ["WrongResult.on_train_end(trainer)", "(trainer, result)"]),
        (WrongEvent, ["WrongEvent", "on_evaluate", "on_epoch_end"]),
        (WrongDuck, ["WrongDuck.on_step_end(trainer)", "(trainer, step, metrics)"]),
        (NoKeywords, ["NoKeywords.on_save(args, state, control)", "**kwargs"]),
        (NoKeywordsDuck, ["NoKeywordsDuck.on_step_end(args, state, control)", "**kwargs"]),
        (Substeps, ["Substeps", "on_substep_end", "on_step_end"]),
    ],
)
def test_what_could_never_be_called_is_refused_by_name(callback, said):
    for given in (callback, callback()):
        with pytest.raises(ConfigError) as refused:
            CallbackRunner([given], object(), Config())
        assert all(text in str(refused.value) for text in said), refused.value
    runner = CallbackRunner([], object(), Config())
    with pytest.raises(ConfigError):
        runner.add_callback(callback)


def test_a_method_of_the_trainer_that_could_not_be_called_is_refused():
    class MyTrainer:
        def on_epoch_begin(self, args, state, control, **kwargs):
            pass

    with pytest.raises(ConfigError, match=r"MyTrainer\.on_epoch_begin\(args.*has to take \(\)"):
        CallbackRunner([], MyTrainer(), Config())


@pytest.mark.seed(47)
def test_callbacks_come_and_go_as_in_transformers():
    class A(TrainerCallback):
        pass

    class B(Callback):
        pass

    first, second, ours = A(), A(), B()
    runner = CallbackRunner([first, second], object(), Config())
    runner.add_callback(ours)
    runner.remove_callback(A)
    assert runner.callbacks[1:] == [second, ours]
    assert runner.pop_callback(A) is second
    assert runner.pop_callback(A) is None
    runner.remove_callback(A)
    with pytest.raises(ValueError, match="no callback"):
        runner.remove_callback(first)
    assert runner.pop_callback(ours) is ours


def test_a_callback_may_remove_itself():
    calls = []

    class Once(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            calls.append(state.global_step)
            runner.remove_callback(self)

    class Always(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            calls.append(-state.global_step)

    runner = CallbackRunner([Once, Always], object(), Config())
    run(runner, epochs=1)
    assert calls == [1, -1, -2]


def test_other_events_can_be_raised():
    seen = []

    class MyCallback(TrainerCallback):
        def on_init_end(self, args, state, control, **kwargs):
            seen.append(args.output_dir)

        def on_predict(self, args, state, control, metrics, **kwargs):
            seen.append(metrics)

    runner = CallbackRunner([MyCallback, Callback], object(), Config())
    runner.event("on_init_end")
    runner.event("on_predict", metrics={"test_loss": 1.0})
    assert seen == ["outputs", {"test_loss": 1.0}]
