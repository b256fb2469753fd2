"""What is computed of a batch does not depend on the micro-batches it is cut into."""

from pathlib import Path

import pytest
import torch

from tests.end_to_end.conftest import run_command, torchrun
from tests.training.split_worker import BUDGETS, CASES

EVERY_CASE = pytest.mark.parametrize("case", CASES)
EVERY_BUDGET = pytest.mark.parametrize("budget", BUDGETS[1:])


@pytest.fixture(scope="module")
def results(tiny_models, tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("split") / "found.pt"
    worker = Path(__file__).with_name("split_worker.py")
    run_command(torchrun(4, worker, tiny_models, output))
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
