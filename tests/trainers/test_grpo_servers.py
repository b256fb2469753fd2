"""GRPO whose samples come from a vLLM server is GRPO whose samples come from its own engine."""

import json
from dataclasses import replace

import pytest

from tests.rollout.conftest import free_port, serve_model
from tests.trainers.grpo_jobs import job, trainer_of

pytestmark = pytest.mark.engine


@pytest.mark.slow
def test_a_run_on_a_server_is_the_run_on_local_engines(tiny_models, tmp_path):
    path = tiny_models / "qwen2_tied"
    sampling = {
        "stop": ["cards"],
        "bad_words": ["left", "coins"],
        "vllm_importance_sampling_correction": False,
        "max_completion_length": 20,
    }
    runs = {}
    with serve_model(path, tmp_path / "server.log", free_port()) as url:
        for engine, servers in (("local", []), ("server", [url])):
            config = job(path, tmp_path / engine, max_steps=3, **sampling)
            config.rollout = replace(config.rollout, engine=engine, policy_servers=servers)
            trainer = trainer_of(config)
            trainer.train()
            trainer.close()
            runs[engine] = steps_of(tmp_path / engine)
    assert len(runs["local"]) == 3
    for ours, theirs in zip(runs["local"], runs["server"], strict=True):
        assert ours.keys() == theirs.keys()
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5)


def steps_of(directory) -> list[dict]:
    """The metrics of each step but for its times."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: v for name, v in row.items() if isinstance(v, int | float) and "time" not in name}
        for row in rows
    ]
