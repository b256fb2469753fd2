"""The estimates' formulas on cases computed by hand."""

import pytest

from grpo_mcore.config import ConfigError, GRPOConfig, LoraConfig, ModelConfig
from grpo_mcore.memory.activations import Passes
from grpo_mcore.memory.devices import GIB, find_device
from grpo_mcore.memory.engines import bucket_bytes, cache_of_sequence, engine_weights
from grpo_mcore.memory.parameters import adapters, held
from grpo_mcore.memory.training import states
from grpo_mcore.models.families import shape_of
from grpo_mcore.parallel.grid import Layout

SIZES = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 10, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA = shape_of({"model_type": "llama", "tie_word_embeddings": False, **SIZES}, "here")
TIED = shape_of({"model_type": "llama", "tie_word_embeddings": True, **SIZES}, "here")
MIXTRAL = shape_of(
    {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, **SIZES}, "here"
)
# Queries and results 2 x 8 x 8, keys and values 2 x 8 x 4, two norms; gate, up and down.
LAYER = 128 + 64 + 16 + 3 * 8 * 16
ENDS = 10 * 8


def trained(shape, layout=None, stage=0, model=None, **settings):
    return states(
        GRPOConfig(**{"beta": 0.0} | settings),
        model or ModelConfig(),
        shape,
        layout or Layout(),
        stage,
    )


def test_parameters_of_a_rank():
    assert held(LLAMA, Layout(), 0).total == 4 * LAYER + 2 * ENDS + 8
    assert held(TIED, Layout(), 0).total == 4 * LAYER + ENDS + 8
    first, last = (held(LLAMA, Layout(1, 2), stage).total for stage in (0, 1))
    assert (first, last) == (2 * LAYER + ENDS, 2 * LAYER + ENDS + 8)
    assert held(TIED, Layout(1, 2), 1).total == last  # both ends hold tied weights
    split = 4 * ((LAYER - 16) // 2 + 16) + ENDS + 8  # norms are whole on every rank
    assert held(LLAMA, Layout(2), 0).total == split


@pytest.mark.parametrize("name", ["Qwen2Config", "LlamaConfig", "Qwen3Config"])
def test_parameters_are_those_of_the_model(name):
    import torch
    import transformers

    config = getattr(transformers, name)(**SIZES, head_dim=2, tie_word_embeddings=False)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert held(shape_of(config.to_dict(), "here"), Layout(), 0).total == model.num_parameters()


def test_experts_are_shared_out():
    experts = 4 * 4 * 3 * 8 * 16
    assert held(MIXTRAL, Layout(), 0).experts == experts
    assert held(MIXTRAL, Layout(1, 1, 4, expert=4), 0).experts == experts // 4


def test_states_of_training():
    parameters = held(LLAMA, Layout(), 0).total
    single = trained(LLAMA)
    assert (single.weights, single.gradients) == (4 * parameters, 4 * parameters)
    assert (single.master, single.moments, single.reference) == (0, 8 * parameters, 0)
    mixed = trained(LLAMA, model=ModelConfig(dtype="bfloat16"), beta=0.1)
    assert (mixed.weights, mixed.gradients) == (2 * parameters, 4 * parameters)
    assert (mixed.master, mixed.moments) == (4 * parameters, 8 * parameters)
    assert mixed.reference == 2 * parameters


def test_the_distributed_optimizer_shares_states_out():
    four = Layout(1, 1, 4)
    shared = trained(LLAMA, four, distributed_optimizer=True)
    assert shared.moments == trained(LLAMA, four).moments // 4
    assert shared.gradients == trained(LLAMA, four).gradients


def test_adapters_alone_are_trained():
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    count = 4 * 2 * ((8 + 8) + (8 + 16))
    assert adapters(LLAMA, lora, Layout(), 0) == count
    found = trained(LLAMA, peft_config=lora, beta=0.1)
    assert (found.gradients, found.moments, found.reference) == (4 * count, 8 * count, 0)


def passes(fused, layout=None, **model):
    return Passes(LLAMA, ModelConfig(**model), layout or Layout(), 3, 5, fused)


def test_activations_of_a_layer():
    tokens = 3 * 5
    norms, feed_forward = 2 * 12 * 8, 5 * 4 * 16
    scores = 4 * tokens * 5 * 4  # heads, positions; float32
    local = passes(fused=False)
    assert local.layer(0) == tokens * (norms + 4 * 4 * 8 + feed_forward) + scores
    recomputed = tokens * (norms + 4 * 3 * (8 + 4) + feed_forward)
    assert local.layer(0, recomputed=True) == recomputed
    norms, attention, feed_forward = 4 * 2 * 8, 2 * 3 * (8 + 4), 5 * 2 * 16
    fused = passes(True, dtype="bfloat16")
    assert fused.layer(0) == tokens * (norms + attention + feed_forward)
    split = passes(True, Layout(2), dtype="bfloat16")
    assert split.layer(0) == tokens * (norms + (attention + feed_forward) // 2)
    sharded = passes(True, Layout(2), dtype="bfloat16", sequence_parallel=True)
    assert sharded.layer(0) == tokens * (norms + attention + feed_forward) // 2


def test_activations_kept_by_a_stage():
    boundary = 3 * 5 * 4 * 8
    norm = 3 * 5 * 12 * 8
    assert passes(False).kept(0) == 4 * passes(False).layer(0) + norm
    assert passes(False, recompute="full").kept(0) == 4 * boundary + norm
    stages = passes(False, Layout(1, 2))
    # One micro-batch more is under way where another stage follows.
    assert stages.kept(0) == 2 * 2 * stages.layer(0)
    assert stages.kept(1) == 2 * stages.layer(0) + norm
    parts = passes(False, Layout(1, 2), virtual_pipeline=2)
    assert parts.kept(0) == int(2 * 2 * parts.layer(0) * 1.25)


def test_logits_are_of_the_share_of_the_vocabulary():
    assert passes(False).logits() == 3 * 5 * 10 * 4
    assert passes(False, Layout(2), dtype="bfloat16").logits() == 3 * 5 * 5 * 2


def test_engines():
    whole = held(LLAMA, Layout(), 0).total
    assert engine_weights(LLAMA, "bfloat16", 1, None, on_cpu=False) == 2 * whole
    assert engine_weights(LLAMA, "bfloat16", 1, None, on_cpu=True) == 2 * (whole + 2 * ENDS)
    layers = held(LLAMA, Layout(), 0).total - 2 * ENDS
    assert engine_weights(LLAMA, "bfloat16", 1, "fp8", on_cpu=False) == layers + 2 * 2 * ENDS
    assert cache_of_sequence(LLAMA, "bfloat16", 1, 7) == 2 * 4 * 2 * 2 * 2 * 7
    # Four workers have two key-value heads: each holds one.
    assert cache_of_sequence(LLAMA, "bfloat16", 4, 7) == 2 * 4 * 1 * 2 * 2 * 7
    assert bucket_bytes(LLAMA, "float32", 1) == 2 * 4 * held(LLAMA, Layout(), 0).total


def test_devices():
    assert find_device("--device-memory", "80").memory == 80 * GIB
    assert find_device("--device-memory", "h100_80gb").is_gpu
    assert not find_device("--device-memory", "cpu").is_gpu
    for text in ("nought", "0", "-1", "nan", "inf"):
        with pytest.raises(ConfigError, match=f"--device-memory={text}: give the GiB of a GPU, or"):
            find_device("--device-memory", text)
