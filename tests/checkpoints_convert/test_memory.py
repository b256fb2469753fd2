"""Conversions stream: their memory does not grow with the model."""

import json
import shutil

import pytest
import torch

from grpo_mcore.models.expected import hf_sizes
from grpo_mcore.models.families import read_shape
from grpo_mcore.models.hf_files import write_model
from tools.bench_convert import measure

ALLOWANCE_MIB = 512


@pytest.mark.slow
def test_memory_over_the_bare_process(tiny_models, tmp_path):
    """The model is larger than what may be held of it; its largest tensor is 40 MiB."""
    like = tmp_path / "like"
    shutil.copytree(tiny_models / "llama", like)
    config = json.loads((like / "config.json").read_text())
    config |= {"hidden_size": 1024, "intermediate_size": 5120, "num_hidden_layers": 26}
    (like / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    expected = {
        name: torch.empty(size, dtype=torch.bfloat16, device="meta")
        for name, size in hf_sizes(read_shape("like", str(like))).items()
    }
    model = sum(tensor.nbytes for tensor in expected.values()) >> 20
    largest = max(tensor.nbytes for tensor in expected.values()) >> 20
    assert model > 2 * largest + ALLOWANCE_MIB
    tensors = ((name, torch.rand(tensor.shape)) for name, tensor in expected.items())
    write_model(tensors, tmp_path / "model", like, expected)

    hf, megatron, back = tmp_path / "model", tmp_path / "megatron", tmp_path / "back"
    there = measure("hf_to_megatron", "--hf", hf, "--output", megatron, "--check")
    assert there["mib_over_bare"] <= model + ALLOWANCE_MIB
    there = measure("megatron_to_hf", "--megatron", megatron, "--output", back, "--check")
    assert there["mib_over_bare"] <= largest + ALLOWANCE_MIB
