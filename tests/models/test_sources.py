"""Where a model comes from and goes to. The hub is a stub that speaks its protocol over HTTP."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file

from grpo_mcore.errors import ConfigError, PhaseTimeout
from grpo_mcore.models import sources
from grpo_mcore.models.sources import local_model, push_folder
from tests.end_to_end.conftest import run_script
from tests.models.hub_stub import SHA, USER, running_hub

pytestmark = pytest.mark.cores(2)

WORKER = Path(__file__).with_name("sources_worker.py")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        yield hub


@pytest.fixture
def source(tiny_models) -> Path:
    return tiny_models / "qwen3_tied"


@pytest.fixture
def model(source):
    return transformers.AutoModelForCausalLM.from_pretrained(source)


def refusal(*arguments, **settings) -> str:
    with pytest.raises(ConfigError) as caught:
        local_model("model", *arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.seed(2, 40)
def test_a_directory_is_itself(source, tmp_path):
    assert local_model("model", str(source), tmp_path) == str(source)
    assert local_model("model", source, tmp_path, revision="main") == str(source)
    assert not list(tmp_path.iterdir())


@pytest.mark.seed(2, 40)
def test_of_a_model_at_the_hub_what_it_needs_is_downloaded_once(hub, source, tmp_path):
    kept = {path.name: path.read_bytes() for path in source.iterdir()}
    more = ("original/model.safetensors", "pytorch_model.bin", "README.md", "model.gguf")
    hub.files["some/model", "main"] = kept | dict.fromkeys(more, b"much")
    found = Path(local_model("model", "some/model", tmp_path / "outputs"))
    assert {path.name: path.read_bytes() for path in found.iterdir()} == kept
    assert sorted(hub.served) == sorted(kept)
    assert local_model("model", "some/model", tmp_path / "outputs") == str(found)
    assert len(hub.served) == len(kept)


def test_a_revision_is_that_one(hub, source, tmp_path):
    for branch in ("main", "v2"):
        hub.files[f"some/{branch}", branch] = {"config.json": b"{}"}
    assert local_model("model", "some/v2", tmp_path, revision="v2").endswith(SHA)
    assert refusal("some/main", tmp_path, revision="v2").startswith(
        "model=some/main: no directory, and no model the Hugging Face hub gives at revision v2 ("
    )


def test_offline_the_cache_is_asked(hub, source, tmp_path, monkeypatch):
    hub.files["some/model", "main"] = {"config.json": b"{}"}
    found = local_model("model", "some/model", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_model("model", "some/model", tmp_path) == found
    assert refusal("some/other", tmp_path).startswith("model=some/other: no directory, and no ")


@pytest.mark.parametrize("name", ["not/there", "./not/there", "a b"])
def test_what_is_nowhere_is_named_with_the_cause(hub, name, tmp_path):
    message = refusal(name, tmp_path)
    assert message.startswith(f"model={name}: no directory, and no model the Hugging Face hub ")
    assert message.endswith("the path of a directory would do as well")


@pytest.mark.seed(2, 7, 40)
def test_an_object_is_saved_with_its_tokenizer(model, source, tmp_path):
    with torch.no_grad():
        model.model.norm.weight += 1
    found = local_model("model", model, tmp_path / "outputs")
    assert Path(found).parent == tmp_path / "outputs"
    saved = load_file(Path(found) / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(found)
    own = transformers.AutoTokenizer.from_pretrained(source)
    assert tokenizer.get_vocab() == own.get_vocab()
    assert transformers.AutoConfig.from_pretrained(found).tie_word_embeddings


@pytest.mark.seed(7)
def test_its_tokenizer_may_be_given(model, source, tmp_path):
    model.config._name_or_path = ""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = "{{ messages }}"
    found = local_model("model", model, tmp_path, tokenizer=tokenizer)
    saved = transformers.AutoTokenizer.from_pretrained(found)
    assert saved.chat_template == "{{ messages }}"


def test_every_model_has_a_directory_of_its_own(model, source, tmp_path):
    """Of equal ones the same, also in a later run; what else lies there is left alone."""
    (tmp_path / "model.safetensors").write_text("mine")
    first = local_model("model", model, tmp_path)
    written = (Path(first) / "model.safetensors").stat().st_mtime_ns
    again = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert local_model("model", again, tmp_path) == first
    assert (Path(first) / "model.safetensors").stat().st_mtime_ns == written

    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = "{{ messages }}"
    with torch.no_grad():
        again.model.norm.weight += 1
    found = {
        first,
        local_model("model", again, tmp_path),
        local_model("model", again.to(torch.bfloat16), tmp_path),
        local_model("model", model, tmp_path, tokenizer=tokenizer),
    }
    assert len(found) == 4
    assert {str(path) for path in tmp_path.iterdir()} == found | {
        str(tmp_path / "model.safetensors")
    }
    assert (tmp_path / "model.safetensors").read_text() == "mine"


def test_other_ranks_wait_until_it_is_whole(source, tmp_path):
    run_script(WORKER, source, tmp_path / "outputs", tmp_path, ranks=2)
    found = {(tmp_path / f"found {rank}").read_text() for rank in range(2)}
    assert found == {str(path) for path in (tmp_path / "outputs").iterdir()}


def test_a_wait_without_end_is_ended(model, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sources, "DEADLINE_SECONDS", 0.3)
    with pytest.raises(PhaseTimeout, match=r"model: waited 0 s for rank 0 to write .*/Qwen3For"):
        local_model("model", model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_tokenizer_is_refused(model, tmp_path):
    for name, origin in (("", "was not loaded from anywhere"), (str(tmp_path), "came from /")):
        model.config._name_or_path = name
        message = refusal(model, tmp_path)
        assert message.startswith("model=Qwen3ForCausalLM: no tokenizer (")
        assert origin in message and message.endswith("; pass processing_class")


def test_adapters_are_asked_for_apart(model, tmp_path):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert "pass the base model, and their configuration as peft_config" in refusal(
        wrapped, tmp_path
    )


@pytest.mark.seed(2, 40)
@pytest.mark.parametrize("model", [3, None, torch.nn.Linear(1, 1), transformers.Qwen2Config])
def test_what_is_no_model_is_refused(model, tmp_path):
    assert refusal(model, tmp_path).startswith(
        f"model={type(model).__name__}: give a model's directory, its id at the Hugging Face hub"
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "saved"
    (folder / "inside").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "inside" / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    return folder


def uploaded(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.seed(54)
def test_a_folder_is_pushed_whole(hub, folder):
    made = push_folder(folder, "mine", "Done", token="hf_secret", private=True)
    assert hub.files == {(f"{USER}/mine", "main"): uploaded(folder)}
    assert hub.commits == [(f"{USER}/mine", "main", "Done")]
    assert hub.created[0]["name"] == "mine" and hub.created[0]["visibility"] == "private"
    assert hub.tokens == {"Bearer hf_secret"}
    assert made.oid == SHA


def test_pushing_again_keeps_what_else_is_there(hub, folder):
    push_folder(folder, "org/model", token="hf_secret")
    hub.files["org/model", "main"]["README.md"] = b"mine"
    (folder / "config.json").write_text('{"new": 1}')
    push_folder(folder, "org/model", token="hf_secret")
    assert hub.files["org/model", "main"] == uploaded(folder) | {"README.md": b"mine"}
    assert hub.commits[-1][2] == "End of training"


@pytest.mark.seed(54)
def test_a_branch_is_made_for_a_revision(hub, folder):
    push_folder(folder, "org/model", token="hf_secret", revision="try")
    assert hub.files == {("org/model", "main"): {}, ("org/model", "try"): uploaded(folder)}


@pytest.mark.seed(54)
def test_not_blocking_a_future_has_the_commit_or_the_error(hub, folder):
    future = push_folder(folder, "org/model", token="hf_secret", blocking=False)
    assert future.result(timeout=60).oid == SHA
    assert hub.files["org/model", "main"] == uploaded(folder)
    hub.refuses_commits = True
    future = push_folder(folder, "org/model", token="hf_secret", blocking=False)
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError):
        future.result(timeout=60)
