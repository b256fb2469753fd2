"""What engines hold after a sync is what the trainer would export, bit for bit."""

import json
from pathlib import Path

import pytest

from tests.conftest import FAMILY_MODELS
from tests.end_to_end.conftest import run_script

pytestmark = [pytest.mark.cores(4), pytest.mark.engine]

WORKER = Path(__file__).with_name("exactness_worker.py")


def assert_exact(tiny_models: Path, directory: Path, processes: int, cases: list[str]) -> dict:
    """Returns what the worker found, by case."""
    output = directory / "found.json"
    run_script(WORKER, tiny_models, output, *cases, ranks=processes, timeout=560)
    found = json.loads(output.read_text())
    assert list(found) == cases
    for case, result in found.items():
        engines = 2 if case.endswith(":sites") else 1
        assert len(result["workers"]) == engines * int(case.split(":")[2])
        for differing, compared in result["workers"]:
            assert not differing, case
            assert set(compared) == set(result["exported"]), case
        assert result["sent"][0] == len(result["exported"])
    return found


def test_quick_combinations(tiny_models, tmp_path):
    cases = ["qwen3_tied:2x1x1:2:lora", "mixtral:1x1x2:1"]
    lora, mixtral = assert_exact(tiny_models, tmp_path, 2, cases).values()
    assert mixtral["sent"][1] == mixtral["sent"][0]
    # Adapters of query and value change those, and the key is of the same layer.
    adapted = [
        name for name in lora["exported"] if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")
    ]
    assert lora["sent"][1] == len(adapted)


@pytest.mark.slow
@pytest.mark.parametrize("engine_tp", [1, 2])
def test_every_family_in_an_awkward_layout(tiny_models, tmp_path, engine_tp):
    cases = [f"{name}:{row[2]}:{engine_tp}" for name, row in FAMILY_MODELS.items()]
    assert_exact(tiny_models, tmp_path, 4, cases)


@pytest.mark.slow
def test_one_process(tiny_models, tmp_path):
    cases = [f"{name}:1x1x1:1:lora" for name in ("qwen2", "llama_tied", "qwen3_moe_mixed")]
    assert_exact(tiny_models, tmp_path, 1, cases)


@pytest.mark.slow
def test_two_sites(tiny_models, tmp_path):
    """Each has ranks of one pipeline stage only, so half of what it is sent comes from the other's.
    Experts are spread over the ranks of a site, or the replicas have all and take turns, or tensor
    parallel ranks write their halves."""
    cases = [f"{case}:1:sites" for case in ("mixtral:1x2x2", "qwen2:1x2x2", "qwen2:2x2x1")]
    assert_exact(tiny_models, tmp_path, 4, cases)


@pytest.mark.slow
def test_tensor_parallel_ranks_at_two_sites(tiny_models, tmp_path):
    assert_exact(tiny_models, tmp_path, 2, ["qwen2:2x1x1:1:sites"])
