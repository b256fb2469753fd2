"""A policy loaded from a checkpoint trains on exactly as the one that was saved."""

from pathlib import Path

import pytest
import torch

from tests.checkpoint.resume_worker import CASES
from tests.end_to_end.conftest import run_command, torchrun


@pytest.fixture(scope="module")
def directory(tiny_models, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    worker = Path(__file__).with_name("resume_worker.py")
    run_command(torchrun(4, worker, tiny_models, directory))
    return directory


@pytest.mark.parametrize("name", CASES)
def test_resumed_training_is_the_same(directory, name):
    result = torch.load(directory / f"{name}.pt", weights_only=False)
    (losses, weights), (found_losses, found_weights) = result["expected"], result["found"]
    assert result["step"] == 3 and result["version"] == 6
    assert found_losses == losses
    assert losses[0] != losses[-1]
    for tensor, weight in weights.items():
        assert torch.equal(found_weights[tensor], weight), tensor


def test_folder_layout_is_megatrons(directory):
    assert (directory / "plain" / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert (directory / "plain" / "iter_0000003" / "metadata.json").exists()
    assert not list(directory.glob("*/*.partial"))
