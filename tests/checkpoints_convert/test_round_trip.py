"""Hugging Face -> Megatron -> Hugging Face gives back every bit of every family's model."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert import hf_to_megatron, megatron_to_hf
from checkpoints_convert.megatron import MegatronModel
from grpo_mcore.checkpoint import manifest
from grpo_mcore.checkpoint.pickles import read_common
from grpo_mcore.errors import FilesError
from grpo_mcore.models.expected import hf_sizes
from grpo_mcore.models.families import FAMILIES, read_shape
from grpo_mcore.models.hf_files import INDEX, SINGLE
from tests.conftest import FAMILY_MODELS
from tests.end_to_end.conftest import run_command


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(found: Path, expected: Path) -> None:
    """The same tensors, to the bit, and the same other files."""
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    for file in expected.iterdir():
        if file.suffix != ".safetensors" and file.name != INDEX:
            assert (found / file.name).read_bytes() == file.read_bytes(), file.name


def test_every_family_has_a_model():
    assert {name.partition("_tied")[0] for name in FAMILY_MODELS} >= FAMILIES.keys()


@pytest.mark.parametrize("model", FAMILY_MODELS)
def test_round_trip_gives_back_every_bit(tiny_models, converted, tmp_path, model):
    megatron_to_hf.convert(converted / model, tmp_path / "back", dtype=None, check=True)
    assert_same(tmp_path / "back", tiny_models / model)


@pytest.mark.parametrize("model", FAMILY_MODELS)
def test_sizes_are_transformers(tiny_models, model):
    sizes = {name: tuple(t.shape) for name, t in weights(tiny_models / model).items()}
    assert hf_sizes(read_shape("path", str(tiny_models / model))) == sizes


def test_sharded_model_in_bfloat16_with_a_float32_router(tiny_models, tmp_path):
    """Types are kept, each tensor's its own."""
    source = tmp_path / "source"
    shutil.copytree(tiny_models / "qwen3_moe", source)
    tensors = {
        name: tensor if name.endswith("mlp.gate.weight") else tensor.bfloat16()
        for name, tensor in load_file(source / SINGLE).items()
    }
    (source / SINGLE).unlink()
    index = {}
    for n, name in enumerate(tensors):
        file = f"model-{n % 3}.safetensors"
        index[name] = file
    for file in set(index.values()):
        save_file({n: t for n, t in tensors.items() if index[n] == file}, source / file)
    (source / INDEX).write_text(json.dumps({"weight_map": index}))
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))

    hf_to_megatron.convert(source, tmp_path / "megatron", dtype=None, check=True)
    megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back", dtype=None, check=True)
    assert_same(tmp_path / "back", source)


@pytest.mark.parametrize("cast_on", ["way there", "way back"])
def test_type_that_was_asked_for(tiny_models, tmp_path, cast_on):
    from transformers import AutoModelForCausalLM

    there, back = (torch.bfloat16 if cast_on == way else None for way in ("way there", "way back"))
    source = tiny_models / "qwen2_tied"
    hf_to_megatron.convert(source, tmp_path / "megatron", there, check=True)
    megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back", back, check=True)
    found = weights(tmp_path / "back")
    for name, tensor in weights(source).items():
        assert torch.equal(found[name], tensor.bfloat16()), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_folder_is_laid_out_as_megatron_lm_does(tiny_models, converted):
    folder = converted / "llama"
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "0"
    checkpoint = folder / "iter_0000000"
    assert json.loads((checkpoint / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
    assert list(checkpoint.glob("__0_*.distcp"))
    entries = manifest.read_manifest(checkpoint)
    assert manifest.first_fault(checkpoint, entries, with_checksums=True) is None
    assert read_common(checkpoint) == {
        "hf_model": str(tiny_models / "llama"),
        "iteration": 0,
        "checkpoint_version": 3.0,
    }
    assert MegatronModel(checkpoint).source == str(tiny_models / "llama")


def test_one_checkpoint_of_a_folder_can_be_named(tiny_models, converted, tmp_path):
    megatron_to_hf.convert(converted / "llama" / "iter_0000000", tmp_path / "back", None, True)
    assert_same(tmp_path / "back", tiny_models / "llama")


def test_harmless_tensors_are_left_out(tiny_models, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(tiny_models / "llama_tied", source)
    tensors = load_file(source / SINGLE)
    spare = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(16),
    }
    save_file(tensors | spare, source / SINGLE)
    hf_to_megatron.convert(source, tmp_path / "megatron", None, True)
    assert "left out 2 tensors" in capsys.readouterr().out
    megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back", None, True)
    assert_same(tmp_path / "back", tiny_models / "llama_tied")


def test_check_names_what_did_not_come_back(tiny_models, tmp_path, monkeypatch):
    """One weight is changed on its way to the disk."""
    write = hf_to_megatron.write_checkpoint

    def spoil(directory, expected, make, common):
        def spoilt(name):
            tensor = make(name)
            if name == "decoder.layers.1.mlp.linear_fc2.weight":
                tensor[3, 5] += 1
            return tensor

        write(directory, expected, spoilt, common)

    monkeypatch.setattr(hf_to_megatron, "write_checkpoint", spoil)
    with pytest.raises(FilesError, match=r"check: model\.layers\.1\.mlp\.down_proj\.weight is"):
        hf_to_megatron.convert(tiny_models / "qwen2", tmp_path / "megatron", None, check=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_command_line(tiny_models, tmp_path):
    module = [sys.executable, "-m", "checkpoints_convert.hf_to_megatron"]
    command = [*module, "--hf", tiny_models / "qwen3", "--output", tmp_path / "megatron"]
    output = run_command([*command, "--check"])
    assert "checked 25 tensors: identical (xxh3 " in output

    (tmp_path / "megatron" / "stale").touch()
    output = run_command(command, fails=True)
    assert output.splitlines() == [
        f"error: --output={tmp_path / 'megatron'}: is not empty; choose another, or --force"
    ]
    run_command([*command, "--force", "--dtype", "bfloat16"])
    assert not (tmp_path / "megatron" / "stale").exists()

    module = [sys.executable, "-m", "checkpoints_convert.megatron_to_hf"]
    command = [*module, "--megatron", tmp_path / "megatron", "--output", tmp_path / "back"]
    output = run_command([*command, "--check"])
    assert f"came from {tiny_models / 'qwen3'}" in output
    assert "checked 19 tensors: identical (xxh3 " in output
    assert {tensor.dtype for tensor in weights(tmp_path / "back").values()} == {torch.bfloat16}
    assert {path.name for path in tmp_path.iterdir()} == {"megatron", "back"}
