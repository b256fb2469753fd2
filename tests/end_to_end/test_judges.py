"""Jobs that serve the judge of their own reward."""

import psutil
import pytest

from tests.end_to_end.conftest import SCRIPT, records, run_command

pytestmark = [pytest.mark.cores(3), pytest.mark.engine]


@pytest.mark.slow
@pytest.mark.seed(87)
@pytest.mark.parametrize("processes", [1, 3], ids=["colocated", "separate"])
def test_a_run_serves_its_own_judge(job, judge_model, tmp_path, processes):
    overrides = [
        *job,
        "rewards=[rim]",
        "reward_system=interpretation_offline",
        f"reward_system.cache={tmp_path / 'verdicts.sqlite'}",
        "reward_system.timeout=240",
        f"judge.path={judge_model}",
        f"output_dir={tmp_path / 'run'}",
        "data.eval=null",
        "num_prompts_per_step=1",
        "max_steps=2",
    ]
    before = {p.pid for p in psutil.process_iter()}
    output = run_command(["bash", SCRIPT, *overrides], timeout=560, NPROC_PER_NODE=str(processes))
    steps = [r for r in records(tmp_path / "run") if "loss" in r]
    assert len(steps) == 2 and ("judge on 1" in output) is (processes == 3)
    for step in steps:
        assert 0 <= step["rim_rewards/process"] <= 1 and 0 <= step["rim_rewards/helpfulness"] <= 1
        assert step["rim_failures/process"] == step["rim_failures/helpfulness"] == 0
        assert "rim_rewards/accuracy" not in step
    assert all("rim_explanations" in s for s in records(tmp_path / "run", "completions"))
    left = [p for p in psutil.process_iter() if p.pid not in before and "api_server" in name_of(p)]
    assert left == []


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just gone
        return ""
