"""The comparison of any two checkpoints."""

import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert.compare import compare, largest_difference, open_model
from grpo_mcore.models.hf_files import SINGLE
from tests.end_to_end.conftest import run_command


@pytest.fixture
def changed(tiny_models, tmp_path):
    """Makes a copy of the model qwen2 with its tensors changed by a function."""

    def make(change):
        shutil.copytree(tiny_models / "qwen2", tmp_path / "changed")
        tensors = load_file(tmp_path / "changed" / SINGLE)
        change(tensors)
        save_file(tensors, tmp_path / "changed" / SINGLE)
        return tmp_path / "changed"

    return make


@pytest.mark.parametrize("first", ["hf", "megatron"])
@pytest.mark.parametrize("second", ["hf", "megatron"])
def test_either_kind_equals_either(tiny_models, converted, first, second):
    kinds = {"hf": tiny_models / "qwen3_moe", "megatron": converted / "qwen3_moe"}
    equal, lines = compare(open_model(kinds[first]), open_model(kinds[second]))
    assert equal
    assert lines == ["45 tensors in A, 45 in B", "largest difference: 0", "equal"]


def test_largest_and_first_difference_are_named(converted, changed):
    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 0.25
        tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 0.5

    equal, lines = compare(open_model(converted / "qwen2"), open_model(changed(change)))
    assert not equal
    assert lines[1] == "largest difference: 0.5, in model.layers.1.mlp.down_proj.weight"
    assert lines[2].startswith("first difference: model.layers.0.mlp.up_proj.weight: differs by")


def test_missing_and_extra_tensors_and_shapes_are_differences(tiny_models, changed):
    a = open_model(tiny_models / "qwen2")
    b = changed(lambda tensors: tensors.pop("model.norm.weight"))
    assert compare(a, open_model(b))[1][-1] == "first difference: model.norm.weight: only in A"
    assert compare(open_model(b), a)[1][-1] == "first difference: model.norm.weight: only in B"
    shutil.rmtree(b)
    b = changed(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}))
    assert compare(a, open_model(b))[1][-1] == (
        "first difference: model.norm.weight: [128] in A, [3] in B"
    )


def test_types_are_told_and_values_count(tiny_models, changed):
    def to_double(tensors):
        tensors |= {name: tensor.double() for name, tensor in tensors.items()}

    equal, lines = compare(open_model(tiny_models / "qwen2"), open_model(changed(to_double)))
    assert equal
    assert "types: torch.float32 in A, torch.float64 in B" in lines


def test_what_is_not_a_number_equals_only_itself():
    nan = torch.tensor([1.0, torch.nan, torch.inf])
    assert largest_difference(nan, nan.clone()) == 0
    assert largest_difference(nan, torch.tensor([1.0, 2.0, torch.inf])) == torch.inf
    assert largest_difference(nan, torch.tensor([1.0, torch.nan, 3.0])) == torch.inf
    assert largest_difference(torch.empty(0, 3), torch.empty(0, 3)) == 0


def test_exit_code_tells(tiny_models, converted):
    command = [sys.executable, "-m", "checkpoints_convert.compare", tiny_models / "qwen2"]
    assert run_command([*command, converted / "qwen2"]).splitlines()[-1] == "equal"
    output = run_command([*command, tiny_models / "llama"], fails=True)
    assert output.splitlines()[0] == "27 tensors in A, 21 in B"
    assert "first difference: " in output
