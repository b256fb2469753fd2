"""What cannot be converted is refused, by name, before anything is written."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert import hf_to_megatron, megatron_to_hf
from checkpoints_convert.command import check_output
from grpo_mcore.checkpoint.folder import METADATA
from grpo_mcore.checkpoint.manifest import NAME as MANIFEST
from grpo_mcore.errors import ConfigError, FilesError
from grpo_mcore.models.families import FAMILIES
from grpo_mcore.models.hf_files import SINGLE


@pytest.fixture
def hf(tiny_models, tmp_path) -> Path:
    shutil.copytree(tiny_models / "llama_tied", tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def megatron(converted, tmp_path) -> Path:
    shutil.copytree(converted / "llama", tmp_path / "source")
    return tmp_path / "source"


def edit_config(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))


def refused(convert, source: Path, message: str, error=FilesError) -> None:
    """`convert` fails with `message` and leaves nothing beside the source."""
    with pytest.raises(error, match=message):
        convert(source, source.with_name("output"), None, True)
    assert list(source.parent.iterdir()) == [source]


DOWN = "model.layers.1.mlp.down_proj.weight"
TENSORS = {
    "missing": (lambda t: t.pop(DOWN), rf"tensor {DOWN} is missing"),
    "of another shape": (
        lambda t: t.update({DOWN: torch.zeros(128, 161)}),
        rf"tensor {DOWN} is \[128, 161\]; by config\.json it is \[128, 160\]",
    ),
    "of another rank": (
        lambda t: t.update({"model.norm.weight": torch.zeros(128, 1)}),
        r"tensor model\.norm\.weight is \[128, 1\]; by config\.json it is \[128\]",
    ),
    "unexpected": (
        lambda t: t.update({"model.layers.2.mlp.down_proj.weight": torch.zeros(128, 160)}),
        r"tensor model\.layers\.2\.mlp\.down_proj\.weight is none of a llama model's",
    ),
    "tied but another": (
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
        r"tensor lm_head\.weight is none of a llama model's",
    ),
    "quantised": (
        lambda t: t.update({DOWN: torch.zeros(128, 160, dtype=torch.int8)}),
        rf"tensor {DOWN} is torch\.int8: a quantised model",
    ),
    "in FP8": (
        lambda t: t.update({DOWN: torch.zeros(128, 160).to(torch.float8_e4m3fn)}),
        rf"tensor {DOWN} is torch\.float8_e4m3fn: a quantised model",
    ),
    "of a type of its own": (
        lambda t: t.update({DOWN: t[DOWN].bfloat16()}),
        rf"is torch\.float32 and {DOWN} is torch\.bfloat16, .* choose a type with --dtype",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_of_a_model(hf, case):
    change, message = TENSORS[case]
    tensors = load_file(hf / SINGLE)
    change(tensors)
    save_file(tensors, hf / SINGLE)
    refused(hf_to_megatron.convert, hf, message)


def test_vocabulary_that_config_json_does_not_know(hf):
    edit_config(hf, vocab_size=600)
    refused(hf_to_megatron.convert, hf, r"embed_tokens\.weight is \[577, 128\]; .* \[600, 128\]")


def test_unknown_family_comes_with_the_known_ones(hf):
    edit_config(hf, model_type="gpt_neox")
    message = f"--hf=.*'gpt_neox' is not supported; supported: {', '.join(sorted(FAMILIES))}"
    refused(hf_to_megatron.convert, hf, message, ConfigError)


def test_quantised_model(hf):
    edit_config(hf, quantization_config={"quant_method": "gptq"})
    refused(hf_to_megatron.convert, hf, "quantised", ConfigError)


def test_truncated_model(hf):
    (hf / SINGLE).write_bytes((hf / SINGLE).read_bytes()[:-1])
    refused(hf_to_megatron.convert, hf, rf"{SINGLE}: is truncated")


def test_folder_without_a_checkpoint(megatron):
    (megatron / "latest_checkpointed_iteration.txt").unlink()
    refused(megatron_to_hf.convert, megatron, "neither latest_checkpointed_iteration.txt nor")


def test_folder_whose_latest_checkpoint_is_not_there(megatron):
    (megatron / "latest_checkpointed_iteration.txt").write_text("7")
    refused(megatron_to_hf.convert, megatron, "says 7, but iter_0000007 is not there")


def test_checkpoint_without_configuration(megatron):
    shutil.rmtree(megatron / "iter_0000000" / "hf")
    (megatron / "iter_0000000" / MANIFEST).unlink()
    refused(megatron_to_hf.convert, megatron, "lacks the folder hf/ with config.json")


@pytest.mark.parametrize("manifest", [True, False], ids=["ours", "megatron's own"])
@pytest.mark.parametrize("keep", [100, -1])
def test_truncated_checkpoint(megatron, keep, manifest):
    file = next(megatron.glob("iter_0000000/*.distcp"))
    file.write_bytes(file.read_bytes()[:keep])
    if manifest:
        refused(megatron_to_hf.convert, megatron, rf"{file.name} has \d+ bytes for \d+")
    else:
        (megatron / "iter_0000000" / MANIFEST).unlink()
        refused(megatron_to_hf.convert, megatron, rf"{file.name} is truncated: it ends before ")


@pytest.mark.parametrize("manifest", [True, False], ids=["ours", "megatron's own"])
def test_missing_part_of_a_checkpoint(megatron, manifest):
    file = next(megatron.glob("iter_0000000/*.distcp"))
    file.unlink()
    if not manifest:
        (megatron / "iter_0000000" / MANIFEST).unlink()
    refused(megatron_to_hf.convert, megatron, rf"{file.name}(, which holds .*,)? is missing")


def test_altered_checkpoint(megatron):
    file = next(megatron.glob("iter_0000000/*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused(megatron_to_hf.convert, megatron, rf"{file.name} was altered")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"intermediate_size": 192}, r"linear_fc1\.weight is \[320, 128\]; .* \[384, 128\]"),
        ({"num_hidden_layers": 3}, r"is a stack of \[2\]; by config\.json it is one of \[3\]"),
        ({"vocab_size": 578}, r"word_embeddings\.weight is \[577, 128\]; .* \[578, 128\]"),
        ({"model_type": "qwen3"}, r"q_layernorm\.weight is missing"),
    ],
)
def test_checkpoint_of_another_model(megatron, changes, message):
    edit_config(megatron / "iter_0000000" / "hf", **changes)
    (megatron / "iter_0000000" / MANIFEST).unlink()
    refused(megatron_to_hf.convert, megatron, message)


def test_no_code_of_a_checkpoint_is_run(megatron, tmp_path_factory):
    trace = tmp_path_factory.mktemp("trace") / "ran"
    code = pickle.dumps(_Runs(trace))
    (megatron / "iter_0000000" / METADATA).write_bytes(code)
    (megatron / "iter_0000000" / MANIFEST).unlink()
    refused(megatron_to_hf.convert, megatron, r"refers to pathlib\.Path.*nothing of it was run")
    assert not trace.exists()
    pickle.loads(code)
    assert trace.exists()


class _Runs:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_output_that_holds_the_source_is_never_replaced(hf):
    for output in (hf, hf.parent):
        with pytest.raises(ConfigError, match="holds the source"):
            check_output(output, hf, force=True)
    check_output(hf / "inside", hf, force=False)
