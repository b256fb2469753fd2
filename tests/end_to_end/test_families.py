"""Engines that were given a family's weights by a sync compute what the trainer computes."""

from pathlib import Path

import pytest

from tests.end_to_end.conftest import run_script

pytestmark = [pytest.mark.cores(4), pytest.mark.engine]

WORKER = Path(__file__).with_name("families_worker.py")
EXPERTS = ["layout.teacher=1x1x2", "layout.student=1x1x2", "teacher.expert_parallel=2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, processes, overrides",
    [
        ("mixtral", 2, EXPERTS),
        ("qwen2", 1, ["merged"]),
        ("qwen2", 1, ["adapters"]),
        ("mistral", 1, []),
        ("qwen3_moe_mixed", 1, []),
    ],
)
def test_engine_agrees_after_a_sync(job, tiny_models, tmp_path, model, processes, overrides):
    kept = [o for o in job if not o.startswith(("experiment", "teacher.path", "data.eval"))]
    kept += [f"teacher.path={tiny_models / model}", "data.eval=null", f"output_dir={tmp_path}"]
    kept += ["layout.placement=colocated", *overrides]
    said = run_script(WORKER, *kept, ranks=processes)
    assert float(said.split("largest difference ")[1].split()[0]) < 1e-5
    if overrides == ["adapters"]:  # A and B of query and value, in each of two layers
        assert "second sync 8\n" in said
