"""A policy loaded from a checkpoint trains on as the one that was saved: exactly at the same
layout, within rounding at another."""

from pathlib import Path

import pytest
import torch

from checkpoints_convert.megatron import MegatronModel
from grpo_mcore.checkpoint import folder
from grpo_mcore.checkpoint.manifest import NAME, first_fault, read_manifest
from grpo_mcore.errors import FilesError
from tests.checkpoint.resume_worker import (
    BESIDE,
    CASES,
    CURES,
    JOINED,
    LAST,
    LAYOUTS,
    MOVING,
    SAVED,
    tensors_of,
)  # fmt: skip
from tests.end_to_end.conftest import run_script

pytestmark = [pytest.mark.cores(4), pytest.mark.slow]
EVERY_CASE = pytest.mark.parametrize("case", CASES)
OTHER_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS[1:])


@pytest.fixture(scope="module")
def directory(tiny_models, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    worker = Path(__file__).with_name("resume_worker.py")
    run_script(worker, tiny_models, directory, ranks=4)
    return directory


@pytest.fixture(scope="module")
def results(directory) -> dict[str, dict]:
    return {name: torch.load(directory / f"{name}.pt", weights_only=False) for name in LAYOUTS}


def differences(expected: dict, found: dict) -> list[str]:
    """Names of the tensors that are not the same bit for bit."""
    assert expected.keys() == found.keys()
    return [name for name in expected if not torch.equal(expected[name], found[name])]


@pytest.mark.seed(52)
@pytest.mark.parametrize("case", [case for case in CASES if case != JOINED])
def test_training_goes_on_exactly(results, case):
    expected, found = results[LAYOUTS[0]]["expected"][case], results[LAYOUTS[0]]["found"][case]
    assert found["losses"] == expected["losses"]
    assert differences(expected["weights"], found["weights"]) == []
    for before, after in zip(expected["gradients"], found["gradients"], strict=True):
        assert differences(before, after) == []
    assert found["state"] == {"mine": case, "step": SAVED}
    assert found["version"] == LAST
    assert found["drawn"] == expected["drawn"]
    assert len(set(expected["losses"])) == LAST - SAVED


@OTHER_LAYOUT
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][1] == "float32"])
def test_training_goes_on_at_another_layout(results, case, layout):
    expected, found = results[LAYOUTS[0]]["expected"][case], results[layout]["found"][case]
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    for before, after in zip(expected["gradients"], found["gradients"], strict=True):
        assert before.keys() == after.keys()
        for name, gradient in before.items():
            assert gradient.abs().max() > 1e-4
            assert (after[name] - gradient).abs().max() <= 1e-5, name
    assert found["drawn"] != expected["drawn"]


@pytest.mark.parametrize("layout", LAYOUTS)
@EVERY_CASE
def test_tensors_come_back(results, directory, case, layout):
    assert differences(tensors_of(case), results[layout]["found"][case]["tensors"]) == []
    listed = read_manifest(folder.checkpoint_at(directory / case, SAVED))
    assert ("tensors.safetensors" in listed) == (case in MOVING)


@pytest.mark.parametrize("case", MOVING)
def test_the_reference_lies_beside_the_policy(results, directory, case):
    tensors = results[LAYOUTS[-1]]["tensors"][case]
    references = {name for name in tensors if name.startswith("reference.")}
    policys = {f"reference.{name}" for name in tensors if f"reference.{name}" in references}
    assert references == policys and len(references) > 8
    for name in references:
        assert not torch.equal(tensors[name], tensors[name.removeprefix("reference.")]), name
    model = MegatronModel(folder.checkpoint_at(directory / case, SAVED))  # is the policy
    norm = tensors["decoder.final_layernorm.weight"]
    assert torch.equal(model.read("model.norm.weight"), norm)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["plain", "distributed"])
def test_a_resumed_run_goes_by_its_own_settings(results, case, layout):
    rate, *others, used = results[layout]["settings"][case]
    assert [rate, *others] == [5e-5, 0.9, 0.9, 1e-6]
    assert 0 < used <= 5e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@EVERY_CASE
def test_weights_and_optimizer_states_are_the_same_at_any_layout(results, case, layout):
    """Saved, loaded at `layout`, and saved there: the same tensors, whatever their type."""
    tensors = results[LAYOUTS[-1]]["tensors"]
    expected, found = tensors[case], tensors[f"{case} {layout}"]
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in expected)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        rows = min(len(tensor), len(found[name]))  # the vocabulary is padded for each layout
        assert rows > len(tensor) - 4
        assert torch.equal(tensor[:rows], found[name][:rows]), name


@pytest.mark.parametrize("cure", CURES)
def test_each_cure_of_the_distributed_optimizer_is_needed(results, cure):
    """If one of these fails, Megatron has been mended there, and the cure can go."""
    found = results[LAYOUTS[0]]["without"][cure]
    if cure == "state_dict":
        assert found == "AssertionError"
    elif cure == "_set_main_param_and_optimizer_states":
        assert found == "KeyError"
    else:
        expected = results[LAYOUTS[0]]["expected"]["distributed"]
        assert differences(expected["weights"], found["weights"])


@pytest.mark.parametrize("case", BESIDE)
def test_an_asynchronous_save_is_of_the_step_it_was_asked_for(results, directory, case):
    tensors = results[LAYOUTS[-1]]["tensors"]
    assert differences(tensors[f"{case} sync"], tensors[f"{case} async"]) == []
    assert is_valid(directory / f"{case} async", SAVED)
    file = folder.checkpoint_at(directory / f"{case} async", SAVED) / "tensors.safetensors"
    assert file.exists() == bool(tensors_of(case))


def test_a_full_disk_leaves_the_checkpoint_before_it(results, directory):
    message = results[LAYOUTS[0]]["full"]
    assert "the checkpoint of step 2 was not written" in message
    only_the_first_is_valid(directory / "full")


def test_a_death_in_mid_save_leaves_the_checkpoint_before_it(results, directory):
    only_the_first_is_valid(directory / "died")


def test_folder_layout_is_megatrons(directory):
    run = directory / "plain"
    assert (run / "latest_checkpointed_iteration.txt").read_text() == str(SAVED)
    names = {path.name for path in (run / f"iter_{SAVED:07d}").iterdir()}
    assert {"metadata.json", ".metadata", "common.pt", "config.yaml", "hf", NAME} <= names
    assert (run / f"iter_{SAVED:07d}" / "hf" / "tokenizer.json").exists()
    assert not list(run.glob("*.partial"))


def test_adapters_are_not_left_out_of_a_conversion(directory):
    with pytest.raises(FilesError, match=r"iter_0000002: holds LoRA adapters"):
        MegatronModel(folder.checkpoint_at(directory / "adapters", SAVED))


def is_valid(run: Path, step: int) -> bool:
    checkpoint = folder.checkpoint_at(run, step)
    return first_fault(checkpoint, read_manifest(checkpoint), with_checksums=True) is None


def only_the_first_is_valid(run: Path) -> None:
    assert folder.steps_in(run) == [1]
    assert is_valid(run, 1)
    assert (run / folder.LATEST).read_text() == "1"
    assert len(list(run.glob("*.partial"))) == 1
    folder.clear_leftovers(run)
    assert {path.name for path in run.iterdir()} == {"iter_0000001", folder.LATEST}
