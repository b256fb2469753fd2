"""Checks of settings by themselves, before anything is read."""

import json
import re
from typing import Any

from grpo_mcore import device
from grpo_mcore.config import (
    ConfigError,
    GroupConfig,
    ModelConfig,
    RolloutConfig,
    TeacherGRPOConfig,
    TrainingConfig,
    trained_model,
)
from grpo_mcore.config.bounds import check_bounds
from grpo_mcore.config.objective import check_objective
from grpo_mcore.data.text import fields_of
from grpo_mcore.models.transformer_engine import (
    DeviceFacts,
    check_layers,
    read_facts,
)
from grpo_mcore.objectives.correction import refuse_truncated_sampling
from grpo_mcore.rewards.named import rewards_of
from grpo_mcore.rollout.spec import LORA_RANKS
from grpo_mcore.training.optimizer_names import check_optim, decay_style

UNTOUCHED = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "bad_words": None,
    "structured_outputs": None,
}
"""Settings with which the engine's log-probabilities are the model's own."""
SAMPLES_FROM_REFERENCE = (
    "use_reference_teacher_model=True: the model that samples is not the one that is trained"
)
"""Why the two then differ rightly."""
STRUCTURES = ("json", "regex", "choice", "grammar")
STRUCTURE_OPTIONS = (
    "disable_any_whitespace",
    "disable_additional_properties",
    "whitespace_pattern",
)


def check_settings(config: TeacherGRPOConfig) -> None:
    """The checks that need no file, and so can precede even the making of models.

    Raises:
        ConfigError: for the first setting found that cannot work.
    """
    check_training(config)
    check_teaching(config)
    for role in ("teacher", "student"):
        check_model(role, getattr(config, role))
    check_optimizer(config, "teacher", config.teacher, read_facts())
    if config.student.fp8:
        raise ConfigError(f"student.fp8={config.student.fp8}: the student is not trained")
    rewards_of(config)


def check_training(config: TrainingConfig) -> None:
    """Checks the settings every trainer has, and every number and choice by itself."""
    check_bounds(config)
    style = decay_style(config.lr_scheduler_type)
    check_optim(config.optim)
    if config.max_steps == 0:
        raise ConfigError("max_steps=0: must be at least 1, or -1 for all of num_train_epochs")
    if config.save_strategy == "best" and config.metric_for_best_model is None:
        raise ConfigError("save_strategy=best: needs metric_for_best_model")
    if config.push_to_hub and not config.hub_model_id:
        raise ConfigError("push_to_hub=True: needs hub_model_id")
    if config.min_learning_rate > config.learning_rate:
        raise ConfigError(
            f"min_learning_rate={config.min_learning_rate}: must be between 0 and "
            f"learning_rate={config.learning_rate}"
        )
    if style == "constant":
        for key in ("stable_steps", "min_learning_rate"):
            if getattr(config, key):
                raise ConfigError(
                    f"{key}={getattr(config, key)}: has no meaning with "
                    "lr_scheduler_type=constant; choose linear or cosine"
                )


def check_group(config: GroupConfig) -> None:
    """Checks the settings of trainers that compare samples of a group."""
    check_objective(config)
    refuse_truncated_sampling(config, config.top_p, config.top_k, config.min_p)
    if config.repetition_penalty != 1 and config.vllm_importance_sampling_correction:
        raise ConfigError(
            f"repetition_penalty={config.repetition_penalty}: the engine's log-probabilities have "
            "it, the trainer's do not; set it 1, or vllm_importance_sampling_correction=False"
        )
    if config.sync_ref_model:
        _check_moving_reference(config)
    _check_texts(config)
    _check_rollout(config.rollout)
    check_mismatch_limits(config)
    if config.rollout.offload_policy and not device.is_cuda():
        raise ConfigError("rollout.offload_policy=True: there is no GPU to move the policy off")
    if config.rollout.offload_policy and trained_model(config).fp8_param:
        raise ConfigError("rollout.offload_policy=True: cannot move parameters held in FP8")
    if config.rollout.lora_sync == "adapters":
        _check_adapter_sync(config)


def _check_adapter_sync(config: GroupConfig) -> None:
    """Checks that engines can be sent adapters alone."""
    if config.peft_config is None:
        raise ConfigError("rollout.lora_sync=adapters: there are no adapters; give peft_config")
    if config.rollout.engine == "server":
        raise ConfigError(
            "rollout.lora_sync=adapters: a server is sent whole tensors; choose merged"
        )
    if config.peft_config.r > LORA_RANKS[-1]:
        raise ConfigError(
            f"peft_config.r={config.peft_config.r}: vLLM takes at most {LORA_RANKS[-1]}; "
            "rollout.lora_sync=merged takes any"
        )


def _check_texts(config: GroupConfig) -> None:
    """Checks the settings that say in text what is sampled."""
    for key in ("stop", "bad_words"):
        texts = getattr(config, key)
        if texts is None:
            continue
        if isinstance(texts, str) or not all(isinstance(text, str) and text for text in texts):
            raise ConfigError(f"{key}={texts!r}: must be a list of texts, none of them empty")
        if key == "bad_words" and not all(text.strip() for text in texts):
            raise ConfigError(f"{key}={texts!r}: vLLM leaves out what is nothing but spaces")
    wanted = config.structured_outputs
    if wanted is not None:
        _check_structure(wanted)
    for key in ("bad_words", "structured_outputs"):
        if getattr(config, key) and config.vllm_importance_sampling_correction:
            raise ConfigError(
                f"{key}={getattr(config, key)}: the engine's log-probabilities are then those of "
                "the tokens left in, the trainer's of all, and vllm_importance_sampling_correction "
                "would scale the loss by the mass left in; set it False, or leave "
                f"{key} out"
            )


def _check_structure(wanted: Any) -> None:
    where = f"structured_outputs={wanted}"
    if not isinstance(wanted, dict):
        raise ConfigError(f"{where}: must be a dictionary, such as {{regex: '[0-9]+'}}")
    if len(wanted.keys() & {*STRUCTURES}) != 1 or wanted.keys() - {*STRUCTURES, *STRUCTURE_OPTIONS}:
        raise ConfigError(
            f"{where}: give one of {', '.join(STRUCTURES)}, and beside it "
            f"{' or '.join(STRUCTURE_OPTIONS)} only"
        )
    try:
        if isinstance(wanted.get("json"), str):
            json.loads(wanted["json"])
        if "regex" in wanted:
            re.compile(wanted["regex"])
    except (ValueError, re.error) as error:
        raise ConfigError(f"{where}: {error}") from error
    choice = wanted.get("choice", ["a"])
    if isinstance(choice, str) or not choice or not all(isinstance(c, str) and c for c in choice):
        raise ConfigError(f"{where}: choice must be a list of texts, none of them empty")


def _check_moving_reference(config: GroupConfig) -> None:
    if not config.beta:
        raise ConfigError("sync_ref_model=True: needs beta above 0, there is no reference model")
    if config.peft_config:
        raise ConfigError(
            "sync_ref_model=True: with peft_config the reference is the model without adapters, "
            "which does not move"
        )
    if trained_model(config).fp8_param:
        raise ConfigError("sync_ref_model=True: cannot mix parameters held in FP8")


def _check_rollout(rollout: RolloutConfig) -> None:
    for key in ("start_seconds", "generate_seconds", "sync_seconds"):
        value, most = getattr(rollout, key), rollout.deadline_seconds
        if value is not None and value > most:
            raise ConfigError(
                f"rollout.{key}={value}: must be at most "
                f"rollout.deadline_seconds={most}, for which other ranks wait"
            )
    if rollout.quantization is not None and not device.is_cuda():
        raise ConfigError(
            f"rollout.quantization={rollout.quantization}: vLLM computes in FP8 on GPUs only, "
            "none is here; leave it null"
        )


def check_teaching(config: TeacherGRPOConfig) -> None:
    """Checks what teaching has beside its models."""
    check_group(config)
    check_templates(config)
    if config.baseline_samples > 1 and config.student_temperature == 0:
        raise ConfigError(
            f"baseline_samples={config.baseline_samples}: greedy answers are all the same; "
            "use 1, or student_temperature above 0"
        )


def check_templates(config: TeacherGRPOConfig) -> None:
    """Checks that templates have the fields they cannot do without."""
    needed = {
        "baseline": {"question"},
        "diagnostic": {"question"},
        "adaptive": {"question", "approach"},
        "with_teaching": {"question", "teaching"},
        "grading": {"question", "approach"},
        "walkthrough": {"question", "approach"},
        "hints": {"question", "approach"},
        "verification": {"question", "approach"},
        "reference": {"answer"},
    }
    for name, fields in needed.items():
        missing = fields - fields_of(getattr(config.templates, name))
        if missing:
            raise ConfigError(f"templates.{name}: lacks {{{sorted(missing)[0]}}}")


def check_optimizer(
    config: TrainingConfig, key: str, model: ModelConfig, facts: DeviceFacts
) -> None:
    """Checks what the optimizer and the model it trains, section `key`, need of each other.

    Raises:
        ConfigError: for the first setting that cannot work.
    """
    if model.fp8_param and not config.distributed_optimizer:
        raise ConfigError(
            f"{key}.fp8_param=true: needs distributed_optimizer=true, which alone updates FP8"
        )
    fraction = config.optimizer_offload_fraction
    where = f"optimizer_offload_fraction={fraction}"
    if fraction == 0:
        return
    if facts.capability is None:
        raise ConfigError(f"{where}: there is no GPU to offload from; leave it 0")
    if facts.fault:
        raise ConfigError(f"{where}: needs Transformer Engine, which cannot be used: {facts.fault}")
    if not config.distributed_optimizer:
        raise ConfigError(f"{where}: needs distributed_optimizer=true")
    if model.dtype != "bfloat16":
        raise ConfigError(f"{where}: needs {key}.dtype=bfloat16, not {model.dtype}")
    if model.fp8_param:
        raise ConfigError(f"{where}: cannot update FP8; needs {key}.fp8_param=false")


def check_model(key: str, model: ModelConfig) -> None:
    """Checks one model's settings, but for its path."""
    check_bounds(model, f"{key}.")
    check_layers(key, model, read_facts())


def why_incomparable(config: GroupConfig) -> str | None:
    """The setting by which trainer and engine differ rightly; None where they must agree."""
    for key, plain in UNTOUCHED.items():
        value = getattr(config, key)
        if value and value != plain:
            return (
                f"{key}={value}: the engine's log-probabilities are of the tokens it leaves in, "
                "or as it penalises them, the trainer's of all tokens as they are"
            )
    return None


def check_mismatch_limits(config: GroupConfig) -> None:
    """Checks the limits, and that there is something to hold to them.

    Raises:
        ConfigError: when not.
    """
    warn, stop = config.rollout.mismatch_warn, config.rollout.mismatch_stop
    if warn is not None and stop is not None and stop < warn:
        raise ConfigError(
            f"rollout.mismatch_stop={stop}: must be at least rollout.mismatch_warn={warn}"
        )
    if stop is not None and (reason := why_incomparable(config)):
        raise ConfigError(f"rollout.mismatch_stop={stop}: leave it out with {reason}")
