"""Trackers get every logged number and the configuration, on rank 0 only."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from transformers.integrations import TensorBoardCallback

from grpo_mcore.callbacks import CallbackRunner
from grpo_mcore.errors import ConfigError
from grpo_mcore.report import trackers
from grpo_mcore.report.trackers import tracker_callbacks


@dataclass
class Config:
    output_dir: str
    run_name: str = "mine"
    hub_token: str = "secret"


def report_run(name: str, directory, rank: int = 0) -> None:
    """Two logged steps and an evaluation of a run that reports to the tracker."""
    runner = CallbackRunner(tracker_callbacks(name), object(), Config(str(directory)))
    # Megatron's models have a configuration of their own, which trackers cannot read.
    runner.objects["model"] = SimpleNamespace(config=SimpleNamespace(hidden_size=8))
    runner.start(max_steps=2, num_train_epochs=1, rank=rank)
    runner.train_begin()
    for step in (1, 2):
        runner.step_begin()
        runner.step_end({}, step / 2)
        runner.log({"reward": step / 4, "completions/mean_length": 5.0})
    runner.evaluate({"eval_reward": 0.75})
    runner.train_end(None)


def test_tensorboard_files_hold_what_was_logged(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    report_run("tensorboard", tmp_path)
    board = EventAccumulator(str(tmp_path / "board")).Reload()

    def points(name):
        return [(point.step, point.value) for point in board.Scalars(name)]

    assert points("train/reward") == points("train/rewards/mean") == [(1, 0.25), (2, 0.5)]
    assert points("eval/reward") == [(2, 0.75)]
    (text,) = board.Tensors("args/text_summary")
    args = text.tensor_proto.string_val[0].decode()
    assert '"run_name": "mine"' in args and "secret" not in args


def test_tensorboard_writes_under_output_dir_and_on_rank_0_only(tmp_path):
    report_run("tensorboard", tmp_path / "one", rank=1)
    assert not (tmp_path / "one").exists()
    report_run("tensorboard", tmp_path / "zero")
    assert list((tmp_path / "zero" / "runs").glob("*/events.out.tfevents.*"))


def test_wandb_gets_what_was_logged(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    report_run("wandb", tmp_path)
    assert (wandb.run.name, wandb.config["output_dir"]) == ("mine", str(tmp_path))
    assert wandb.config["hub_token"] != "secret"
    last = dict(wandb.run.summary)
    wandb.finish()
    assert (last["train/rewards/mean"], last["eval/reward"], last["train/global_step"]) == (
        0.5, 0.75, 2,
    )  # fmt: skip
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_mlflow_gets_what_was_logged(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a store that needs no database
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    report_run("mlflow", tmp_path)
    mlflow.flush_async_logging()
    (run,) = mlflow.search_runs(output_format="list")
    assert run.data.params["run_name"] == "mine" and run.data.params["hub_token"] != "secret"
    points = mlflow.MlflowClient().get_metric_history(run.info.run_id, "reward")
    assert [(point.step, point.value) for point in points] == [(1, 0.25), (2, 0.5)]
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize("nothing", ["none", ["none"], [], None])
def test_nothing_may_be_tracked(nothing):
    assert tracker_callbacks(nothing) == []


@pytest.mark.parametrize("everything", ["all", ["all"]])
def test_all_means_those_installed(everything, monkeypatch):
    for name, (callback, _) in trackers.TRACKERS.items():
        available = name == "tensorboard"
        monkeypatch.setitem(trackers.TRACKERS, name, (callback, lambda ok=available: ok))
    (tracker,) = tracker_callbacks(everything)
    assert isinstance(tracker, TensorBoardCallback)


def test_a_tracker_that_is_unknown_or_missing_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"report_to=tensorbored: .*tensorboard, wandb, mlflow"):
        tracker_callbacks(["tensorboard", "tensorbored"])
    callback, _ = trackers.TRACKERS["wandb"]
    monkeypatch.setitem(trackers.TRACKERS, "wandb", (callback, lambda: False))
    with pytest.raises(ConfigError, match=r"report_to=wandb: .*pip install wandb"):
        tracker_callbacks("wandb")


def test_what_a_tracker_could_not_do_is_refused(monkeypatch):
    callback, _ = trackers.TRACKERS["wandb"]
    monkeypatch.setitem(trackers.TRACKERS, "wandb", (callback, lambda: True))
    monkeypatch.setenv("WANDB_LOG_MODEL", "checkpoint")
    with pytest.raises(ConfigError, match="WANDB_LOG_MODEL=checkpoint"):
        tracker_callbacks("wandb")


def test_a_tracker_is_removed_by_its_class_in_transformers(tmp_path):
    runner = CallbackRunner(tracker_callbacks("tensorboard"), object(), Config(str(tmp_path)))
    assert isinstance(runner.pop_callback(TensorBoardCallback), TensorBoardCallback)
