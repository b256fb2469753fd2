"""Model directories: read by slice, written so that transformers loads them."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_mcore.models.hf_files import INDEX, SINGLE, HFReader, write_model


@pytest.fixture(scope="module")
def model(tiny_models):
    return AutoModelForCausalLM.from_pretrained(tiny_models / "qwen2")


@pytest.fixture(scope="module", params=["single file", "sharded"])
def saved(request, model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    model.save_pretrained(
        directory, max_shard_size="100KB" if request.param == "sharded" else "1GB"
    )
    assert (directory / INDEX).exists() == (request.param == "sharded")
    return directory


def write(tiny_models, tensors, directory, **arguments):
    write_model(tensors, directory, tiny_models / "qwen2", torch.float32, **arguments)


def assert_same(loaded, model):
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_reader_gives_whole_tensors_and_slices(saved, model):
    reader = HFReader(saved, torch.float32)
    for name, tensor in model.state_dict().items():
        assert reader.shape(name) == list(tensor.shape)
        assert torch.equal(reader.read(name), tensor)
    name = "model.layers.1.self_attn.o_proj.weight"
    whole = model.state_dict()[name]
    assert torch.equal(reader.read(name, 0, 5, 9), whole[5:9])
    assert torch.equal(reader.read(name, 1, 32, 64), whole[:, 32:64])
    assert reader.read(name, 0, 9, 9).shape == (0, whole.shape[1])


def test_reader_casts_to_the_type_asked_for(saved, model):
    name = "model.embed_tokens.weight"
    read = HFReader(saved, torch.bfloat16).read(name)
    assert torch.equal(read, model.state_dict()[name].bfloat16())


def test_missing_tensor_and_missing_weights_are_named(saved, tmp_path):
    with pytest.raises(KeyError, match=r"no tensor 'model\.layers\.9\.mlp\.gate_proj\.weight'"):
        HFReader(saved, torch.float32).read("model.layers.9.mlp.gate_proj.weight")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}: neither {SINGLE} nor {INDEX}"):
        HFReader(tmp_path, torch.float32)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 100_000, 1])
def test_written_model_loads(tiny_models, model, tmp_path, shard_bytes):
    directory = tmp_path / "written"
    write(tiny_models, model.state_dict().items(), directory, shard_bytes=shard_bytes)
    assert_same(AutoModelForCausalLM.from_pretrained(directory), model)
    assert AutoTokenizer.from_pretrained(directory).vocab_size > 0
    assert (directory / SINGLE).exists() == (shard_bytes == 1 << 30)
    files = sorted(directory.glob("*.safetensors"))
    if shard_bytes == 1:
        assert len(files) == len(model.state_dict())
    if shard_bytes == 100_000:
        assert 1 < len(files) < len(model.state_dict())
        largest = max(tensor.nbytes for tensor in model.state_dict().values())
        assert all(file.stat().st_size <= max(shard_bytes, largest) + 4096 for file in files)
        index = json.loads((directory / INDEX).read_text())
        total = sum(tensor.nbytes for tensor in model.state_dict().values())
        assert index["metadata"]["total_size"] == total


def test_type_is_written_into_the_configuration(tiny_models, model, tmp_path):
    tensors = ((name, tensor.bfloat16()) for name, tensor in model.state_dict().items())
    write_model(tensors, tmp_path / "written", tiny_models / "qwen2", torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "written").dtype == torch.bfloat16


def test_existing_directory_is_replaced_whole(tiny_models, model, tmp_path):
    directory = tmp_path / "written"
    write(tiny_models, model.state_dict().items(), directory, shard_bytes=1)
    (directory / "stale").touch()
    write(tiny_models, model.state_dict().items(), directory)
    assert not (directory / "stale").exists() and not (directory / INDEX).exists()
    assert_same(AutoModelForCausalLM.from_pretrained(directory), model)
    assert [path.name for path in tmp_path.iterdir()] == ["written"]


def test_failure_leaves_the_existing_directory_alone(tiny_models, model, tmp_path):
    directory = tmp_path / "written"
    write(tiny_models, model.state_dict().items(), directory)

    def interrupted():
        yield from list(model.state_dict().items())[:3]
        raise ConnectionError

    with pytest.raises(ConnectionError):
        write(tiny_models, interrupted(), directory, shard_bytes=1)
    assert_same(AutoModelForCausalLM.from_pretrained(directory), model)
