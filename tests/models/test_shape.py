"""config.json becomes a ModelShape, or an error that says what is supported."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from grpo_mcore.config import ConfigError
from grpo_mcore.models.families import FAMILIES, read_shape
from grpo_mcore.models.rope import RopeScaling, inverse_frequencies, read_rope
from tests.conftest import FAMILY_MODELS

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture
def saved(tmp_path):
    """Reads the shape of a saved configuration."""

    def read(config, **raw):
        config.save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | raw))
        return read_shape("teacher.path", str(tmp_path))

    return read


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("tied", [False, True])
def test_sizes_of_every_family(saved, config_class, tied):
    shape = saved(config_class(**SIZES, head_dim=16, tie_word_embeddings=tied))
    assert shape.family == config_class.model_type
    assert (shape.vocab, shape.hidden, shape.ffn, shape.layers) == (1000, 64, 96, 3)
    assert (shape.heads, shape.groups, shape.head_dim) == (8, 2, 16)
    assert (shape.positions, shape.norm_eps, shape.rope_base) == (512, 1e-5, 10000.0)
    assert shape.tied is tied and shape.rope_scaling is None
    assert shape.qkv_bias is (shape.family == "qwen2")
    assert shape.qk_norm is (shape.family == "qwen3")


def test_head_size_follows_from_hidden_size_where_it_is_not_given(saved):
    assert saved(Qwen2Config(**SIZES)).head_dim == 8


def test_every_head_is_a_group_where_groups_are_not_given(saved):
    assert saved(LlamaConfig(**SIZES | {"num_key_value_heads": None})).groups == 8


def test_rope_base_in_the_old_and_the_new_place(saved):
    rope = {"rope_type": "default", "rope_theta": 1e6}
    assert saved(Qwen2Config(**SIZES, rope_parameters=rope)).rope_base == 1e6
    old = {"rope_parameters": None, "rope_scaling": None, "rope_theta": 2e6}
    assert saved(Qwen2Config(**SIZES), **old).rope_base == 2e6


def test_scaling_is_read(saved):
    shape = saved(LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE))
    assert shape.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert shape.rope_base == 500000.0
    old = {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert saved(LlamaConfig(**SIZES), **old).rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize("rope", [LLAMA3_ROPE, {"rope_type": "linear", "factor": 4.0}])
def test_frequencies_are_transformers(rope):
    config = LlamaConfig(**SIZES, head_dim=16, rope_parameters={"rope_theta": 1e5} | rope)
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    found = inverse_frequencies(16, *read_rope(config.to_dict(), "model"))
    assert factor == 1
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_other_scaling_is_refused(saved):
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    with pytest.raises(ConfigError, match=r"teacher\.path=.*rope_type=yarn .*linear and llama3"):
        saved(Qwen2Config(**SIZES), rope_parameters=yarn)


def test_window_and_experts_are_read(saved):
    assert saved(MistralConfig(**SIZES, sliding_window=77)).window == 77
    assert saved(MistralConfig(**SIZES, sliding_window=None)).window is None
    shape = saved(MixtralConfig(**SIZES, num_local_experts=6, num_experts_per_tok=3))
    assert (shape.experts, shape.experts_per_token, shape.ffn) == (6, 3, 96)
    assert not shape.weigh_all_experts and not shape.dense_layers and shape.window is None


def test_dense_layers_of_a_mixture_are_read(saved):
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=8)
    shape = saved(config, decoder_sparse_step=2, num_experts=8)
    assert (shape.experts, shape.ffn, shape.dense_ffn) == (8, 24, 96)
    assert shape.dense_layers == (0, 2) and shape.weigh_all_experts and shape.qk_norm
    assert [shape.has_experts(n) for n in range(3)] == [False, True, False]
    shape = saved(config, mlp_only_layers=[1], norm_topk_prob=True)
    assert shape.dense_layers == (1,) and not shape.weigh_all_experts


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_transformers_default(tmp_path, family):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    shape, config = read_shape("path", str(tmp_path)), AutoConfig.for_model(family)
    assert shape.norm_eps == config.rms_norm_eps and shape.vocab == config.vocab_size
    assert shape.rope_base == config.rope_parameters["rope_theta"]
    heads = config.num_attention_heads
    assert shape.head_dim == getattr(config, "head_dim", None) or config.hidden_size // heads
    assert shape.window == getattr(config, "sliding_window", None)
    assert shape.positions == config.max_position_embeddings


@pytest.mark.parametrize(
    "raw, reason",
    [
        ([], "model family None is not supported"),
        ({"model_type": "llama", "num_attention_heads": "4"}, "num_attention_heads"),
        ({"model_type": "llama", "num_attention_heads": 0}, "cannot be used"),
        ({"model_type": "llama", "rope_scaling": "linear"}, "rope_parameters"),
        ({"model_type": "llama", "num_hidden_layers": 0}, "layers is 0 by its config.json"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0 reaches nothing"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok=9, of 8"),
        ({"model_type": "mixtral", "num_experts_per_tok": 1}, "=1 with renormalised weights"),
    ],
)
def test_a_config_that_makes_no_sense_is_one_line(tmp_path, raw, reason):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=re.escape(reason)) as caught:
        read_shape("path", str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "raw, reason",
    [
        ({"attention_bias": True}, "attention_bias=true"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"use_sliding_window": True}, "use_sliding_window=true"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
    ],
)
def test_variants_that_megatron_would_get_wrong_are_refused(saved, raw, reason):
    with pytest.raises(ConfigError, match=rf"teacher\.path=.*{reason}"):
        saved(LlamaConfig(**SIZES), **raw)


def test_unsupported_family_is_named_with_the_supported_ones(saved):
    with pytest.raises(ConfigError, match="'gpt2' is not supported; supported: llama, mistral"):
        saved(LlamaConfig(**SIZES), model_type="gpt2")


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"student\.path=.*/nowhere: no config\.json there"):
        read_shape("student.path", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_parameters_are_counted_but_for_norms_and_biases(tiny_models, name):
    shape = read_shape("teacher.path", str(tiny_models / name))
    tensors = load_file(tiny_models / name / "model.safetensors").values()
    assert shape.parameters == sum(t.numel() for t in tensors if t.ndim == 2)
