"""Decisions that all ranks share, the state of a run, and its way through a checkpoint."""

import json
import math
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from grpo_mcore.callbacks import CallbackRunner
from grpo_mcore.callbacks.arguments import CallbackArguments


@dataclass
class Config:
    output_dir: str = "outputs"
    eval_steps: int = 1
    save_steps: int = 0
    metric_for_best_model: str | None = "reward"


def ready_runner(callbacks=(), max_steps=4, rank=0, agree=lambda value: value, **settings):
    runner = CallbackRunner(callbacks, object(), Config(**settings))
    runner.start(max_steps, num_train_epochs=1, rank=rank, agree=agree)
    runner.train_begin()
    return runner


def take_steps(runner: CallbackRunner, evaluations=()) -> list[tuple]:
    """Steps until the runner stops them. Returns what was done: ("evaluate" or "save", step)."""
    done, evaluations = [], iter(evaluations)
    while not runner.should("training_stop"):
        runner.step_begin()
        runner.step_end({}, epoch=(runner.state.global_step + 1) / 4)
        step = runner.state.global_step
        if runner.should("evaluate"):
            runner.evaluate({"eval_reward": next(evaluations, 0.0)})
            done.append(("evaluate", step))
        if runner.should("save"):
            runner.save(f"checkpoint-{step}")
            done.append(("save", step))
    return done


def decide(step: int, flag: str):
    """A callback that sets the flag at the step."""

    def on_step_end(args, state, control, **kwargs):
        if state.global_step == step:
            setattr(control, flag, True)

    return SimpleNamespace(on_step_end=on_step_end)


@pytest.mark.parametrize("deciding_rank", [0, 1])
def test_every_rank_does_what_rank_0_decides(deciding_rank):
    """Rank 0's decisions are played back to rank 1 in the order in which it asks."""
    said = deque()

    def tell(value):
        said.append(value)
        return value

    done = {}
    for rank, agree in enumerate((tell, lambda value: said.popleft())):
        callbacks = [decide(2, "should_save"), decide(3, "should_training_stop")]
        mine = callbacks if rank == deciding_rank else []
        runner = ready_runner(mine, rank=rank, agree=agree, eval_steps=0)
        done[rank] = take_steps(runner), runner.state.global_step, vars(runner.control).copy()
    assert not said
    assert done[0] == done[1]
    assert done[0][0] == ([("save", 2)] if deciding_rank == 0 else [("evaluate", 4), ("save", 4)])


def test_ranks_are_told_apart_by_the_state(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    states = [ready_runner(rank=rank).state for rank in (0, 1)]
    assert [state.is_world_process_zero for state in states] == [True, False]
    assert [state.is_local_process_zero for state in states] == [True, False]
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert ready_runner(rank=8).state.is_local_process_zero


def test_zero_steps_mean_after_the_last_only():
    runner = ready_runner(eval_steps=0, save_steps=0)
    assert take_steps(runner) == [("evaluate", 4), ("save", 4)]
    assert take_steps(ready_runner(eval_steps=2, save_steps=3)) == [
        ("evaluate", 2), ("save", 3), ("evaluate", 4), ("save", 4),
    ]  # fmt: skip


def test_the_end_of_an_epoch_does_not_repeat_its_last_step():
    runner = ready_runner(max_steps=1)
    runner.step_begin()
    runner.step_end({}, 1.0)
    assert runner.should("log")
    runner.log({})
    runner.epoch_end(0, {})
    assert not runner.should("log")


def test_best_metric_and_its_checkpoint_are_noted():
    runner = ready_runner(save_steps=2)
    take_steps(runner, [0.1, 0.4, 0.3, math.nan])
    state = runner.state
    assert (state.best_metric, state.best_global_step) == (0.4, 2)
    assert state.best_model_checkpoint == "checkpoint-2"
    unranked = ready_runner(metric_for_best_model=None)
    take_steps(unranked, [0.1])
    assert unranked.state.best_metric is None and unranked.state.best_model_checkpoint is None


def test_a_checkpoint_may_be_written_beside_later_steps():
    runner = ready_runner()
    for _ in range(2):
        runner.step_begin()
        runner.step_end({}, 0.5)
        if runner.state.global_step == 1:
            runner.evaluate({"eval_reward": 1.0})
    runner.control.should_save = True
    runner.save("checkpoint-1", step=1)
    assert runner.state.best_model_checkpoint == "checkpoint-1"
    assert runner.should("save")  # step 2 has yet to get its own


def test_a_first_evaluation_that_is_no_number_is_not_the_best():
    runner = ready_runner()
    take_steps(runner, [math.nan, -1.0, math.nan])
    assert runner.state.best_metric == 0.0 and runner.state.best_global_step == 4


class Counter(TrainerCallback, ExportableState):
    def __init__(self, name):
        self.name, self.steps = name, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def state(self):
        return {"args": {"name": self.name}, "attributes": {"steps": self.steps}}


def test_a_resumed_run_goes_on_where_the_other_was(tmp_path):
    """Early stopping after two evaluations without progress counts over an interruption."""
    evaluations = [0.5, 0.9, 0.8, 0.7, 1.0]

    def callbacks():
        return [EarlyStoppingCallback(early_stopping_patience=2), Counter("a"), Counter("b")]

    whole = ready_runner(callbacks(), max_steps=9)
    take_steps(whole, evaluations)
    assert whole.state.global_step == 4

    first = ready_runner([*callbacks(), decide(3, "should_training_stop")], max_steps=9)
    take_steps(first, evaluations)
    first.callbacks[3].steps = 30
    saved = json.loads(json.dumps(first.state_dict()))

    resumed = callbacks()
    second = CallbackRunner(resumed, object(), Config())
    second.start(max_steps=9, num_train_epochs=1)
    assert second.load_state_dict(saved, tmp_path) == []
    second.train_begin()
    assert [callback.steps for callback in resumed[1:]] == [3, 30]
    assert second.callbacks[1:] == resumed
    take_steps(second, evaluations[3:])
    assert second.state == whole.state
    assert resumed[0].early_stopping_patience_counter == 2


def test_the_best_checkpoint_is_found_again_where_it_is_now(tmp_path):
    def restored(best_step, best_checkpoint):
        first = ready_runner()
        first.step_begin()
        first.step_end({}, 0.25)
        first.state.best_global_step = best_step
        first.state.best_model_checkpoint = best_checkpoint
        runner = ready_runner()
        runner.load_state_dict(first.state_dict(), tmp_path / "loaded")
        return runner.state.best_model_checkpoint

    # The state is saved before its own checkpoint is there to be named.
    assert restored(1, None) == str(tmp_path / "loaded")
    assert restored(0, str(tmp_path)) == str(tmp_path)
    assert restored(0, str(tmp_path / "gone")) is None


def test_a_saved_callback_that_is_missing_is_named(tmp_path):
    saved = ready_runner([Counter("a"), EarlyStoppingCallback()]).state_dict()
    runner = ready_runner([EarlyStoppingCallback()])
    (line,) = runner.load_state_dict(saved, tmp_path)
    assert "Counter" in line and str(tmp_path) in line


@dataclass
class Inner:
    path: str = "models/teacher"


@dataclass
class Settings:
    output_dir: str = "outputs"
    hub_token: str = "secret"
    run_name: str = "mine"
    model: Inner = field(default_factory=Inner)


def test_arguments_are_the_configuration_without_secrets():
    args = CallbackArguments(Settings())
    assert (args.run_name, args.model.path, args.load_best_model_at_end) == (
        "mine", "models/teacher", False,
    )  # fmt: skip
    told = json.loads(args.to_json_string())
    assert told["model"] == {"path": "models/teacher"} and told["run_name"] == "mine"
    assert "secret" not in args.to_json_string()
