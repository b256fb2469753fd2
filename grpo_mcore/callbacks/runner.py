"""Calls every callback at every event of a run, and keeps transformers' state and control."""

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import DefaultFlowCallback, ExportableState

from grpo_mcore.callbacks.arguments import CallbackArguments
from grpo_mcore.callbacks.hooks import OBJECTS, Callback, TrainerHooks, hooks_of
from grpo_mcore.report.names import with_aliases
from grpo_mcore.report.result import TrainingResult

AnyCallback = Callback | TrainerCallback | type
PROGRESS = (
    "epoch", "global_step", "num_input_tokens_seen", "total_flos", "log_history",
    "best_metric", "best_global_step", "best_model_checkpoint",
)  # fmt: skip
"""What a resumed run takes over of the interrupted one's TrainerState; the rest is its own."""


class CallbackRunner:
    """The callbacks of a trainer, called in transformers' order: its default flow (which sets the
    flags that logging, evaluation and checkpoints are due), the trainer's own methods, then
    `callbacks` in their order. A loop that uses it reads

        runner.start(max_steps, num_train_epochs, role.rank, role.broadcast)
        runner.train_begin()
        for epoch in range(num_train_epochs):
            runner.epoch_begin()
            for ... in epoch:
                runner.step_begin()
                ... one step ...
                runner.step_end(metrics, epoch=1.25)
                if runner.should("log"):
                    runner.log(metrics)
                if runner.should("evaluate"):
                    runner.evaluate(eval_metrics)
                if runner.should("save"):
                    runner.save(checkpoint)
                if runner.should("epoch_stop") or runner.should("training_stop"):
                    break
            runner.epoch_end(epoch, epoch_metrics)
            ... log, evaluate and save as above ...
            if runner.should("training_stop"):
                break
        runner.log(metrics of the whole run)
        runner.train_end(result)

    As in transformers, all ranks run all callbacks with the same arguments, and
    `state.is_world_process_zero` tells them apart. Rank 0's flags alone count (`should`), so a
    callback that decides on one rank cannot part the ranks. Metrics come with their aliases.

    Attributes:
        args: the configuration as transformers' callbacks read it; taken anew by `start`.
        state, control: a transformers.TrainerState and TrainerControl.
        objects: what transformers' events are given by name beside them ("model",
            "processing_class", "optimizer", "lr_scheduler", "train_dataloader",
            "eval_dataloader"); None until the trainer sets them.
        current_rewards, current_kl: [samples] and [1] of the newest step, for the trainer's own
            methods to log; None where there are none.
    """

    def __init__(self, callbacks: Iterable[AnyCallback], trainer, config):
        """
        Args:
            callbacks: of both kinds, classes or instances, in any order.
            config: the trainer's, a dataclass.

        Raises:
            ConfigError: for a callback with a method that could never be called.
        """
        self.trainer, self.config = trainer, config
        self.args = CallbackArguments(config)
        self.state, self.control = TrainerState(), TrainerControl()
        self.objects = dict.fromkeys(OBJECTS)
        self.current_rewards: Tensor | None = None
        self.current_kl: Tensor | None = None
        self.agree: Callable = lambda value: value
        self.hooks = [hooks_of(DefaultFlowCallback), TrainerHooks(trainer)]
        for callback in callbacks:
            self.add_callback(callback)

    @property
    def callbacks(self) -> list:
        return [hooks.callback for hooks in self.hooks if not isinstance(hooks, TrainerHooks)]

    def add_callback(self, callback: AnyCallback) -> None:
        """
        Raises:
            ConfigError: if it has a method that could never be called, or none that could.
        """
        self.hooks.append(hooks_of(callback))

    def pop_callback(self, callback: AnyCallback):
        """Removes the first that is `callback`, or of that class. Returns it, or None."""
        for hooks in self.hooks:
            other = hooks.callback
            if isinstance(other, callback) if isinstance(callback, type) else other == callback:
                self.hooks.remove(hooks)
                return other
        return None

    def remove_callback(self, callback: AnyCallback) -> None:
        """Removes the first that is `callback`, or of that class.

        Raises:
            ValueError: as in transformers, for an instance that is not there.
        """
        if self.pop_callback(callback) is None and not isinstance(callback, type):
            raise ValueError(f"{callback} is no callback of this trainer")

    def start(
        self,
        max_steps: int,
        num_train_epochs: int,
        rank: int = 0,
        agree: Callable[[bool], bool] = lambda value: value,
    ) -> None:
        """Gives a run a new state, at step 0.

        Args:
            rank: of this process in its role.
            agree: collective; gives rank 0's value to every rank.
        """
        self.args, self.agree = CallbackArguments(self.config), agree
        is_first_here = int(os.environ.get("LOCAL_RANK", 0)) == 0
        self.state = TrainerState(
            max_steps=max_steps,
            num_train_epochs=num_train_epochs,
            is_world_process_zero=rank == 0,
            is_local_process_zero=rank == 0 or is_first_here,
        )
        for what in ("logging_steps", "eval_steps", "save_steps"):
            steps = getattr(self.args, what) or max_steps  # 0 or None: after the last one only
            setattr(self.state, what, steps if steps >= 1 else math.ceil(max_steps * steps))

    def event(self, name: str, *values, **details) -> None:
        """Calls `name` ("on_...") of every callback that has it.

        Args:
            values: what NeMo RL's hooks are given after the trainer.
            details: what transformers' are given by name beside `objects`.
        """
        for hooks in tuple(self.hooks):  # a callback may remove itself
            control = hooks.call(name, self, values, details)
            if control is not None:
                self.control = control

    def should(self, what: str) -> bool:
        """Rank 0's flag `should_{what}`: "log", "evaluate", "save", "epoch_stop" or
        "training_stop". Collective: every rank asks."""
        flag = f"should_{what}"
        decision = self.agree(getattr(self.control, flag))
        setattr(self.control, flag, decision)
        return decision

    def train_begin(self) -> None:
        self.control.should_training_stop = False
        self.event("on_train_begin")

    def epoch_begin(self) -> None:
        self.control.should_epoch_stop = False
        self.event("on_epoch_begin")

    def step_begin(self) -> None:
        self._clear_requests()
        self.event("on_step_begin", self.state.global_step + 1)

    def step_end(self, metrics: dict[str, float], epoch: float) -> None:
        """
        Args:
            epoch: epochs done, such as 1.25.
        """
        self.state.global_step += 1
        self.state.epoch = epoch
        self.event("on_step_end", self.state.global_step, with_aliases(metrics))

    def epoch_end(self, epoch: int, metrics: dict[str, float]) -> None:
        """
        Args:
            epoch: which one, counted from 0.
            metrics: the epoch's; for NeMo RL's hook.
        """
        self._clear_requests()
        self.event("on_epoch_end", epoch, with_aliases(metrics))

    def log(self, metrics: dict) -> dict:
        """Adds a record to `state.log_history` and calls on_log with it. Not collective, and it
        may be called from inside a callback, which takes nothing from the step's own record.

        Args:
            metrics: numbers, texts, or tensors of one element.

        Returns:
            The record that callbacks were given: with aliases and `epoch`.
        """
        numbers = {name: v.item() if hasattr(v, "item") else v for name, v in metrics.items()}
        record = with_aliases(numbers) | {"epoch": self.state.epoch}
        self.state.log_history.append(record | {"step": self.state.global_step})
        self.event("on_log", logs=record)
        return record

    def evaluate(self, metrics: dict) -> None:
        """Logs an evaluation, calls on_evaluate, then notes in `state` whether it is the best.

        Args:
            metrics: with the prefix "eval_".
        """
        record = self.log(metrics)
        self.control.should_evaluate = False
        self.event("on_evaluate", metrics=record)
        is_best = self._is_best(record)  # only now: early stopping compares with the best before
        if is_best:
            self.state.best_metric = record[self._metric_for_best_model()]
            self.state.best_global_step = self.state.global_step
        if self.args.save_strategy == "best":
            self.control.should_save = is_best

    def save(self, checkpoint: Path | str, step: int | None = None) -> None:
        """Tells that a checkpoint has been written.

        Args:
            step: whose it is, where it was written beside later steps; else this one's.
        """
        if step is None:
            step = self.state.global_step
            self.control.should_save = False
        if self.state.best_global_step == step:
            self.state.best_model_checkpoint = str(checkpoint)
        self.event("on_save")

    def train_end(self, result: TrainingResult) -> None:
        self.event("on_train_end", result)

    def state_dict(self) -> dict:
        """What a resumed run needs, as JSON: progress, and the state of every callback that is a
        transformers ExportableState, by its class's name."""
        exported: dict[str, list] = {}
        for callback in self.callbacks:
            if isinstance(callback, ExportableState):
                exported.setdefault(type(callback).__name__, []).append(callback.state())
        progress = {name: getattr(self.state, name) for name in PROGRESS}
        progress["log_history"] = list(self.state.log_history)
        return {"progress": progress, "callbacks": exported}

    def load_state_dict(self, saved: dict, checkpoint: Path | str) -> list[str]:
        """Goes on from what `state_dict` gave; call it after `start`. Callbacks stay the objects
        they are, and become what they were.

        Args:
            checkpoint: the one `saved` comes from.

        Returns:
            Lines for the user: saved callbacks that this run has not.
        """
        for name in PROGRESS:
            setattr(self.state, name, saved["progress"][name])
        state = self.state
        state.log_history = list(state.log_history)
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(checkpoint)
        elif state.best_model_checkpoint and not Path(state.best_model_checkpoint).is_dir():
            state.best_model_checkpoint = None
        waiting = {name: list(states) for name, states in saved["callbacks"].items()}
        for callback in self.callbacks:
            states = waiting.get(type(callback).__name__)
            if states and isinstance(callback, ExportableState):
                vars(callback).update(vars(type(callback).from_state(states.pop(0))))
        lost = [name for name, states in waiting.items() if states]
        return [
            f"{checkpoint} has the state of a {name}, which is not among callbacks" for name in lost
        ]

    def _clear_requests(self) -> None:
        control = self.control
        control.should_log = control.should_evaluate = control.should_save = False

    def _metric_for_best_model(self) -> str:
        name = self.args.metric_for_best_model or ""
        return name if name.startswith("eval_") else f"eval_{name}"

    def _is_best(self, metrics: dict) -> bool:
        value, best = metrics.get(self._metric_for_best_model()), self.state.best_metric
        if value is None or math.isnan(value):
            return False
        if best is None:
            return True
        return value > best if self.args.greater_is_better else value < best
