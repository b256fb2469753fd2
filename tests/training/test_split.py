"""What is computed of a batch does not depend on the micro-batches it is cut into, nor on the rows
that documents are packed in. References move as TRL's."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo_mcore.config import ConfigError, ModelConfig
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.preflight.offline_job import check_packing
from tests.end_to_end.conftest import run_command, run_script
from tests.training.split_worker import ALPHA, BUDGETS, CASES, PACKED

pytestmark = pytest.mark.cores(4)

SHAPE = ModelShape("llama", 128, 160, 2, 4, 2, 32, 500, 128, 1e-5, 1e4, False)
EVERY_CASE = pytest.mark.parametrize("case", CASES)
EVERY_BUDGET = pytest.mark.parametrize("budget", BUDGETS[1:])


@pytest.fixture(scope="module")
def output(tiny_models, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("split") / "found.pt"
    worker = Path(__file__).with_name("split_worker.py")
    run_script(worker, tiny_models, output, ranks=4)
    return output


@pytest.fixture(scope="module")
def results(output) -> dict:
    return torch.load(output, weights_only=False)


@EVERY_CASE
@EVERY_BUDGET
def test_loss_and_gradient_are_those_of_fixed_micro_batches(results, case, budget):
    expected, found = results[case][None], results[case][budget]
    assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-6)
    assert expected["metrics"].keys() == {"loss", "log_probs", "lowest/min", "entropy"}
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        assert gradient.abs().max() > 1e-5, name
        assert (found["gradients"][name] - gradient).abs().max() <= 1e-6, name


@EVERY_CASE
@EVERY_BUDGET
def test_log_probs_of_the_whole_batch_on_every_rank_of_the_last_stage(results, case, budget):
    mask = results[case][budget]["mask"].bool()
    expected = results[case][None]["ranks"][-1][-1]  # the last rank's, which is on the last stage
    for is_last, _, whole in results[case][budget]["ranks"]:
        for name, values in whole.items():
            assert values.shape == mask.shape
            if is_last:
                assert (values - expected[name][: len(mask)])[mask].abs().max() <= 1e-5, name
            else:
                assert values.count_nonzero() == 0
    assert torch.equal(expected["reference"], expected["log_probs"])
    assert all(expected[name].std() > 1e-3 for name in ("log_probs", "entropies"))


@EVERY_CASE
def test_micro_batches_have_the_shapes_that_were_asked_for(results, case):
    _, layout, settings = CASES[case]
    for budget, found in results[case].items():
        ranks = [parts for _, parts, _ in found["ranks"]]
        assert len({len(parts) for parts in ranks}) == 1
        if "virtual_pipeline" in settings:
            assert len(ranks[0]) % layout.pipeline == 0
        if layout.expert > 1:
            assert ranks.count(ranks[0]) == len(ranks)
        if budget in (40, 100):
            assert len({shape for parts in ranks for shape in parts}) > 1
            assert all(n == 1 or n * length <= budget for parts in ranks for n, length in parts)
        elif budget is None:
            assert set(ranks[0]) == {(2, 32 if settings.get("sequence_parallel") else 31)}


@pytest.mark.parametrize("layout", ["1x1x1", "2x2x1"])
@pytest.mark.parametrize("kind", ["packed", "end to end"])
def test_packed_documents_are_as_if_alone(output, layout, kind):
    found = torch.load(f"{output}.packed", weights_only=False)[layout]
    expected, found = found["alone"], found[kind]
    for one, other in zip(expected["logits"], found["logits"], strict=True):
        assert (one - other).abs().max() <= 1e-5
    assert len(expected["logits"]) == sum(map(len, PACKED))
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    for name, gradient in expected["gradients"].items():
        assert gradient.abs().max() > 1e-5, name
        assert (found["gradients"][name] - gradient).abs().max() <= 1e-6, name


MIX = """
import sys
import torch
from trl.trainer.callbacks import SyncRefModelCallback

found = torch.load(sys.argv[1])
def parameters(tensors):
    return torch.nn.ParameterList(tensors[name] for name in found["before"])
reference = parameters(found["before"])
for policy in found["policies"]:
    SyncRefModelCallback._sync_target_model(parameters(policy), reference, float(sys.argv[2]))
torch.save(dict(zip(found["before"], reference)), sys.argv[3])
"""


def test_a_reference_moves_as_trls(output, tmp_path):
    # In a process of its own: in one that Megatron was bridged to the CPU in, torch is not itself.
    path = f"{output}.mixed"
    run_command([sys.executable, "-c", MIX, path, ALPHA, tmp_path / "expected.pt"])
    expected, found = torch.load(tmp_path / "expected.pt"), torch.load(path)
    assert found["after"].keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found["after"][name], tensor), name
        assert not torch.equal(found["before"][name], tensor), name


def test_packing_that_cannot_be():
    model = ModelConfig("there")
    check_packing("model", SHAPE, model)
    with pytest.raises(ConfigError, match=r"packing=true: model\.path=there has layers with a sl"):
        check_packing("model", replace(SHAPE, window=8), model)
    with pytest.raises(ConfigError, match=r"needs model\.dtype=bfloat16, not float32, or"):
        check_packing("model", SHAPE, replace(model, layers="transformer_engine"))
