"""What the optimizer and the model it trains need of each other."""

from dataclasses import fields, replace

import pytest
from megatron.core.optimizer import OptimizerConfig

from grpo_mcore.config import ConfigError, ModelConfig, TrainingConfig
from grpo_mcore.models.transformer_engine import DeviceFacts
from grpo_mcore.preflight.settings import check_optimizer
from grpo_mcore.training.optimizer import offload_fields

GPU = DeviceFacts((9, 0), (12, 9), (2, 11))
MODEL = ModelConfig("there", dtype="bfloat16")
SHARDED = TrainingConfig(distributed_optimizer=True)


def test_what_works():
    check_optimizer(TrainingConfig(), "model", MODEL, DeviceFacts())
    check_optimizer(SHARDED, "model", MODEL, DeviceFacts())
    for fraction in (0.0, 0.25, 1.0):
        config = replace(SHARDED, optimizer_offload_fraction=fraction)
        check_optimizer(config, "model", MODEL, GPU)
    in_fp8 = replace(MODEL, fp8="tensorwise", fp8_param=True)
    check_optimizer(SHARDED, "model", in_fp8, GPU)


@pytest.mark.parametrize(
    "config, model, facts, message",
    [
        ({"distributed_optimizer": False}, {}, {}, "needs distributed_optimizer=true"),
        ({}, {"dtype": "float32"}, {}, "needs teacher.dtype=bfloat16, not float32"),
        (
            {},
            {"fp8": "tensorwise", "fp8_param": True},
            {},
            "cannot update FP8; needs teacher.fp8_param=false",
        ),
        ({}, {}, {"capability": None}, "there is no GPU to offload from; leave it 0"),
        (
            {},
            {},
            {"fault": "it is not installed"},
            "needs Transformer Engine, which cannot be used: it is not installed",
        ),
    ],
)
def test_offloading_that_cannot_be(config, model, facts, message):
    config = replace(SHARDED, **{"optimizer_offload_fraction": 0.5} | config)
    with pytest.raises(ConfigError) as caught:
        check_optimizer(config, "teacher", replace(MODEL, **model), replace(GPU, **facts))
    where = f"optimizer_offload_fraction={config.optimizer_offload_fraction}"
    assert str(caught.value) == f"{where}: {message}"


def test_fp8_parameters_need_the_distributed_optimizer():
    in_fp8 = replace(MODEL, fp8="tensorwise", fp8_param=True)
    with pytest.raises(ConfigError, match=r"teacher\.fp8_param=true: needs distributed_opt"):
        check_optimizer(TrainingConfig(), "teacher", in_fp8, GPU)


def test_megatron_knows_the_fields_of_offloading():
    assert offload_fields(0.0) == {}
    found = offload_fields(0.5)
    assert found["optimizer_offload_fraction"] == 0.5
    assert found.keys() <= {field.name for field in fields(OptimizerConfig)}
