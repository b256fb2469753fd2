"""Adapters do what PEFT's do, alone and at a mixed layout, and go to and fro in its format."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo_mcore.config import ConfigError, LoraConfig
from grpo_mcore.config.lora import read_lora_config
from grpo_mcore.errors import FilesError
from grpo_mcore.models.adapter_files import check_lora
from grpo_mcore.models.families import read_shape
from tests.end_to_end.conftest import run_command, run_script
from tests.models.lora_reference import CASES

pytestmark = pytest.mark.cores(4)

HERE = Path(__file__).parent
LAYOUTS = ("single", "mixed")
EVERY_MODEL = pytest.mark.parametrize("model", CASES)
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def output(tiny_models, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("lora")
    peft = [sys.executable, HERE / "lora_reference.py"]
    run_command([*peft, "make", tiny_models, directory / "reference"])
    for name, processes in zip(LAYOUTS, (1, 4), strict=True):
        run_script(HERE / "lora_worker.py", tiny_models, directory / name, ranks=processes)
    run_command([*peft, "load", tiny_models, *(directory / name for name in LAYOUTS)])
    return directory


def found(output: Path, layout: str, model: str) -> dict:
    return torch.load(output / layout / model / "found.pt")


@pytest.mark.seed(11, 49)
@EVERY_MODEL
@EVERY_LAYOUT
def test_logits_and_gradients_are_pefts(output, layout, model):
    expected, computed = found(output, "reference", model), found(output, layout, model)
    assert (expected["logits"] - expected["base"]).abs().max() > 1e-2
    assert (computed["logits"] - expected["logits"]).abs().max() <= 1e-4
    assert computed["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        assert gradient.abs().max() > 1e-5, name
        assert (computed["gradients"][name] - gradient).abs().max() <= 1e-6, name


def test_layers_that_begin_with_their_norm(output):
    computed = found(output, "single", "qwen2")
    assert (computed["fused_norms"] - computed["logits"]).abs().max() <= 1e-5


@EVERY_MODEL
@EVERY_LAYOUT
def test_gradient_norm_counts_every_weight_once(output, layout, model):
    gradients = found(output, "reference", model)["gradients"].values()
    squares = sum(gradient.double().square().sum() for gradient in gradients)
    assert found(output, layout, model)["grad_norm"] == pytest.approx(
        squares.sqrt().item(), rel=1e-5
    )


@pytest.mark.seed(49)
@EVERY_MODEL
@EVERY_LAYOUT
def test_disabled_they_leave_the_base_model(output, layout, model):
    computed = found(output, layout, model)["base"]
    assert (computed - found(output, "reference", model)["base"]).abs().max() <= 1e-4


@EVERY_MODEL
@EVERY_LAYOUT
def test_merged_weights_are_pefts(output, tiny_models, layout, model):
    expected = load_file(output / "reference" / model / "merged" / "model.safetensors")
    merged = load_file(output / layout / model / "merged" / "model.safetensors")
    base = load_file(tiny_models / model / "model.safetensors")
    assert merged.keys() == expected.keys() == base.keys()
    targets = json.loads((output / layout / model / "trained/adapter_config.json").read_text())
    for name, tensor in expected.items():
        assert (merged[name] - tensor).abs().max() <= 1e-6, name
        adapted = name.split(".")[-2] in targets["target_modules"] and name.endswith("weight")
        assert torch.equal(merged[name], base[name]) != adapted, name


@pytest.mark.seed(11, 49)
@EVERY_MODEL
@EVERY_LAYOUT
def test_training_leaves_the_base_weights(output, tiny_models, layout, model):
    weights = found(output, layout, model)["weights"]
    for name, tensor in load_file(tiny_models / model / "model.safetensors").items():
        assert torch.equal(weights[name], tensor), name


@EVERY_MODEL
@EVERY_LAYOUT
def test_a_loaded_adapter_is_saved_bit_for_bit(output, layout, model):
    expected = load_file(output / "reference" / model / "adapter" / ADAPTER)
    copied = load_file(output / layout / model / "copied" / ADAPTER)
    assert copied.keys() == expected.keys()
    assert all(torch.equal(copied[name], tensor) for name, tensor in expected.items())


@EVERY_MODEL
@EVERY_LAYOUT
def test_peft_computes_the_same_with_a_trained_adapter(output, layout, model):
    computed = found(output, layout, model)
    assert (computed["trained_logits"] - computed["logits"]).abs().max() > 1e-2
    logits = torch.load(output / layout / model / "peft_logits.pt")
    assert (computed["trained_logits"] - logits).abs().max() <= 1e-4


@EVERY_MODEL
def test_new_adapters_begin_as_pefts_and_alike_at_every_layout(output, model):
    single, mixed = (load_file(output / layout / model / "new" / ADAPTER) for layout in LAYOUTS)
    assert single.keys() == mixed.keys()
    assert all(torch.equal(single[name], mixed[name]) for name in single)
    drawn = [tensor for name, tensor in single.items() if ".lora_A." in name]
    assert len({tensor.sum().item() for tensor in drawn}) == len(drawn)
    for tensor in drawn:
        bound = 1 / math.sqrt(tensor.shape[1])
        assert 0.9 * bound < tensor.abs().max() <= bound
    assert not any(tensor.any() for name, tensor in single.items() if ".lora_B." in name)


@pytest.fixture(scope="module")
def dropout(output) -> dict:
    return torch.load(output / "mixed" / "dropout.pt")


WITH_OR_WITHOUT = pytest.mark.parametrize("sequence_parallel", [False, True])
SAME_INPUTS = [True, True, True, False, True, True, False]
"""Of q, k, v, o, gate, up, down: whether ranks without sequence parallelism have the same."""


def stages(result: dict) -> list[list[dict]]:
    """What the tensor parallel ranks found, by pipeline stage."""
    return [[rank for rank in result["ranks"] if rank["stage"] == stage] for stage in range(2)]


@WITH_OR_WITHOUT
def test_dropout_differs_between_ranks_where_their_inputs_do(dropout, sequence_parallel):
    for ranks in stages(dropout[sequence_parallel, None]):
        first, second = (rank["masks"] for rank in ranks)
        assert len(first) == len(second) == 2 * len(SAME_INPUTS)  # two micro-batches, a layer each
        for mask, other, same in zip(first, second, SAME_INPUTS * 2, strict=True):
            assert 0.4 < mask.float().mean() < 0.6
            assert torch.equal(mask, other) == (same and not sequence_parallel)
        assert len({mask.sum().item() for mask in first}) > len(SAME_INPUTS)


@WITH_OR_WITHOUT
@pytest.mark.parametrize("recompute", [None, "full"])
def test_training_with_dropout(dropout, sequence_parallel, recompute):
    result = dropout[sequence_parallel, recompute]
    assert result["likelihoods"][-1] > result["likelihoods"][0] + 0.01
    for first, second in stages(result):
        assert len(first["replicated"]) == len(SAME_INPUTS)
        for name, parameter in first["replicated"].items():
            assert torch.equal(parameter, second["replicated"][name]), name


@WITH_OR_WITHOUT
def test_log_probs_are_without_dropout(dropout, sequence_parallel):
    _, last_stage = stages(dropout[sequence_parallel, None])
    for rank in last_stage:
        assert torch.equal(rank["log_probs"], rank["log_probs_again"])
        assert not torch.equal(rank["log_probs"], rank["base_reference"])
        assert torch.equal(rank["base_reference"], rank["reference"])


@WITH_OR_WITHOUT
def test_recomputing_drops_the_same_again(dropout, sequence_parallel):
    plain, again = (dropout[sequence_parallel, how]["gradients"] for how in (None, "full"))
    for name, gradient in plain.items():
        assert (gradient - again[name]).abs().max() <= 1e-6, name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use_dora": True}, "peft_config.use_dora=True"),
        ({"bias": "all"}, "peft_config.bias=all"),
        ({"modules_to_save": ["lm_head"]}, "peft_config.modules_to_save="),
        ({"peft_type": "LOHA"}, "peft_config.peft_type=LOHA"),
        ({"rank_pattern": {"q_proj": 3}}, "peft_config.rank_pattern="),
        ({"target_modules": ["lm_head"]}, "peft_config.target_modules=lm_head"),
        ({"target_modules": ".*_proj"}, "peft_config.target_modules=.*_proj"),
        ({"target_modules": []}, "peft_config.target_modules: is empty"),
        ({"r": 0}, "peft_config.r=0"),
        ({"lora_dropout": 1.0}, "peft_config.lora_dropout=1.0"),
        ({"lora_alpha": "8"}, "peft_config.lora_alpha='8'"),
        ("/nowhere", "peft_config.path=/nowhere"),
        (7, "peft_config=7"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(given, message):
    with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
        read_lora_config("peft_config", given)


@pytest.mark.seed(11, 49)
def test_configurations_of_every_kind_say_the_same():
    import peft

    options = {"r": 3, "lora_alpha": 5, "target_modules": ["down_proj", "q_proj"]}
    expected = LoraConfig(3, 5, target_modules=["q_proj", "down_proj"])
    for given in (options, peft.LoraConfig(**options), LoraConfig(**options)):
        assert read_lora_config("peft_config", given) == expected
    assert read_lora_config("peft_config", peft.LoraConfig()).target_modules == ["q_proj", "v_proj"]


def test_an_adapters_own_options_hold(output):
    path = str(output / "reference" / "qwen3_tied" / "adapter")
    lora = read_lora_config("peft_config", path)
    assert (lora.r, lora.lora_alpha, lora.path) == (4, 3, path)
    assert lora.target_modules == ["k_proj", "o_proj", "gate_proj"]
    assert read_lora_config("peft_config", lora) == lora
    with pytest.raises(ConfigError, match=r"peft_config.r=16: the adapter in .* has 4"):
        read_lora_config("peft_config", {"path": path, "r": 16})


def test_experts_and_other_models_adapters_are_refused(output, tiny_models):
    def check(model: str, given) -> None:
        shape = read_shape("model.path", str(tiny_models / model))
        check_lora("peft_config", read_lora_config("peft_config", given), shape)

    check("qwen3_moe", {})
    with pytest.raises(ConfigError, match=r"peft_config.target_modules=gate_proj,.*: experts"):
        check("qwen3_moe", {"target_modules": "all-linear"})
    adapter = output / "reference" / "qwen2" / "adapter"
    check("qwen2", adapter)
    with pytest.raises(FilesError, match=r"lora_A.weight is .* the model needs"):
        check("qwen3", adapter)
    with pytest.raises(FilesError, match=r"no tensor .*layers.2"):
        check("qwen2_tied", adapter)
