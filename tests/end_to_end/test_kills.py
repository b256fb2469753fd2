"""Whole runs whose engines are killed are the runs that were left alone; those that stop for want
of engines go on from where they stopped."""

import json
from pathlib import Path

import pytest

from grpo_mcore.rollout.engine import EngineError
from tests.end_to_end.conftest import records, run_command, torchrun
from tests.rollout.kills import killing
from tests.trainers.grpo_jobs import job as grpo_job
from tests.trainers.grpo_jobs import trainer_of, write_chat_model

pytestmark = [pytest.mark.cores(2), pytest.mark.engine, pytest.mark.slow, pytest.mark.real_engines]

STEPS = 3
SETTINGS = {
    "max_steps": STEPS,
    "beta": 0.1,
    "max_completion_length": 100,  # so that a kill finds some at work
    "save_strategy": "steps",
    "save_steps": 100,
    "eval_steps": 1,
}


def reward_of_text(completions, **_) -> list[float]:
    """Something that differs between samples of a random model."""
    return [float(sum(map(ord, text)) % 11) for text in completions]


def of_steps(directory: Path) -> list[dict]:
    """All that a run has recorded, but for times."""
    return without(("time/", "step_time"), records(directory))


def without(names: str | tuple[str, ...], rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(names)} for row in rows]


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("policy")
    write_chat_model(directory)
    return directory


def run_grpo(policy: Path, output: Path, **settings) -> None:
    restarts = settings.pop("max_engine_restarts", 3)
    config = grpo_job(policy, output, **SETTINGS | settings)
    config.rollout.max_engine_restarts = restarts
    rows = [{"prompt": "tom has 2 cards.", "answer": 2}]
    trainer = trainer_of(config, eval_dataset=rows)
    try:
        trainer.train()
    finally:
        trainer.close()


@pytest.fixture(scope="module")
def left_alone(policy, tmp_path_factory) -> list[dict]:
    directory = tmp_path_factory.mktemp("runs") / "left alone"
    run_grpo(policy, directory)
    return of_steps(directory)


@pytest.mark.parametrize(
    "phases, after",
    [("start", 0), ("generate", 1), ("sync", 2), ("generate start sync", 2)],
)
def test_grpo(policy, left_alone, tmp_path, phases, after):
    """Evaluations are generations too: before the first step and after each."""
    with killing(*phases.split(), after=after):
        run_grpo(policy, tmp_path / "run")
    assert of_steps(tmp_path / "run") == left_alone


@pytest.mark.parametrize("phase, after", [("sync", 2), ("generate", 3), ("generate", 4)])
def test_grpo_that_stops_goes_on(policy, left_alone, tmp_path, phase, after):
    """After the first step, its weights' sync fails, and is not recorded; or the sampling of the
    second, or the evaluation after that."""
    run = tmp_path / "run"
    with killing(phase, "start", after=after), pytest.raises(EngineError) as raised:
        run_grpo(policy, run, max_engine_restarts=1)
    first, *_, last = str(raised.value).splitlines()
    saved = 2 if after == 4 else 1
    assert "engine policy-0 failed again after 1 restarts in a row" in first
    assert "policy-0 died in 'start'" in first and f"{run}/logs/policy-0.log" in first
    assert last == f"step {saved} is saved; resume=auto goes on from it"
    run_grpo(policy, run, resume="auto")
    assert without("sync/", of_steps(run)) == without("sync/", left_alone)


def test_a_run_without_checkpoints_says_so(policy, tmp_path):
    with killing("generate", after=2), pytest.raises(EngineError) as raised:
        run_grpo(policy, tmp_path / "run", max_engine_restarts=0, save_strategy="no")
    assert str(raised.value).splitlines()[-1] == "step 1 was not saved (save_strategy=no)"


@pytest.fixture(scope="module")
def lessons(job, tmp_path_factory):
    """Runs the teacher's job of kills_worker.py."""
    shared = [o for o in job if not o.startswith(("experiment", "data.eval"))]
    shared += ["data.eval=null", f"max_steps={STEPS}", "save_steps=100", "max_answer_tokens=32"]

    def run(
        output: Path, rewards: str, phases: str, after: int, *overrides: str, fails: bool = False
    ) -> str:
        worker = [Path(__file__).with_name("kills_worker.py"), phases, after, rewards]
        command = [*torchrun(2, *worker), *shared, f"output_dir={output}", *overrides]
        return run_command(command, fails=fails, timeout=500)

    return run


PLACEMENTS = {
    "separate": ["layout.placement=separate", "layout.teacher=1x1x1", "layout.student=1x1x1"],
    "colocated": ["layout.placement=colocated", "layout.teacher=1x2x1", "layout.student=1x1x2"],
}


@pytest.mark.parametrize(
    "placement, rewards",
    [("separate", "text"), ("colocated", "text"), ("colocated", "likelihood")],
)
def test_a_frozen_student(lessons, tmp_path, placement, rewards):
    """Its engine dies while the teacher trains; and again, for good, and the run is resumed. With
    the likelihood gain, its model is there still and refills the engine."""
    layout = [*PLACEMENTS[placement], "rollout.student_engines=1"]
    lessons(tmp_path / "left alone", rewards, "", 0, *layout)
    expected = of_steps(tmp_path / "left alone")
    assert len(expected) == STEPS
    lessons(tmp_path / "killed", rewards, "generate,sync", 2, *layout)
    assert of_steps(tmp_path / "killed") == expected
    few, run = "rollout.max_engine_restarts=1", tmp_path / "stopped"
    said = lessons(run, rewards, "generate,start", 2, *layout, few, fails=True)
    assert "engine student-0 failed again after 1 restarts in a row" in said
    assert "step 1 is saved; resume=auto goes on from it" in said
    state = json.loads((run / "checkpoints" / "iter_0000001" / "state.json").read_text())
    assert state["trainer"]["attempts"] == {}
    lessons(run, rewards, "", 0, *layout, "resume=auto")
    assert of_steps(run) == expected


def test_one_of_two_engines(lessons, tmp_path):
    """The other goes on."""
    layout = [*PLACEMENTS["colocated"], "rollout.student_engines=2"]
    lessons(tmp_path / "left alone", "text", "", 0, *layout)
    said = lessons(tmp_path / "killed", "text", "student-1:generate,sync", 2, *layout)
    assert of_steps(tmp_path / "killed") == of_steps(tmp_path / "left alone")
    assert "warning: restart 2 of 3 of student-1: " in said and "of student-0" not in said
