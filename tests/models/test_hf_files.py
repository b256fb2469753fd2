"""Model directories: read by slice, written so that transformers loads them."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_mcore.errors import FilesError
from grpo_mcore.models import hf_files
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


@pytest.fixture
def sharded(model, tmp_path):
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    return tmp_path / "sharded"


def edit_index(directory, change):
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def write(tiny_models, tensors, directory, dtype=torch.float32, **arguments):
    tensors = dict(tensors)
    expected = {name: t.to("meta", dtype) for name, t in tensors.items()}
    write_model(tensors.items(), directory, tiny_models / "qwen2", expected, **arguments)


def assert_same(loaded, model):
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("block_bytes", [1 << 20, 1000])
def test_reader_gives_whole_tensors_and_slices(saved, model, monkeypatch, block_bytes):
    monkeypatch.setattr("grpo_mcore.models.tensor_bytes.BLOCK_BYTES", block_bytes)
    reader = HFReader(saved)
    assert set(reader.names) == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert reader.shape(name) == list(tensor.shape)
        assert reader.dtype(name) == tensor.dtype
        assert torch.equal(reader.read(name), tensor)
    name = "model.layers.1.self_attn.o_proj.weight"
    whole = model.state_dict()[name]
    assert torch.equal(reader.read(name, 0, 5, 9), whole[5:9])
    assert torch.equal(reader.read(name, 1, 32, 64), whole[:, 32:64])
    assert reader.read(name, 0, 9, 9).shape == (0, whole.shape[1])


def test_reader_casts_to_the_type_asked_for(saved, model):
    name = "model.embed_tokens.weight"
    reader = HFReader(saved, torch.bfloat16)
    assert reader.dtype(name) == torch.bfloat16
    assert torch.equal(reader.read(name), model.state_dict()[name].bfloat16())
    assert torch.equal(reader.read(name, 1, 3, 7), model.state_dict()[name][:, 3:7].bfloat16())


def test_missing_tensor_and_missing_weights_are_named(saved, tmp_path):
    with pytest.raises(FilesError, match=r"no tensor model\.layers\.9\.mlp\.gate_proj\.weight"):
        HFReader(saved).read("model.layers.9.mlp.gate_proj.weight")
    with pytest.raises(FilesError, match=rf"{tmp_path}: no weights there"):
        HFReader(tmp_path)


def test_missing_shard_is_named(sharded):
    (sharded / "model-00003-of-00009.safetensors").unlink(missing_ok=True)
    missing = sorted(sharded.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(FilesError, match=r"model-0000\d-of-\d+\.safetensors is missing"):
        HFReader(sharded)


def test_index_that_disagrees_with_the_shards_is_refused(sharded):
    name = "model.norm.weight"
    holder = json.loads((sharded / INDEX).read_text())["weight_map"][name]
    other = next(p.name for p in sharded.glob("*.safetensors") if p.name != holder)

    edit_index(sharded, lambda files: files.update({name: other}))
    with pytest.raises(FilesError, match=rf"{name} is in {holder}, but listed in {other}"):
        HFReader(sharded)
    edit_index(sharded, lambda files: files.pop(name))
    with pytest.raises(FilesError, match=rf"{name} is in {holder}, but listed in no file"):
        HFReader(sharded)
    edit_index(sharded, lambda files: files.update({name: holder, "ghost": other}))
    with pytest.raises(FilesError, match=rf"ghost is listed in {other}, but is not there"):
        HFReader(sharded)
    (sharded / INDEX).write_text("{}")
    with pytest.raises(FilesError, match="is not an index"):
        HFReader(sharded)


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_truncated_file_is_found_before_anything_is_read(tiny_models, tmp_path, size):
    shutil.copytree(tiny_models / "qwen2", tmp_path / "cut")
    file = tmp_path / "cut" / SINGLE
    data = file.read_bytes()
    file.write_bytes(data[:size])
    with pytest.raises(FilesError, match=rf"{SINGLE}: is truncated"):
        HFReader(tmp_path / "cut")


def test_file_that_is_no_safetensors_is_refused(tiny_models, tmp_path):
    shutil.copytree(tiny_models / "qwen2", tmp_path / "junk")
    (tmp_path / "junk" / SINGLE).write_bytes((8).to_bytes(8, "little") + b"not json" + bytes(100))
    with pytest.raises(FilesError, match="is truncated or no safetensors file"):
        HFReader(tmp_path / "junk")


@pytest.mark.parametrize("shard_bytes", [1 << 30, 100_000, 1])
def test_written_model_loads(tiny_models, model, tmp_path, shard_bytes):
    directory = tmp_path / "written"
    write(tiny_models, model.state_dict(), directory, shard_bytes=shard_bytes)
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


def test_tensors_may_come_in_any_order_strides_and_type(tiny_models, model, tmp_path, monkeypatch):
    monkeypatch.setattr("grpo_mcore.models.tensor_bytes.BLOCK_BYTES", 1000)
    given = {n: t.double().t() if t.ndim == 2 else t for n, t in model.state_dict().items()}
    expected = {n: t.to("meta", torch.float32).contiguous() for n, t in given.items()}
    write_model(reversed(given.items()), tmp_path / "a", tiny_models / "qwen2", expected)
    reader = HFReader(tmp_path / "a")
    assert reader.names == list(expected)
    assert all(torch.equal(reader.read(name), tensor.float()) for name, tensor in given.items())


def test_type_is_written_into_the_configuration(tiny_models, model, tmp_path):
    write(tiny_models, model.state_dict(), tmp_path / "written", torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "written").dtype == torch.bfloat16


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_configuration_that_is_right_is_kept_as_it_is(tiny_models, model, tmp_path, key):
    like = tmp_path / "like"
    shutil.copytree(tiny_models / "qwen2", like)
    config = json.loads((like / "config.json").read_text())
    config[key] = config.pop("dtype")
    (like / "config.json").write_text(json.dumps(config))
    expected = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    write_model(model.state_dict().items(), tmp_path / "written", like, expected)
    written = tmp_path / "written" / "config.json"
    assert written.read_bytes() == (like / "config.json").read_bytes()


def test_tokenizer_chat_template_and_generation_settings_travel(tiny_models, model, tmp_path):
    like = tmp_path / "like"
    shutil.copytree(tiny_models / "qwen2", like)
    extra = ["tokenizer.model", "chat_template.jinja", "generation_config.json"]
    extra.append("additional_chat_templates/tools.jinja")
    (like / "additional_chat_templates").mkdir()
    for name in extra:
        (like / name).write_text("{}")
    (like / "pytorch_model.bin").write_text("weights")
    expected = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    write_model(model.state_dict().items(), tmp_path / "written", like, expected)
    assert all((tmp_path / "written" / name).exists() for name in extra)
    assert not (tmp_path / "written" / "pytorch_model.bin").exists()


def test_existing_directory_is_replaced_whole(tiny_models, model, tmp_path):
    directory = tmp_path / "written"
    write(tiny_models, model.state_dict(), directory, shard_bytes=1)
    (directory / "stale").touch()
    write(tiny_models, model.state_dict(), directory)
    assert not (directory / "stale").exists() and not (directory / INDEX).exists()
    assert_same(AutoModelForCausalLM.from_pretrained(directory), model)
    assert [path.name for path in tmp_path.iterdir()] == ["written"]


def test_failure_leaves_the_existing_directory_alone(tiny_models, model, tmp_path):
    directory = tmp_path / "written"
    write(tiny_models, model.state_dict(), directory)
    expected = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}

    def interrupted():
        yield from list(model.state_dict().items())[:3]
        raise ConnectionResetError("the other stage is gone")

    with pytest.raises(FilesError, match=r"written: was not written: the other stage is gone"):
        write_model(interrupted(), directory, tiny_models / "qwen2", expected)
    assert_same(AutoModelForCausalLM.from_pretrained(directory), model)
    assert [path.name for path in tmp_path.iterdir()] == ["written"]


@pytest.mark.parametrize("change", ["missing", "unexpected", "twice", "another shape"])
def test_other_tensors_than_expected_are_refused(tiny_models, model, tmp_path, change):
    expected = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    given = list(model.state_dict().items())
    name, tensor = given[5]
    if change == "missing":
        del given[5]
    elif change == "another shape":
        given[5] = (name, tensor[:-1])
    else:
        given.append((name if change == "twice" else "ghost", tensor))
    with pytest.raises(ValueError, match=name if change != "unexpected" else "ghost"):
        write_model(given, tmp_path / "written", tiny_models / "qwen2", expected)
    assert not list(tmp_path.iterdir())


def test_too_small_a_disk_is_found_before_writing(tiny_models, model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(hf_files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FilesError, match=r"needs [\d,]+ bytes, and the disk has 1,000 left"):
        write(tiny_models, model.state_dict(), tmp_path / "written")
    assert not list(tmp_path.iterdir())


def test_neighbours_of_the_output_are_left_alone(tiny_models, model, tmp_path):
    output = tmp_path / "output"
    for name in ("output.old", "output.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("kept")
    for _ in range(2):
        write(tiny_models, model.state_dict().items(), output)
    assert {path.name for path in tmp_path.iterdir()} == {"output", "output.old", "output.partial"}
    assert (tmp_path / "output.old" / "mine").read_text() == "kept"


def test_a_replacement_that_was_killed_is_undone(tiny_models, model, tmp_path):
    output = tmp_path / "output"
    write(tiny_models, model.state_dict().items(), output)
    output.rename(tmp_path / ".output.being-replaced")
    expected = {name: t.to("meta") for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="was never given"):
        write_model([], output, tiny_models / "qwen2", expected)
    assert (output / "config.json").exists()


def test_output_may_be_a_link(tiny_models, model, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    write(tiny_models, model.state_dict().items(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "config.json").exists()
