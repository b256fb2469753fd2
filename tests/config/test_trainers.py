"""What scripts written for transformers and TRL say, in our settings."""

import pytest
import torch

from grpo_mcore.config import ConfigError, DPOConfig, GRPOConfig, ModelConfig, SFTConfig


def test_other_spellings_set_ours():
    config = GRPOConfig(
        bf16=True,
        gradient_checkpointing=True,
        warmup_ratio=0.1,
        vllm_gpu_memory_utilization=0.3,
        vllm_tensor_parallel_size=2,
        vllm_max_model_length=700,
        num_completions_to_print=3,
        scale_rewards=False,
        eval_steps=None,
        top_k=None,
    )
    assert (config.model.dtype, config.model.recompute) == ("bfloat16", "full")
    assert config.rollout.gpu_memory_utilization == 0.3
    assert config.rollout.policy_tensor_parallel == 2
    assert (config.warmup_steps, config.max_sequence_length) == (0.1, 700)
    assert (config.log_completions, config.scale_rewards) == (3, "none")
    assert (config.eval_steps, config.top_k) == (0, 0)


def test_keyword_arguments_of_the_model():
    config = SFTConfig(model_init_kwargs={"torch_dtype": torch.bfloat16, "revision": "main"})
    assert (config.model.dtype, config.revision) == ("bfloat16", "main")
    with pytest.raises(ConfigError, match=r"^model_init_kwargs.attn_implementation=eager: choose"):
        SFTConfig(model_init_kwargs={"attn_implementation": "eager"})


def test_what_is_passed_in_stays_as_it_is():
    model = ModelConfig("path")
    assert SFTConfig(model=model, bf16=True).model == ModelConfig("path", dtype="bfloat16")
    assert model == ModelConfig("path")


@pytest.mark.parametrize(
    "kind, settings",
    [
        (GRPOConfig, {"remove_unused_columns": False, "use_liger_kernel": False}),
        (SFTConfig, {"per_device_eval_batch_size": 8, "loss_type": "nll", "fp16": False}),
        (DPOConfig, {"dataloader_num_workers": 4, "precompute_ref_log_probs": True}),
    ],
)
def test_settings_that_say_what_is_so_anyway(kind, settings):
    assert kind(**settings) == kind()


@pytest.mark.parametrize(
    "kind, name, value, allowed",
    [
        (GRPOConfig, "load_best_model_at_end", True, "False"),
        (SFTConfig, "fp16", True, "False"),
        (DPOConfig, "loss_type", "ipo", "'sigmoid' or ['sigmoid']"),
    ],
)
def test_settings_that_would_say_otherwise_are_refused(kind, name, value, allowed):
    with pytest.raises(ConfigError) as caught:
        kind(**{name: value})
    assert str(caught.value) == (
        f"{name}={value}: is not supported; leave it out, or set {allowed}"
    )


def test_rollouts_are_vllms():
    with pytest.raises(ConfigError, match="use_vllm=False"):
        GRPOConfig(use_vllm=False)
    with pytest.raises(ConfigError, match="vllm_mode=server"):
        GRPOConfig(vllm_mode="server")
    with pytest.raises(ConfigError, match=r"rollout.engine=server and rollout.policy_servers"):
        GRPOConfig(vllm_mode="server")


def test_further_settings_of_sampling():
    config = GRPOConfig(
        top_k=3,
        generation_kwargs={"top_k": 5, "stop": ["\n"], "bad_words": ["never"]},
        vllm_structured_outputs_regex="[0-9]+",
    )
    assert (config.top_k, config.stop, config.bad_words) == (5, ["\n"], ["never"])
    assert config.structured_outputs == {"regex": "[0-9]+"}
    with pytest.raises(
        ConfigError, match=r"^generation_kwargs.n=3: choose from temperature, top_p"
    ):
        GRPOConfig(generation_kwargs={"n": 3})
