"""A run whose judges are behind an endpoint that does as it is told, and the run's own judge."""

import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import psutil
import pytest

from grpo_mcore import (
    GRPOConfig,
    GRPOTrainer,
    RewardSystemConfig,
    RIMReward,
    TeacherGRPOConfig,
    TeacherGRPOTrainer,
)
from grpo_mcore.config import ConfigError, JudgeServerConfig, ModelConfig, RolloutConfig
from grpo_mcore.config.reward_system import JUDGES, JudgeConfig, JudgeModelConfig, JudgesConfig
from grpo_mcore.models.families import read_shape
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.preflight.layouts import choose_layouts
from grpo_mcore.preflight.teaching_job import check_judge
from grpo_mcore.rewards.rim import Endpoint
from grpo_mcore.rollout.judge_server import JudgeServer
from tests.end_to_end.conftest import records
from tests.rewards.judge_endpoint import fake_endpoint, verdict

pytestmark = pytest.mark.engine

ROWS = [{"question": f"tom has {n} cards.", "answer": str(n)} for n in range(4)]
SERVER_SECONDS = 300


def settings(tiny_models: Path, directory: Path, **more) -> TeacherGRPOConfig:
    given = {
        "teacher": ModelConfig(str(tiny_models / "qwen2")),
        "student": ModelConfig(str(tiny_models / "llama")),
        "output_dir": str(directory),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_prompts_per_step": 1,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_answer_tokens": 6,
        "max_probe_tokens": 6,
        "log_completions": True,
        "rewards": ["rim"],
        "rollout": RolloutConfig(kv_cache_gib=0.05, deadline_seconds=SERVER_SECONDS),
    }
    config = TeacherGRPOConfig(**given | more)
    config.templates.adaptive = "teach {question} {approach}"
    config.templates.with_teaching = "taught {question} {teaching}"
    config.templates.baseline = "alone {question}"
    config.templates.diagnostic = "plan {question}"
    return config


@pytest.mark.seed(85, 86, "A7", "A8")
def test_scores_and_explanations_are_logged_step_by_step(tiny_models, tmp_path):
    """The process judge fails, the helpfulness judge is of two minds."""

    def reply(body: dict) -> dict | int:
        name = body["messages"][-1]["content"].partition(":")[0]
        if name == "process":
            return 400
        if name == "helpfulness" and body["model"] == "small":
            return verdict(body["temperature"])
        return verdict(len(body["messages"][-1]["content"]) % 10 / 10)

    with fake_endpoint() as fake:
        fake.reply = reply
        made = {
            name: JudgeConfig(prompt=f"{name}: {{question}} {{teaching}} {{answer}}")
            for name in JUDGES
        }
        system = RewardSystemConfig(
            judges=JudgesConfig(**made),
            small=JudgeModelConfig(fake.url, "small"),
            large=JudgeModelConfig(model="large"),
            cache=str(tmp_path / "verdicts.sqlite"),
        )
        config = settings(tiny_models, tmp_path / "run", reward_system=system)
        trainer = TeacherGRPOTrainer(config, train_dataset=ROWS)
        with redirect_stdout(StringIO()):
            trainer.train()
        trainer.close()
    steps = [r for r in records(tmp_path / "run") if "loss" in r]
    samples = records(tmp_path / "run", "completions")
    assert len(steps) == 2 and len(samples) == 8
    for step in steps:
        mine = [s["rim_explanations"] for s in samples if s["step"] == step["step"]]
        for name in ("accuracy", "helpfulness", "diagnostic"):
            scores = [explained["scores"][name] for explained in mine]
            assert step[f"rim_rewards/{name}"] == pytest.approx(sum(scores) / len(scores))
            assert step[f"rim_failures/{name}"] == 0
        assert "rim_rewards/process" not in step and step["rim_failures/process"] == 4
        assert step["rim_escalated"] == 0.5 and step["rim_failed_requests"] == 16
        rewards = [explained["reward"] for explained in mine]
        assert step["rewards/RIMReward/mean"] == pytest.approx(sum(rewards) / 4)
    for sample in samples:
        explained = sample["rim_explanations"]
        assert sample["reward"] == pytest.approx(explained["reward"])
        assert explained["tiers"]["helpfulness"] == "large"
        assert explained["rationales"].keys() == {"accuracy", "helpfulness", "diagnostic"}
    asked = "".join(body["messages"][-1]["content"] for body in fake.requests)
    assert samples[0]["answer"] in asked and samples[0]["question"] in asked


def test_a_judge_on_ranks_of_its_own(tiny_models):
    config = settings(tiny_models, Path("unused"), judge=JudgeServerConfig("x", tensor_parallel=2))
    shapes = {role: read_shape(role, getattr(config, role).path) for role in ("teacher", "student")}
    assert choose_layouts(config, shapes, 4) == (
        "separate",
        {"teacher": Layout(), "student": Layout(), "judge": Layout(2)},
    )
    assert choose_layouts(config, shapes, 1)[0] == "colocated"
    with pytest.raises(ConfigError, match="does not fit 3 processes, 2 of them the judge's"):
        choose_layouts(config, shapes, 3)


def test_a_judge_that_cannot_be_served_is_refused(tiny_models, judge_model, monkeypatch):
    check_judge(JudgeServerConfig(str(judge_model)), "colocated")
    with pytest.raises(ConfigError, match=r"judge.path=nowhere: is no directory"):
        check_judge(JudgeServerConfig("nowhere"), "separate")
    with pytest.raises(
        ConfigError, match=r"judge.path=.*llama: its tokenizer has no chat template"
    ):
        check_judge(JudgeServerConfig(str(tiny_models / "llama")), "separate")
    monkeypatch.setattr("grpo_mcore.device.is_cuda", lambda: True)
    with pytest.raises(ConfigError, match=r"needs GPUs of its own; set layout.placement=separate"):
        check_judge(JudgeServerConfig(str(judge_model)), "colocated")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    check_judge(JudgeServerConfig(str(judge_model), tensor_parallel=4), "separate")
    with pytest.raises(ConfigError, match=r"judge.tensor_parallel=8: .* has 4 of the job's"):
        check_judge(JudgeServerConfig(str(judge_model), tensor_parallel=8), "separate")


def test_judges_without_rewards_and_rewards_without_judges_are_refused(
    tiny_models, judge_model, tmp_path
):
    with pytest.raises(ConfigError, match=r"small.base_url=None: give the URL"):
        TeacherGRPOTrainer(settings(tiny_models, tmp_path), train_dataset=ROWS)
    judge = JudgeServerConfig(str(judge_model))
    with pytest.raises(ConfigError, match=r"judge.path=.*: no reward asks it"):
        TeacherGRPOTrainer(
            settings(tiny_models, tmp_path, judge=judge, rewards=["adaptive"]), train_dataset=ROWS
        )
    rows = [{"prompt": "tom has 14 cards."}]
    with pytest.raises(ConfigError, match=r"small.base_url=None: give the URL"):
        GRPOTrainer(
            str(tiny_models / "qwen2"),
            RIMReward(),
            args=GRPOConfig(output_dir=str(tmp_path), max_completion_length=8),
            train_dataset=rows,
        )


@pytest.fixture(scope="module")
def server(judge_model, tmp_path_factory) -> Iterator[JudgeServer]:
    """A run's own judge."""
    rollout = RolloutConfig(kv_cache_gib=0.05, start_seconds=SERVER_SECONDS, max_engine_restarts=1)
    log = tmp_path_factory.mktemp("logs") / "judge.log"
    opened = JudgeServer(JudgeServerConfig(str(judge_model)), rollout, "127.0.0.1", log)
    try:
        opened.wait_until_ready(lambda: None)
        yield opened
    finally:
        opened.close()


def ask(server: JudgeServer) -> list[dict]:
    """What two judges say of two samples."""
    off = {name: JudgeConfig(enabled=False) for name in ("accuracy", "diagnostic")}
    reward = RIMReward(config=RewardSystemConfig(judges=JudgesConfig(**off), timeout=120.0))
    reward.own_judge = Endpoint(server.base_url, None, server.api_key)
    texts = ["<teaching>count</teaching>", "add"]
    return reward(["tom has 14 cards."] * 2, texts, return_info_dict=True)[1]


@pytest.mark.slow
@pytest.mark.seed(85)
def test_structured_outputs_make_a_random_models_json_valid(server):
    for info in ask(server):
        assert info["failures"] == {} and info["reward"] is not None
        assert all(0 <= score <= 1 for score in info["scores"].values())
        assert set(info["principles"]) == {"helpfulness", "process"}


@pytest.mark.slow
def test_a_judge_that_dies_is_missing_until_it_is_back(server):
    (child,) = psutil.Process(server.process.pid).children()
    child.kill()
    while server.restarts == 0:
        time.sleep(0.1)
    assert [info["reward"] for info in ask(server)] == [None, None]
    give_up = time.monotonic() + SERVER_SECONDS
    while any(info["failures"] for info in ask(server)):
        assert time.monotonic() < give_up, server.log.read_text()[-3000:]
        time.sleep(1)
    server.process.terminate()  # now it is given up, and stays so
    server.process.wait(60)
    assert server.restarts == 1
    assert [info["reward"] for info in ask(server)] == [None, None]
