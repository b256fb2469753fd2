"""Transformer Engine's layers and FP8 against Megatron's own layers and against transformers.

The tolerances are about twice what emulated FP8 products were seen to do to this model: per tensor
cosines of 0.977, 0.08 of the gradient's norm, 2e-3 of a loss of 6.3 (bfloat16: 0.999, 0.01, 3e-6).
"""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo_mcore.models.transformer_engine import RECIPES, read_facts
from tests.conftest import FAMILY_MODELS, write_family_model
from tests.end_to_end.conftest import run_command, torchrun
from tests.gpu.layers_worker import BLOCKY, gpu_batch, refusal

FAULT = read_facts().fault
WORKER = Path(__file__).with_name("layers_worker.py")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(FAULT is not None, reason=f"Transformer Engine cannot be used: {FAULT}"),
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A model all of whose matrices FP8 can multiply, whatever the recipe."""
    directory = tmp_path_factory.mktemp("models") / "wide"
    write_family_model(
        directory,
        "Qwen2Config",
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
    )
    return directory


@pytest.fixture(scope="module")
def measure(wide, tmp_path_factory):
    """What the worker finds for a case; skips the test where the case cannot run here."""

    @cache
    def measured(case: str) -> dict:
        if reason := refusal(case):
            pytest.skip(reason)
        output = tmp_path_factory.mktemp(case)
        run_command(torchrun(1, WORKER, case, output, wide))
        return torch.load(output / "wide.pt")

    return measured


@pytest.fixture(scope="module")
def transformers_own(wide) -> dict:
    """Loss and gradients of transformers in bfloat16, on the GPU."""
    from transformers import AutoModelForCausalLM

    batch = {name: tensor.cuda() for name, tensor in gpu_batch().items()}
    model = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.bfloat16).cuda()
    table = model(batch["tokens"]).logits.float().log_softmax(-1)
    log_probs = table[:, :-1].gather(-1, batch["tokens"][:, 1:, None]).squeeze(-1)
    loss = -(log_probs * batch["weights"][:, :-1]).sum()
    loss.backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters()}
    return {"loss": loss.item(), "gradients": gradients}


def distance(found: dict, expected: dict) -> float:
    """The norm of the difference of all gradients, as a share of the expected ones' norm."""
    squares = [
        ((found[name] - tensor).square().sum().item(), tensor.square().sum().item())
        for name, tensor in expected.items()
    ]
    difference, norm = map(sum, zip(*squares, strict=True))
    return math.sqrt(difference / norm)


def assert_close(found: dict, expected: dict, loss: float, cosine: float, apart: float) -> None:
    assert found["loss"] == pytest.approx(expected["loss"], abs=loss)
    gradients = expected["gradients"]
    assert found["gradients"].keys() == gradients.keys()
    for name, tensor in gradients.items():
        pair = found["gradients"][name].flatten(), tensor.flatten()
        assert torch.nn.functional.cosine_similarity(*pair, dim=0) >= cosine, name
    assert distance(found["gradients"], gradients) <= apart


def test_nccl_serves_a_world_of_one(measure):
    assert measure("fused")["processes"] == 1


@pytest.mark.parametrize("case", ["local", "fused", "sharded"])
def test_bf16_is_transformers(measure, transformers_own, case):
    assert_close(measure(case), transformers_own, loss=5e-3, cosine=0.995, apart=0.03)


def test_fused_layers_are_the_local_ones(measure):
    assert_close(measure("fused"), measure("local"), loss=5e-3, cosine=0.995, apart=0.03)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_is_near_bf16(measure, recipe):
    found = measure(recipe)
    assert_close(found, measure("fused"), loss=0.02, cosine=0.95, apart=0.16)
    # More apart than bfloat16 could be: FP8 was at work.
    assert distance(found["gradients"], measure("fused")["gradients"]) > 0.02


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_recomputed_is_the_same(measure, recipe):
    assert_close(measure(f"{recipe}_recomputed"), measure(recipe), 1e-3, 0.999, 0.02)


@pytest.mark.parametrize("recipe", BLOCKY)
def test_first_and_last_layer_in_bf16_are_nearer(measure, recipe):
    expected, found = measure("fused"), measure(f"{recipe}_inner")
    assert_close(found, expected, loss=0.02, cosine=0.95, apart=0.16)
    nearer = distance(found["gradients"], expected["gradients"])
    assert 0.01 < nearer < distance(measure(recipe)["gradients"], expected["gradients"])


@pytest.mark.parametrize("recipe", BLOCKY)
def test_fp8_parameters_compute_as_weights_cast_for_each_product(measure, recipe):
    assert_close(measure(f"{recipe}_held"), measure(recipe), 5e-3, 0.99, 0.05)


@pytest.mark.parametrize("recipe", BLOCKY)
def test_fp8_parameters_are_the_weights_rounded_before_and_after_a_step(measure, wide, recipe):
    held, expected = measure(f"{recipe}_held"), measure("sharded")
    # 3 bits of mantissa; a step moves each weight by the learning rate of 1e-3, either way.
    for state, apart in (("loaded", 1e-3), ("stepped", 2.5e-3)):
        assert held[state].keys() == expected[state].keys()
        for name, tensor in expected[state].items():
            torch.testing.assert_close(held[state][name], tensor, rtol=0.07, atol=apart)
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(held["loaded"][name], expected["loaded"][name])


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_offloaded_optimizer_makes_the_same_step(measure, fraction):
    found, expected = measure(f"offloaded_{fraction}"), measure("sharded")
    for name, tensor in expected["stepped"].items():
        torch.testing.assert_close(found["stepped"][name], tensor, rtol=2**-7, atol=1e-6)
        # Near 1, where norms are, bfloat16 has no number so near.
        if tensor.ndim == 2:
            assert not torch.equal(found["stepped"][name], found["loaded"][name]), name


@pytest.fixture(scope="module")
def families(tiny_models, tmp_path_factory) -> Path:
    """The worker's findings for every family with Transformer Engine's layers."""
    output = tmp_path_factory.mktemp("families")
    run_command(torchrun(1, WORKER, "fused", output, *(tiny_models / n for n in FAMILY_MODELS)))
    return output


@pytest.mark.parametrize("model", FAMILY_MODELS)
def test_weights_come_back_from_the_fused_layers_as_they_went_in(families, tiny_models, model):
    expected = load_file(tiny_models / model / "model.safetensors")
    loaded = torch.load(families / f"{model}.pt")["loaded"]
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor.bfloat16().float()), name
