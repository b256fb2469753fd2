"""Every family computes what transformers computes, alone and at a mixed layout, and comes back
from Megatron as it went in."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import FAMILY_MODELS
from tests.end_to_end.conftest import run_command, run_script

pytestmark = pytest.mark.cores(4)

HERE = Path(__file__).parent
LAYOUTS = ("single", "mixed")


@pytest.fixture(scope="module")
def output(tiny_models, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("parity")
    for name in ("reference", *LAYOUTS):
        (directory / name).mkdir()
    run_command(
        [sys.executable, HERE / "parity_reference.py", tiny_models, directory / "reference"]
    )
    for name, processes in zip(LAYOUTS, (1, 4), strict=True):
        run_script(HERE / "parity_worker.py", tiny_models, directory / name, ranks=processes)
    return directory


def reference(output: Path, model: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """transformers' logits and gradients."""
    directory = output / "reference"
    return torch.load(directory / f"{model}.pt"), load_file(directory / model / "model.safetensors")


@pytest.mark.parametrize("model", FAMILY_MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients_are_transformers(output, layout, model):
    logits, gradients = reference(output, model)
    found = torch.load(output / layout / f"{model}.pt")
    assert (found["logits"] - logits).abs().max() <= 1e-4
    assert logits.abs().max() > 1e-1
    assert found["gradients"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-5, name
        assert (found["gradients"][name] - gradient).abs().max() <= 1e-6, name


@pytest.mark.parametrize("model", FAMILY_MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_norm_counts_every_weight_once(output, layout, model):
    _, gradients = reference(output, model)
    squares = sum(gradient.double().square().sum() for gradient in gradients.values())
    found = torch.load(output / layout / f"{model}.pt")["grad_norm"]
    assert found == pytest.approx(squares.sqrt().item(), rel=1e-5)


@pytest.mark.parametrize("model", FAMILY_MODELS)
@pytest.mark.parametrize("fault", ["swapped_gate", "swapped_key"])
def test_one_wrong_rule_would_be_seen(output, fault, model):
    logits, gradients = reference(output, model)
    found = torch.load(output / "single" / f"{model}.pt")[fault]
    assert (found["logits"] - logits).abs().max() > 1e-3
    assert max((found["gradients"][n] - g).abs().max() for n, g in gradients.items()) > 1e-4


@pytest.mark.parametrize("model", FAMILY_MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_gives_back_every_bit(output, tiny_models, layout, model):
    expected = load_file(tiny_models / model / "model.safetensors")
    found = load_file(output / layout / model / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
