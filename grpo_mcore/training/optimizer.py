"""Megatron's optimizer and learning-rate schedule from our settings."""

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import bfloat16, dtype

from grpo_mcore.config import TrainingConfig
from grpo_mcore.parallel.groups import Role

SCHEDULES = ("constant", "linear", "cosine")


def build_optimizer(
    model: DistributedDataParallel, config: TrainingConfig, params_dtype: dtype, role: Role
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW with global gradient clipping, and the schedule that also keeps weight decay off
    biases and norms (Megatron applies that only in the schedule's step)."""
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.learning_rate,
            min_lr=config.min_learning_rate,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_epsilon,
            clip_grad=config.max_grad_norm,
            bf16=params_dtype == bfloat16,
            params_dtype=params_dtype,
            use_distributed_optimizer=config.distributed_optimizer,
        ),
        [model],
        use_gloo_process_groups=False,
        pg_collection=role.groups,
    )
    return optimizer, OptimizerParamScheduler(optimizer, **schedule(config))


def schedule(config: TrainingConfig) -> dict:
    """OptimizerParamScheduler's arguments. Its step n (from 1) is taken before update n, so decay
    ends one step after the last update, which is thus not lost at the minimum rate."""
    style, stable = config.lr_scheduler_type, config.stable_steps
    arguments = {
        "init_lr": 0.0,
        "max_lr": config.learning_rate,
        "min_lr": config.min_learning_rate,
        "lr_warmup_steps": config.warmup_steps,
        "lr_decay_steps": max(config.max_steps, config.warmup_steps) + 1,
        "lr_decay_style": style,
        "start_wd": config.weight_decay,
        "end_wd": config.weight_decay,
        "wd_incr_steps": config.max_steps,
        "wd_incr_style": "constant",
        # A resumed run takes the step from the checkpoint and the rest from its own settings.
        "use_checkpoint_opt_param_scheduler": False,
        "override_opt_param_scheduler": True,
    }
    if style != "constant" and stable:
        arguments |= {
            "lr_decay_style": "WSD",
            "lr_wsd_decay_style": style,
            "wsd_decay_steps": max(1, config.max_steps + 1 - config.warmup_steps - stable),
        }
    return arguments
