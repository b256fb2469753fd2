"""The loop around a policy of one process: what it saves, keeps, and goes on from."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from transformers import TrainerCallback

from grpo_mcore import device
from grpo_mcore.config import ConfigError, ModelConfig, TeacherGRPOConfig
from grpo_mcore.errors import FilesError
from grpo_mcore.models.families import read_shape
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.groups import Role
from grpo_mcore.parallel.world import join
from grpo_mcore.rollout.engine import EngineError
from tests.checkpoint.resume_worker import batch, loss

device.prepare()

from grpo_mcore.callbacks import CallbackRunner  # noqa: E402
from grpo_mcore.checkpoint.run import CheckpointWriter  # noqa: E402
from grpo_mcore.checkpoint.start import choose_start  # noqa: E402
from grpo_mcore.steps.loop import Loop, Steps  # noqa: E402
from grpo_mcore.training.policy import Policy  # noqa: E402


@pytest.fixture(scope="module")
def role() -> Iterator[Role]:
    with join({"policy": Layout()}, "colocated", 60) as world:
        yield world.roles["policy"]


@pytest.fixture(scope="module")
def policy(role, tiny_models) -> Policy:
    model = ModelConfig(str(tiny_models / "llama"))
    shape = read_shape("teacher.path", model.path)
    return Policy(role, shape, model, TeacherGRPOConfig(teacher=model))


@pytest.fixture
def config(tiny_models, tmp_path) -> TeacherGRPOConfig:
    return TeacherGRPOConfig(
        teacher=ModelConfig(str(tiny_models / "llama")),
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        save_steps=1,
    )


def run(
    config: TeacherGRPOConfig,
    policy: Policy,
    rewards=(1.0, 2.0, 3.0, 4.0),
    accuracies: dict[int, float] | None = None,
    state=dict,
    callbacks=(),
    measured: str = "accuracy",
    evaluations: list[float | EngineError] | None = None,
) -> Loop:
    """Steps that measure `rewards`, and evaluations `accuracies` (step -> value), or `evaluations`
    one after the other."""
    start = choose_start(config, policy.role)
    loop = Loop(config, policy, start, {}, CallbackRunner(callbacks, None, config))
    steps = []

    class Measured(Steps):
        evaluates = bool(accuracies) or evaluations is not None

        def train_step(self, step: int) -> dict[str, float]:
            steps.append(step)
            losses = policy.compute_gradients(batch(step), loss)
            policy.step()
            tokens = 10.0 * (step + 1)
            return {"reward": rewards[step], "loss": losses["loss"], "num_tokens": tokens}

        def evaluate(self, datasets: dict | None = None) -> dict[str, float]:
            if evaluations is None:
                return {measured: accuracies[steps[-1] + 1 if steps else 0]}
            outcome = evaluations.pop(0)
            if isinstance(outcome, EngineError):
                raise outcome
            return {measured: outcome}

        def state(self) -> dict:
            return state()

    try:
        loop.run(Measured())
    finally:
        loop.close()
    return loop


def checkpoints(config: TeacherGRPOConfig) -> Path:
    return Path(config.output_dir) / "checkpoints"


def steps_kept(config: TeacherGRPOConfig) -> list[int]:
    return sorted(int(path.name[5:]) for path in checkpoints(config).glob("iter_*"))


def recorded(config: TeacherGRPOConfig, which: str) -> str:
    return (checkpoints(config) / f"{which}_checkpointed_iteration.txt").read_text()


def steps_recorded(config: TeacherGRPOConfig) -> list[int]:
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def alter(checkpoint: Path, name: str = "__0_0.distcp") -> None:
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / name).write_bytes(content)


def start_of(config: TeacherGRPOConfig, role: Role, **changes) -> str:
    """The step begun with and the lines for the user, or the refusal."""
    try:
        start = choose_start(dataclasses.replace(config, **changes), role)
    except ConfigError as error:
        return f"refused: {error}"
    return "\n".join([start.checkpoint.name if start.checkpoint else "anew", *start.notes])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_so_many_steps_and_the_last(config, policy, asynchronous):
    config.save_steps, config.async_save = 3, asynchronous
    run(config, policy)
    assert steps_kept(config) == [3, 4]
    assert recorded(config, "latest") == "4"
    assert {path.name for path in checkpoints(config).iterdir()} == {
        "iter_0000003", "iter_0000004", "latest_checkpointed_iteration.txt",
    }  # fmt: skip


@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_checkpoint_is_written_twice(config, policy, asynchronous, monkeypatch):
    """The last is due as the last, and at the end of the epoch."""
    saves, save = [], CheckpointWriter.save

    def counted(writer, step, *others):
        saves.append(step)
        save(writer, step, *others)

    monkeypatch.setattr(CheckpointWriter, "save", counted)
    config.save_strategy, config.async_save = "epoch", asynchronous
    run(config, policy)
    config.resume, config.max_steps = "auto", 5
    run(config, policy, rewards=[1.0] * 5)
    assert saves == steps_kept(config) == [4, 5]


def test_the_best_is_kept_beside_the_newest(config, policy):
    config.save_total_limit, config.metric_for_best_model = 2, "reward"
    run(config, policy, rewards=[1.0, 5.0, 3.0, float("nan")])
    assert steps_kept(config) == [2, 4]
    assert recorded(config, "best") == "2"
    config.output_dir += "_least"
    config.greater_is_better = False
    run(config, policy, rewards=[4.0, 1.0, 3.0, 2.0])
    assert steps_kept(config) == [2, 4]


def test_the_best_by_evaluation_counts_only_where_it_was_measured(config, policy):
    config.eval_steps, config.metric_for_best_model = 2, "eval_accuracy"
    run(config, policy, accuracies={0: 0.9, 2: 0.3, 4: 0.2})
    assert steps_kept(config) == [1, 2, 3, 4]
    assert recorded(config, "best") == "2"


def test_the_best_is_remembered(config, policy):
    config.metric_for_best_model, config.max_steps = "reward", 2
    run(config, policy, rewards=[5.0, 1.0])
    config.resume, config.max_steps, config.save_total_limit = "auto", 4, 1
    run(config, policy)
    assert recorded(config, "best") == "1"
    assert steps_kept(config) == [1, 4]
    config.max_steps = 6
    run(config, policy, rewards=[0.0] * 5 + [6.0])
    assert steps_kept(config) == [6]


def test_a_metric_that_is_not_measured_is_refused(config, policy):
    config.metric_for_best_model = "rewards"
    with pytest.raises(ConfigError) as refusal:
        run(config, policy)
    expected = (
        "metric_for_best_model=rewards: is not measured; choose one of loss, num_tokens, reward"
    )
    assert str(refusal.value) == expected


def test_what_is_saved_comes_back(config, policy):
    run(config, policy, state=lambda: {"asked": ["a", {"b": 1}]})
    saved = checkpoints(config) / "iter_0000004"
    assert yaml.safe_load((saved / "config.yaml").read_text()) == dataclasses.asdict(config)
    assert (saved / "hf" / "config.json").exists()
    config.resume, config.max_steps = "auto", 5
    loop = run(config, policy, rewards=[1.0] * 5)
    assert loop.done == 5
    assert loop.restored == {"asked": ["a", {"b": 1}], "tensors": {}}
    assert steps_recorded(config) == [1, 2, 3, 4, 5]


def test_an_earlier_run_is_neither_written_over_nor_mixed_in(config, policy, role, tmp_path):
    run(config, policy)
    assert "refused: output_dir=" in start_of(config, role)
    other = dataclasses.replace(config, output_dir=str(tmp_path / "other"))
    assert start_of(other, role) == "anew"
    run(other, policy)
    refusal = start_of(other, role, resume=str(checkpoints(config)))
    assert "holds an earlier run, of which" in refusal


@pytest.mark.seed(52)
def test_auto_takes_the_newest_valid_one_and_names_the_others(config, policy, role):
    assert "no checkpoint in" in start_of(config, role, resume="auto")
    run(config, policy)
    assert start_of(config, role, resume="auto").startswith("iter_0000004\ngoing on from")
    alter(checkpoints(config) / "iter_0000004")
    (checkpoints(config) / "iter_0000003" / "common.pt").unlink()
    lines = start_of(config, role, resume="auto").splitlines()
    assert lines[0] == "iter_0000002"
    assert lines[1].startswith("warning: ") and "iter_0000004 is passed over: __0_0" in lines[1]
    assert lines[2].endswith("iter_0000003 is passed over: common.pt is missing")
    for step in (1, 2):
        alter(checkpoints(config) / f"iter_000000{step}")
    refusal = start_of(config, role, resume="auto")
    assert "is whole" in refusal and "iter_0000004 is passed over: __0_0" in refusal


def test_a_converted_model_is_no_checkpoint_of_a_run(config, policy, role):
    run(config, policy)
    checkpoint = checkpoints(config) / "iter_0000004"
    entries = json.loads((checkpoint / "manifest.json").read_text())
    del entries["config.yaml"]
    (checkpoint / "manifest.json").write_text(json.dumps(entries))
    refusal = start_of(config, role, resume=str(checkpoint))
    assert "manifest.json lists no config.yaml, which a run's checkpoint has" in refusal


def test_from_the_beginning_where_auto_finds_nothing(config, policy):
    run(config, policy)
    shutil.rmtree(checkpoints(config))
    config.resume = "auto"
    run(config, policy)
    assert steps_recorded(config) == [1, 2, 3, 4]


@pytest.mark.seed(52)
def test_a_path_is_that_checkpoint_or_refused(config, policy, role, tmp_path):
    run(config, policy)
    whole = checkpoints(config)
    elsewhere = str(tmp_path / "elsewhere")
    for path, step in ((whole, 4), (whole / "iter_0000002", 2)):
        found = start_of(config, role, resume=str(path), output_dir=elsewhere)
        assert found.startswith(f"iter_000000{step}\n")
    for path in ("true", str(tmp_path)):
        refusal = start_of(config, role, resume=path)
        assert refusal.startswith(f"refused: resume={path}: is neither auto, nor a checkpoint")
    refusal = start_of(config, role, resume=str(whole / "iter_0000009"))
    assert refusal.endswith("is no whole checkpoint: there is no such folder")
    alter(whole / "iter_0000004")
    for path in (whole, whole / "iter_0000004"):
        refusal = start_of(config, role, resume=str(path))
        assert refusal.startswith(f"refused: resume={path}: ")
        assert "iter_0000004 is no whole checkpoint: __0_0.distcp was altered" in refusal


def test_what_the_checkpoint_does_not_allow_is_refused(config, policy, role, tiny_models):
    run(config, policy)
    config.resume = "auto"
    refusal = start_of(config, role, max_steps=3)
    assert refusal.startswith("refused: max_steps=3: ") and refusal.endswith("is at step 4")
    refusal = start_of(config, role, distributed_optimizer=True)
    assert refusal.endswith("was saved with distributed_optimizer=False")
    refusal = start_of(config, role, teacher=ModelConfig(config.teacher.path, dtype="bfloat16"))
    assert refusal.endswith("was saved with teacher.dtype=float32")
    refusal = start_of(config, role, teacher=ModelConfig(str(tiny_models / "qwen2")))
    assert "another model than the one in" in refusal


def test_going_back_sets_newer_checkpoints_aside(config, policy):
    config.metric_for_best_model = "reward"
    run(config, policy)
    config.resume = str(checkpoints(config) / "iter_0000002")
    config.max_steps, config.save_steps = 3, 0
    run(config, policy)
    left = {path.name.partition(".")[0] for path in checkpoints(config).glob("*.abandoned")}
    assert left == {"iter_0000003", "iter_0000004"}
    assert [s for s in (1, 2, 3, 4) if (checkpoints(config) / f"iter_000000{s}").exists()] == [
        1, 2, 3,
    ]  # fmt: skip
    assert recorded(config, "latest") == recorded(config, "best") == "3"
    assert steps_recorded(config) == [1, 2, 3]


def test_a_folder_that_cannot_be_written_is_named(config, policy):
    run(dataclasses.replace(config, max_steps=1), policy)
    config.resume, config.save_steps = "auto", 2
    shutil.move(checkpoints(config), f"{checkpoints(config)}_moved")
    checkpoints(config).write_text("a file")
    with pytest.raises(FilesError, match=r"checkpoints: the checkpoint of step 2 was not written"):
        run(config, policy)


def test_no_code_of_a_checkpoint_is_run(config, policy, tmp_path):
    """Not even where its manifest says that all is well."""
    from grpo_mcore.checkpoint import manifest

    run(config, policy)
    saved = checkpoints(config) / "iter_0000004"
    code = f"cos\nmkdir\n(S'{tmp_path / 'run_by_pickle'}'\ntR."
    (saved / ".metadata").write_text(code)
    entries = manifest.read_manifest(saved)
    manifest.write_manifest(saved, manifest.describe(saved, entries))
    config.resume = str(saved)
    with pytest.raises(FilesError, match=r"nothing of it was run"):
        run(config, policy)
    assert not (tmp_path / "run_by_pickle").exists()


def test_the_best_by_a_loss_is_the_least(config, policy):
    config.eval_steps, config.metric_for_best_model = 1, "eval_loss"
    losses = {0: 9.0, 1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0}
    run(config, policy, accuracies=losses, measured="loss")
    assert recorded(config, "best") == "2"


def lacks_evaluation(config: TeacherGRPOConfig, step: int) -> bool:
    state = checkpoints(config) / f"iter_{step:07d}" / "state.json"
    return json.loads(state.read_text())["lacks_evaluation"]


def test_an_evaluation_that_failed_is_made_up_for_once_and_may_be_the_best(config, policy):
    """That of the last step."""
    config.eval_steps, config.max_steps, config.save_steps = 1, 2, 2
    config.metric_for_best_model = "eval_accuracy"
    with pytest.raises(EngineError, match="step 2 is saved"):
        run(config, policy, evaluations=[0.1, 0.2, EngineError("no engine")])
    assert lacks_evaluation(config, 2)
    config.resume = "auto"
    with pytest.raises(EngineError, match="step 2 is saved"):
        run(config, policy, evaluations=[EngineError("no engine yet")])
    assert lacks_evaluation(config, 2)
    left = [0.3, 0.4]
    assert run(config, policy, evaluations=left).saves.best["value"] == 0.3
    assert not lacks_evaluation(config, 2)
    assert recorded(config, "best") == "2"
    run(config, policy, evaluations=left)
    assert left == [0.4]
    assert run(config, policy, evaluations=left).saves.best["value"] == 0.3


def test_a_step_that_was_saved_before_its_evaluation_failed(config, policy):
    """At the end of the epoch; its rewards are the best all the same."""
    config.eval_strategy, config.max_steps, config.metric_for_best_model = "epoch", 2, "reward"
    with pytest.raises(EngineError, match="step 2 is saved"):
        run(config, policy, evaluations=[0.1, 0.2, EngineError("no engine")])
    assert lacks_evaluation(config, 2)
    config.resume = "auto"
    run(config, policy, evaluations=[0.3])
    assert not lacks_evaluation(config, 2)
    assert recorded(config, "best") == "2"


def test_callbacks_get_means_over_the_steps_between_logs(config, policy):
    seen = []

    class Listener(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "reward" in logs:
                seen.append((state.global_step, logs["reward"], logs["num_tokens"]))

    config.logging_steps = 2
    run(config, policy, rewards=(1.0, 3.0, 5.0, 9.0), callbacks=[Listener()])
    assert seen == [(2, 2.0, 20.0), (4, 7.0, 40.0)]
