"""Converted checkpoints load into Megatron at any layout, and come back from any."""

from pathlib import Path

import pytest
import torch

from checkpoints_convert import megatron_to_hf
from checkpoints_convert.megatron import MegatronModel
from grpo_mcore.checkpoint.folder import COMPANIONS
from grpo_mcore.models.hf_files import HFReader, copy_companions
from tests.checkpoints_convert.test_round_trip import assert_same
from tests.conftest import FAMILY_MODELS
from tests.end_to_end.conftest import run_script

pytestmark = pytest.mark.cores(4)


@pytest.fixture(scope="module")
def saved(tiny_models, converted, tmp_path_factory) -> Path:
    """Checkpoints saved at FAMILY_MODELS' layouts. The worker fails where what it loads is not,
    name by name and bit by bit, what Megatron wants and Hugging Face's files hold."""
    directory = tmp_path_factory.mktemp("saved")
    worker = Path(__file__).with_name("layouts_worker.py")
    run_script(worker, tiny_models, converted, directory, ranks=4)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILY_MODELS)
def test_every_layout_comes_back(tiny_models, saved, tmp_path, model):
    copy_companions(tiny_models / model, saved / model / COMPANIONS)
    megatron_to_hf.convert(saved / model, tmp_path / "back", dtype=None, check=True)
    assert_same(tmp_path / "back", tiny_models / model)
    checkpoint = MegatronModel(saved / model)
    rows, _ = checkpoint.reader.size(checkpoint.slots["embedding.word_embeddings.weight"])
    assert rows == (578 if FAMILY_MODELS[model][2].startswith("2x") else 577)  # padded for TP 2


def test_checkpoint_of_a_run_becomes_what_the_run_exports(tiny_models, tmp_path):
    model = tiny_models / "qwen3_tied"
    worker = Path(__file__).with_name("run_worker.py")
    run_script(worker, model, tmp_path, ranks=4)
    megatron_to_hf.convert(tmp_path / "checkpoints", tmp_path / "back", dtype=None, check=True)
    assert_same(tmp_path / "back", tmp_path / "exported")
    assert not torch.equal(
        HFReader(tmp_path / "back").read("model.norm.weight"),
        HFReader(model, torch.bfloat16).read("model.norm.weight"),
    )
